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
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from mpitrain.errors import UsageError, unknown


@dataclass(frozen=True)
class Range:
    """The valid numbers of an option.

    Attributes:
        text: The range, in words that follow "must be" in a message.
        holds: A function that returns whether a number lies in the range.
        finite: Whether infinity is refused. NaN is always refused.
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
        parse: A function that converts the text of the command line; None for a switch without a value.
        within: The valid numbers.
        choices: The valid values.
        checks_choices: Whether values from Python code must also be among the choices.
        metavar: The placeholder for the value in the usage line.
        default_text: The default in words, if the value alone is not clear.
        flag: The name of the option, if it differs from that of the field.
        group: The name of a group of options of which only one may be given.
        repeated: Whether the option may be given several times.
        collect: A function that converts the values of a repeated option to the value of the field.
        replaceable: Whether a resumed run may have a different value, because it does not affect the result.
        on_command_line: Whether the option exists on the command line. If not, only Python code can set the field.
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
    """Return the options that a dataclass (or an instance) declares, by field name."""
    ordered = sorted(dataclasses.fields(config), key=lambda field: field.kw_only is True)  # those of bases follow
    return {f.name: f.metadata["option"] for f in ordered if "option" in f.metadata}


def default_of(config: type[Any], name: str) -> Any:
    """Return the default of a field."""
    found = {f.name: f for f in dataclasses.fields(config)}[name]
    return found.default if found.default_factory is dataclasses.MISSING else found.default_factory()


def flag_of(name: str, declared: Option) -> str:
    """Return the flag of an option, such as ``--batch-size`` for ``batch_size``."""
    return declared.flag or f"--{name.replace('_', '-')}"


def destination_of(name: str, declared: Option) -> str:
    """Return the name of the attribute of ``argparse``'s result that holds the value of an option."""
    return flag_of(name, declared)[2:].replace("-", "_")


def check_ranges(config: Any) -> None:
    """Check every value of a configuration against the range and the choices of its option.

    Raises:
        UsageError: A value is invalid. None is always valid.
    """
    for name, declared in options_of(config).items():
        value, flag = getattr(config, name), flag_of(name, declared)
        if value is None:
            continue
        if declared.within is not None and value not in declared.within:
            raise UsageError(f"{flag} must be {declared.within.text}, not {value:g}")
        if declared.choices is not None and declared.checks_choices and value not in declared.choices:
            raise UsageError(f"{flag}: {unknown('value', value, declared.choices)}")


def check_types(document: Any, config: type[Any]) -> None:
    """Check that the values of a JSON object have the types of the fields of a dataclass.

    Raises:
        TypeError: A value has another type, or a name is not a field; the message names the first one.
    """
    if not isinstance(document, Mapping):
        raise TypeError(f"the options are a {type(document).__name__}, not an object")
    hints = get_type_hints(config)
    for name, value in document.items():
        if name not in hints:
            raise TypeError(f"there is no option {name!r}")
        if not _is_of_type(value, hints[name]):
            raise TypeError(f"{name} is {str(value)[:40]!r}, which is not of type {config.__annotations__[name]}")


def _is_of_type(value: Any, hint: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_is_of_type(value, part) for part in parts)
    if origin is tuple:
        if not isinstance(value, list | tuple) or (Ellipsis not in parts and len(value) != len(parts)):
            return False
        return all(_is_of_type(item, parts[0 if Ellipsis in parts else k]) for k, item in enumerate(value))
    if origin is not None:
        return isinstance(value, Mapping) and all(
            _is_of_type(item, part) for pair in value.items() for item, part in zip(pair, parts, strict=True)
        )
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is hint


def number_for_rank(form: str) -> Callable[[str], tuple[int, float]]:
    """Return a function that parses ``RANK:NUMBER``.

    Args:
        form: The form and an example, for the error message.
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
        flag, example: The option and a valid value, for the message.
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
    """Return the values from a command line that belong to the fields of a dataclass.

    Args:
        given: The values by the names of ``destination_of``. None means that the option was not given.
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
