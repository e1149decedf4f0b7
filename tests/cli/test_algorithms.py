"""``mpitrain algorithms --topology``: numbers of graphs known in closed form, and the picture."""

import json
import math

import networkx as nx
import pytest
from PIL import Image

from mpitrain.cli.main import main


def described(capsys, *arguments):
    assert main(["algorithms", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_spectral_gap_of_a_ring_is_that_of_its_cosine(capsys):
    """W = 1/3 of itself and each neighbour: the second eigenvalue is 1/3 + 2/3 cos(2 pi/p)."""
    found = described(capsys, "--topology", "ring", "--workers", "12")
    second = 1 / 3 + 2 / 3 * math.cos(2 * math.pi / 12)
    assert found["spectral_gap"] == pytest.approx(1 - second, rel=1e-12)
    assert found["steps_to_a_tenth"] == pytest.approx(math.log(0.1) / math.log(second), rel=1e-9)
    assert (found["workers"], found["sends"], found["undirected"], found["period"]) == (12, [2, 2], True, 1)
    assert found["methods"] == ["sgp", "dpsgd", "adpsgd"]


def test_a_complete_graph_averages_in_one_step(capsys):
    found = described(capsys, "--topology", "complete")
    assert found["spectral_gap"] == pytest.approx(1)
    assert found["steps_to_a_tenth"] == 1
    assert found["workers"] == 8


def test_one_peer_exponential_of_a_power_of_two_averages_in_a_period(capsys):
    found = described(capsys, "--topology", "one_peer_exponential", "--workers", "16")
    assert found["spectral_gap"] == pytest.approx(1)
    assert found["steps_to_a_tenth"] == found["period"] == 4
    assert found["methods"] == ["sgp", "adpsgd"]


def test_a_file_says_how_many_workers_there_are(capsys, tmp_path):
    path = tmp_path / "pairs.edgelist"
    nx.write_edgelist(nx.Graph([(0, 1), (2, 3)]), path, data=False)
    found = described(capsys, "--topology", str(path))
    assert (found["workers"], found["methods"], found["steps_to_a_tenth"]) == (4, [], None)
    assert main(["algorithms", "--topology", str(path), "--workers", "5"]) == 2
    assert "is one of 4 workers, not 5" in capsys.readouterr().err


@pytest.mark.parametrize("graph", ["star", "one_peer_exponential"])
def test_the_picture_is_drawn_and_named(capsys, tmp_path, graph):
    path = tmp_path / "new" / "graph.png"
    assert main(["algorithms", "--topology", graph, "--plot", str(path)]) == 0
    with Image.open(path) as image:
        assert min(image.size) > 300
        assert len(image.convert("L").getcolors()) > 10  # not a blank page
    out = capsys.readouterr().out
    assert out.startswith(f"{graph}")
    assert f"wrote {path}" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "4"], "give --topology GRAPH too"),
        (["--plot", "x.png"], "give --topology GRAPH too"),
        (["--topology", "rnig"], "did you mean ring"),
        (["--topology", "ring", "--workers", "0"], "--workers must be between 1 and"),
        (["--topology", "ring", "--markdown"], "--markdown prints the methods"),
        (["--topology", "hypercube", "--workers", "6"], "a hypercube needs a power of two"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(capsys, arguments, message):
    assert main(["algorithms", *arguments]) == 2
    assert message in capsys.readouterr().err
