"""`mpitrain plan`: a table, a plot, a JSON document, and messages about wrong options."""

import json

import pytest

from mpitrain.cli.main import main

WORDS = ["plan", "--ranks", "4", "--parameters", "5000", "--methods", "allreduce,gossip"]


def test_the_table_the_plot_and_the_document_agree(tmp_path, capsys):
    plot = tmp_path / "plots" / "plan.png"
    assert main([*WORDS, "--json", "--plot", str(plot)]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    document = json.loads(last)
    assert [line.split()[0] for line in table[1:3]] == [one["algorithm"] for one in document["methods"]]
    for line, one in zip(table[1:3], document["methods"], strict=True):
        assert float(line.split()[1]) == pytest.approx(one["epoch_seconds"], rel=1e-3)
        assert one["computing_share"] + one["communication_share"] == pytest.approx(1)
    assert table[-1] == document["recommendation"]
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--methods", "nosuch"], "nosuch"),
        (["--set", "nosuch=3"], "--set nosuch: none of allreduce, gossip has this setting"),
        (["--latency", "-1"], "--latency"),
        (["--plot", "/dev/null/x.png"], "cannot be written"),
    ],
)
def test_wrong_options_lead_to_one_line(words, told, capsys):
    try:
        code = main([*WORDS, *words])
    except SystemExit as refused:  # by the parser
        code = refused.code
    assert code == 2
    error = capsys.readouterr().err
    assert told in error
    assert len(error.splitlines()) == 1
