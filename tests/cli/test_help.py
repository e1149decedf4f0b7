"""The help of every command: it fits a terminal of 80 columns, and the options of train stand under headings."""

from __future__ import annotations

import argparse
import importlib

import pytest

from mpitrain.cli.main import COMMANDS, main
from mpitrain.cli.options import Parser
from mpitrain.cli.train import SECTIONS, add_arguments
from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.options import flag_of, options_of


@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS), ["data", "import"]], ids=" ".join)
def test_the_help_fits_80_columns(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("usage: ")
    assert [line for line in lines if len(line) > 80] == []


def groups(parser: argparse.ArgumentParser) -> dict[str, list[str]]:
    """Return the flags under each heading."""
    return {
        str(group.title): [flag for action in group._group_actions for flag in action.option_strings]
        for group in parser._action_groups
    }


def test_every_option_of_train_stands_under_its_heading() -> None:
    parser = Parser(prog="mpitrain train")
    add_arguments(parser)
    found, declared = groups(parser), options_of(TrainConfig)
    named = [name for names in SECTIONS.values() for name in names]
    assert len(named) == len(set(named))
    assert set(named) <= set(declared)
    for heading, names in SECTIONS.items():
        assert [flag_of(name, declared[name]) for name in names if declared[name].on_command_line], heading
        assert {flag_of(name, declared[name]) for name in names} <= set(found[heading])
    assert {"--help", "--resume", "--config", "--json"} <= set(found["options"])


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    from mpitrain.version import __version__

    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"mpitrain {__version__}\n"


def test_every_command_has_a_module() -> None:
    for name in COMMANDS:
        module = importlib.import_module(f"mpitrain.cli.{name}")
        assert callable(module.add_arguments)
        assert callable(module.run)
