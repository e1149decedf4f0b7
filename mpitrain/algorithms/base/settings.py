"""The hyper-parameters of a method: dataclass fields that know how to parse, check and describe their values.

period: int = integer(10, "tau, local steps between exchanges", low=1)
rho: float | None = number(None, "elastic coefficient", low=0, optional=True)
order: str = choice("jacobi", "whose new value the other side sees", ORDERS)
synchronous: bool = boolean(False, "all workers exchange at once")
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from mpitrain.errors import UsageError, nearest, suggestion

BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@dataclass(frozen=True, kw_only=True)
class Setting(ABC):
    """The declaration of a setting of a method.

    Attributes:
        default: The default, usually the value in the paper.
        help: A description in one line, with the symbol of the paper.
        optional: Whether None is valid.
    """

    default: Any
    help: str
    optional: bool = False

    def parse(self, text: str) -> Any:
        """Return the value that a text from the command line stands for; ``none`` stands for None.

        Raises:
            ValueError: The text is not a value of this type. The message reads "must be ...".
        """
        if self.optional and text.lower() == "none":
            return None
        try:
            return self._parsed(text)
        except (ValueError, KeyError):
            raise ValueError(f"must be {self._kind}, not {text!r}") from None

    def check(self, value: Any) -> None:
        """Check a value.

        Raises:
            ValueError: The value has the wrong type or is out of range. The message reads "must be ...".
        """
        if not (self._accepts(value) or (value is None and self.optional)):
            raise ValueError(f"must be {self._wanted()}, not {value!r}{self._hint(value)}")

    @abstractmethod
    def describe(self) -> str:
        """Return a description of the valid values."""

    _kind: ClassVar[str]

    @abstractmethod
    def _parsed(self, text: str) -> Any:
        """Return the value of a text, or raise ValueError or KeyError."""

    @abstractmethod
    def _accepts(self, value: Any) -> bool:
        """Whether a value other than None has the right type and range."""

    def _wanted(self) -> str:
        return self.describe()

    def _hint(self, value: Any) -> str:
        """Return what may have been meant, at the end of the message."""
        return ""


@dataclass(frozen=True, kw_only=True)
class Bounded(Setting):
    """A setting that is a number in a range.

    Attributes:
        low, high: The smallest and the largest valid value; None without such a bound.
        above, below: Bounds that are not valid themselves: every valid value is greater than ``above`` and less than
            ``below``. None without such a bound.
    """

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None

    _types: ClassVar[tuple[type, ...]]

    def describe(self) -> str:
        """Return the type and the bounds."""
        bounds = [
            f" {relation} {bound:g}"
            for bound, relation in ((self.low, ">="), (self.above, ">"), (self.high, "<="), (self.below, "<"))
            if bound is not None
        ]
        return self._kind + " and".join(bounds)

    def _accepts(self, value: Any) -> bool:
        return (
            isinstance(value, self._types)
            and not isinstance(value, bool)
            and math.isfinite(value)  # type: ignore[arg-type]
            and (self.low is None or value >= self.low)  # type: ignore[operator]
            and (self.high is None or value <= self.high)  # type: ignore[operator]
            and (self.above is None or value > self.above)  # type: ignore[operator]
            and (self.below is None or value < self.below)  # type: ignore[operator]
        )


@dataclass(frozen=True, kw_only=True)
class Integer(Bounded):
    """A setting that is a whole number."""

    _kind: ClassVar[str] = "a whole number"
    _types: ClassVar[tuple[type, ...]] = (int,)

    def _parsed(self, text: str) -> int:
        return int(text)


@dataclass(frozen=True, kw_only=True)
class Number(Bounded):
    """A setting that is a finite real number."""

    _kind: ClassVar[str] = "a number"
    _types: ClassVar[tuple[type, ...]] = (int, float)

    def _parsed(self, text: str) -> float:
        return float(text)


@dataclass(frozen=True, kw_only=True)
class Boolean(Setting):
    """A setting that is true or false."""

    _kind: ClassVar[str] = "true or false"

    def describe(self) -> str:
        """Return a description of both values."""
        return self._kind

    def _parsed(self, text: str) -> bool:
        return BOOLEANS[text.lower()]

    def _accepts(self, value: Any) -> bool:
        return isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class Choice(Setting):
    """A setting with a few words as valid values.

    Attributes:
        choices: The words.
    """

    choices: tuple[str, ...]

    _kind: ClassVar[str] = "a word"

    def describe(self) -> str:
        """Return the valid words, as text."""
        return " | ".join(self.choices)

    def _parsed(self, text: str) -> str:
        return text

    def _accepts(self, value: Any) -> bool:
        return value in self.choices

    def _wanted(self) -> str:
        return f"one of {', '.join(self.choices)}"

    def _hint(self, value: Any) -> str:
        close = nearest(value, self.choices) if isinstance(value, str) else None
        return f": did you mean {close}?" if close else ""


def integer(
    default: int | None, help: str, *, low: int | None = None, high: int | None = None, optional: bool = False
) -> Any:
    """Declare a setting that is a whole number; see ``Setting`` and ``Bounded`` for the arguments."""
    return _field(Integer(default=default, help=help, optional=optional, low=low, high=high))


def number(
    default: float | None,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    optional: bool = False,
) -> Any:
    """Declare a setting that is a real number; see ``Setting`` and ``Bounded`` for the arguments."""
    bounds = {"low": low, "high": high, "above": above, "below": below}
    return _field(Number(default=default, help=help, optional=optional, **bounds))


def boolean(default: bool, help: str) -> Any:
    """Declare a setting that is true or false; see ``Setting`` for the arguments."""
    return _field(Boolean(default=default, help=help))


def choice(default: str, help: str, choices: Sequence[str]) -> Any:
    """Declare a setting with a few words as valid values; see ``Setting`` and ``Choice`` for the arguments."""
    return _field(Choice(default=default, help=help, choices=tuple(choices)))


def settings_of(declaring: Any) -> dict[str, Setting]:
    """Return the settings that a dataclass (or an instance of one) declares, by name."""
    fields = dataclasses.fields(declaring)
    return {field.name: field.metadata["setting"] for field in fields if "setting" in field.metadata}


def check_settings(declared: Any, name: str) -> None:
    """Check the values of all settings of an instance.

    Args:
        declared: An instance of a dataclass that declares settings.
        name: The name of the instance for the message.

    Raises:
        UsageError: A value is invalid; the message names the first invalid value.
    """
    for key, setting in settings_of(declared).items():
        try:
            setting.check(getattr(declared, key))
        except ValueError as refused:
            raise UsageError(f"{name}: {key} {refused}") from None


def values_of_texts(declaring: type[Any], name: str, texts: Mapping[str, str]) -> dict[str, Any]:
    """Convert settings from text on the command line to values.

    Args:
        declaring: The dataclass that declares the settings.
        name: The name of the dataclass for messages.
        texts: The settings, for example ``{"period": "10"}``.

    Raises:
        UsageError: A setting does not exist, or a text is not a valid value.
    """
    declared, values = settings_of(declaring), {}
    for key, text in texts.items():
        if key not in declared:
            raise UsageError(f"{name} has no setting {key!r}: {suggestion(key, declared)}")
        try:
            values[key] = declared[key].parse(text)
        except ValueError as refused:
            raise UsageError(f"{name}: {key} {refused}") from None
    return values


def _field(setting: Setting) -> Any:
    return dataclasses.field(default=setting.default, metadata={"setting": setting})


def literal(text: str) -> Any:
    """Return the value of a Python literal, such as ``0.9`` or ``(0.9, 0.95)``; return any other text unchanged."""
    try:
        return ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text.lower(), text))
    except (ValueError, SyntaxError):
        return text


def settings_taken(function: Any, path: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Check that an imported function accepts these settings as keywords, and return the settings.

    Raises:
        UsageError: The function does not accept a setting; the message names the first one.
    """
    try:
        parameters = inspect.signature(function).parameters
    except ValueError as error:  # implemented in C
        raise UsageError(f"{path} has no inspectable signature: wrap it in Python") from error
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        names = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        for key in settings:
            if key not in names:
                raise UsageError(f"{path} has no setting {key!r}: {suggestion(key, names)}")
    return dict(settings)
