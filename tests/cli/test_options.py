"""Options are declared once: parsers, defaults and ranges follow from the fields."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from typing import Any

import pytest

from mpitrain.cli import simulate, train
from mpitrain.cli.options import Parser, add_options
from mpitrain.errors import UsageError
from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.options import POSITIVE, check_ranges, flag_of, option, options_of, values_of
from mpitrain.trainer.study_config import SHARED, StudyConfig


@dataclass(frozen=True)
class Example:
    rate: float = option(0.5, "a rate", parse=float, within=POSITIVE)
    count: int | None = option(None, "a count", parse=int, group="one", default_text="all")
    share: float | None = option(None, "a share", parse=float, group="one")
    kind: str = option("a", "a kind", choices=("a", "b"))
    pairs: tuple[str, ...] = option((), "pairs", flag="--pair", repeated=True, collect=tuple)
    loud: bool = option(False, "make noise", parse=None)
    hidden: int = option(3, "not for users", parse=int, on_command_line=False)


def parsed(*words: str, keep_defaults: bool = False) -> argparse.Namespace:
    parser = Parser(prog="mpitrain")
    add_options(parser, Example, keep_defaults=keep_defaults)
    return parser.parse_args(words)


def test_an_option_that_is_not_given_is_none_or_the_default() -> None:
    assert set(vars(parsed()).values()) == {None}
    assert vars(parsed(keep_defaults=True)) == {
        "rate": 0.5,
        "count": None,
        "share": None,
        "kind": "a",
        "pair": [],
        "loud": False,
    }


def test_given_options_become_fields() -> None:
    words = ["--rate", "2", "--count", "7", "--kind", "b", "--pair", "x", "--pair", "y", "--loud"]
    values = values_of(vars(parsed(*words)), Example)
    assert Example(**values) == Example(rate=2.0, count=7, kind="b", pairs=("x", "y"), loud=True)
    assert values_of(vars(parsed(*words)), Example, ["kind", "share"]) == {"kind": "b"}
    assert Example(**values_of(vars(parsed()), Example)) == Example()


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--kind", "-x&"], "argument --kind: expected one argument: for a value .* dash, write --kind='-x&'"),
        (["--rate", "--loud"], "write --rate=--loud"),
        (["--kind"], "expected one argument .see"),
    ],
)
def test_a_value_with_a_dash_gets_the_form_that_works(
    words: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parsed(*words)
    assert re.search(hint, capsys.readouterr().err)


def test_a_positional_value_with_a_dash_gets_the_form_that_works(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser(prog="mpitrain report")
    parser.add_argument("runs", nargs="+")
    with pytest.raises(SystemExit):
        parser.parse_args(["-x"])
    assert "write -- before values that begin with a dash, as in -- -x" in capsys.readouterr().err
    assert parser.parse_args(["--", "-x"]).runs == ["-x"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kind", "c"], "unknown value 'c': it must be one of a, b"),
        (["--count", "1", "--share", "0.5"], "not allowed with argument --count"),
        (["--count", "x"], "invalid int value: 'x'"),
        (["--hidden", "3"], "unrecognized arguments"),
    ],
)
def test_an_error_of_the_parser_is_one_line_and_exit_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        parsed(*words)
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_values_are_checked_wherever_they_come_from() -> None:
    check_ranges(Example(rate=0.1))
    for rate in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="--rate must be more than 0, not"):
            check_ranges(Example(rate=rate))
    with pytest.raises(UsageError, match="--kind: unknown value 'c': it must be one of a, b"):
        check_ranges(Example(kind="c"))


def help_of(command: Any) -> str:
    def on_one_line(prog: str) -> argparse.HelpFormatter:
        return argparse.HelpFormatter(prog, max_help_position=99, width=999)

    parser = argparse.ArgumentParser(prog="mpitrain", formatter_class=on_one_line)
    command.add_arguments(parser)
    return parser.format_help()


@pytest.mark.parametrize(
    ("command", "config", "names"),
    [
        (train, TrainConfig, tuple(options_of(TrainConfig))),
        (simulate, TrainConfig, SHARED),
        (simulate, StudyConfig, tuple(options_of(StudyConfig))),
    ],
    ids=["train", "simulate, shared", "simulate"],
)
def test_the_help_has_every_option_with_its_default(command: Any, config: type[Any], names: tuple[str, ...]) -> None:
    lines = help_of(command).splitlines()
    for name in names:
        declared, default = options_of(config)[name], getattr(config(), name)
        if not declared.on_command_line:
            continue
        line = next(
            line
            for line in lines
            if line.startswith((f"  {flag_of(name, declared)} ", f"  {flag_of(name, declared)},"))
        )
        shown = f"{default:g}" if isinstance(default, float) else default
        if declared.default_text is not None:
            assert line.endswith(f"(default: {declared.default_text})")
        elif default is not None and declared.parse is not None and not declared.repeated:
            assert line.endswith(f"(default: {shown})")


@pytest.mark.parametrize("other", ["--steps", "--gradients", "--minutes"])
def test_budgets_exclude_each_other(other: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser(prog="mpitrain")
    train.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--epochs", "1", other, "2"])
    assert f"{other}: not allowed with argument --epochs" in capsys.readouterr().err
