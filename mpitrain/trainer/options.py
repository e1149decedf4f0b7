"""Options declared as dataclass fields: default, help, type and range in one place.

    lr: float = option(0.05, "learning rate", parse=float, within=NON_NEGATIVE)

``mpitrain train``, ``mpitrain simulate`` and ``benchmarks/compare.py`` build their parsers from the fields
(``cli.options``); ``check_ranges`` also checks values that do not come from a command line.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mpitrain.errors import UsageError, unknown


@dataclass(frozen=True)
class Range:
    """The numbers that an option takes.

    Attributes:
        text: The range as it appears in a message: "must be TEXT".
        holds: Whether a number lies in it.
        finite: Whether infinity is refused. NaN always is.
    """

    text: str
    holds: Callable[[float], bool]
    finite: bool = True

    def __contains__(self, value: float) -> bool:
        return not math.isnan(value) and self.holds(value) and (math.isfinite(value) or not self.finite)


POSITIVE = Range("more than 0", lambda value: value > 0)
POSITIVE_OR_INFINITE = Range("more than 0", lambda value: value > 0, finite=False)
NON_NEGATIVE = Range("0 or more", lambda value: value >= 0)
AT_LEAST_ONE = Range("1 or more", lambda value: value >= 1)
BELOW_ONE = Range("at least 0 and below 1", lambda value: 0 <= value < 1)
UP_TO_ONE = Range("above 0 and at most 1", lambda value: 0 < value <= 1)


@dataclass(frozen=True)
class Option:
    """The declaration of an option by a field.

    Attributes:
        help: A phrase without a full stop; the default is added to it.
        parse: Converts the text of the command line; None for a switch, which takes no text.
        within: The numbers allowed.
        choices: The values allowed.
        checks_choices: Whether callers from Python are limited to the choices too.
        metavar: What the usage line shows in place of the value.
        default_text: The default in words, where the value does not say it.
        flag: The option's name, where it is not the field's.
        group: Options of the same group exclude each other.
        repeated: Whether the option may be given several times.
        collect: Turns the values of a repeated option into the field's value.
        replaceable: Whether a resumed run may be given another value: it does not change what the run computes.
        on_command_line: Whether there is such an option; otherwise the field is for callers from Python.
    """

    help: str
    parse: Callable[[str], Any] | None = str
    within: Range | None = None
    choices: Sequence[str] | None = None
    checks_choices: bool = True
    metavar: str | None = None
    default_text: str | None = None
    flag: str | None = None
    group: str | None = None
    repeated: bool = False
    collect: Callable[[list[Any]], Any] | None = None
    replaceable: bool = False
    on_command_line: bool = True


def option(default: Any, help: str, **declaration: Any) -> Any:
    """Return a dataclass field that declares an option.

    Args:
        default: The field's default; a dictionary is copied for each instance.
        help: See ``Option``.
        declaration: The other attributes of ``Option``.
    """
    metadata = {"option": Option(help, **declaration)}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def options_of(config: Any) -> dict[str, Option]:
    """Return the options that a dataclass, or an instance of one, declares, by field name."""
    ordered = sorted(dataclasses.fields(config), key=lambda field: field.kw_only is True)  # those of bases follow
    return {f.name: f.metadata["option"] for f in ordered if "option" in f.metadata}


def default_of(config: type[Any], name: str) -> Any:
    """Return the default of a field."""
    found = {f.name: f for f in dataclasses.fields(config)}[name]
    return found.default if found.default_factory is dataclasses.MISSING else found.default_factory()


def flag_of(name: str, declared: Option) -> str:
    """Return an option as it is typed: ``--batch-size`` for ``batch_size``."""
    return declared.flag or f"--{name.replace('_', '-')}"


def destination_of(name: str, declared: Option) -> str:
    """Return the attribute of parsed arguments that holds the option's value."""
    return flag_of(name, declared)[2:].replace("-", "_")


def check_ranges(config: Any) -> None:
    """Check every value of a configuration against the range and the choices of its option.

    Raises:
        UsageError: A value is outside; None never is.
    """
    for name, declared in options_of(config).items():
        value, flag = getattr(config, name), flag_of(name, declared)
        if value is None:
            continue
        if declared.within is not None and value not in declared.within:
            raise UsageError(f"{flag} must be {declared.within.text}, not {value:g}")
        if declared.choices is not None and declared.checks_choices and value not in declared.choices:
            raise UsageError(f"{flag}: {unknown('value', value, declared.choices)}")


def number_for_rank(form: str) -> Callable[[str], tuple[int, float]]:
    """Return a parser of a rank and a number with a colon between them.

    Args:
        form: The form and an example, for the message to a user who gave something else.
    """

    def parse(text: str) -> tuple[int, float]:
        rank, _, number = text.partition(":")
        try:
            return int(rank), float(number)
        except ValueError:
            raise UsageError(f"must be {form}, not {text!r}") from None

    return parse


straggler = number_for_rank("RANK:FACTOR, such as 1:4")


def pairs(flag: str, example: str) -> Callable[[Sequence[str]], dict[str, str]]:
    """Return a function that turns ``["key=value", ...]`` into a dictionary.

    It raises a UsageError for a text without a key or an equals sign.

    Args:
        flag, example: The option and a value of it, for the message.
    """

    def parse(texts: Sequence[str]) -> dict[str, str]:
        found = {}
        for text in texts:
            key, equals, value = text.partition("=")
            if not equals or not key:
                raise UsageError(f"{flag} takes KEY=VALUE, such as {flag} {example}, not {text!r}")
            found[key.strip()] = value.strip()
        return found

    return parse


parse_settings = pairs("--set", "period=10")


def values_of(given: Mapping[str, Any], config: type[Any], names: Sequence[str] | None = None) -> dict[str, Any]:
    """Return the fields of a dataclass among the values that a command line gave.

    Args:
        given: Values by the names of ``destination_of``; None stands for an option that was not given.
        config: The dataclass.
        names: The fields to return; all by default.
    """
    values = {}
    for name, declared in options_of(config).items():
        value = given.get(destination_of(name, declared))
        if value is None or (names is not None and name not in names):
            continue
        values[name] = value if declared.collect is None else declared.collect(value)
    return values
