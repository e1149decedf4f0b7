"""Parsing of names with options, such as `synthetic:n=1000,shape=3x32x32`."""

from collections.abc import Callable, Mapping
from typing import Any

from mpitrain.errors import UsageError, nearest, suggestion


def parse_options(text: str, known: Mapping[str, Callable[[str], Any]], *, owner: str) -> dict[str, Any]:
    """Parse `key=value,key=value`.

    Args:
        text: The text after the colon, possibly empty.
        known: A parser for the value of each key, which raises `ValueError` for invalid text.
        owner: The text before the colon, for error messages.

    Returns:
        The values of the given keys only.
    """
    values: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        key, separator, value = item.partition("=")
        if not separator or key not in known:
            keys = f"write {owner}:key=value with a key of {', '.join(known)}" if known else f"write {owner}"
            close = nearest(key, known)
            way_out = f"did you mean {close}?" if close and close != key else keys
            raise UsageError(f"{owner} has no option '{item}': {way_out}")
        if key in values:
            raise UsageError(f"{owner} was given '{key}' twice: keep one of them")
        try:
            values[key] = known[key](value)
        except ValueError as error:
            raise UsageError(f"{owner} cannot use {key}={value}: {error}") from error
    return values


def positive(text: str) -> int:
    """Parse a whole number above zero."""
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise ValueError("a whole number above 0 is needed, such as 128")
    return int(text)


def sizes(text: str) -> tuple[int, ...]:
    """Parse positive whole numbers separated by x, such as `3x32x32`."""
    try:
        return tuple(positive(part) for part in text.split("x"))
    except ValueError:
        raise ValueError("whole numbers above 0 joined by x are needed, such as 256x128") from None


def choice(*names: str) -> Callable[[str], str]:
    """Return a function that accepts one of the given names."""

    def read(text: str) -> str:
        if text not in names:
            raise ValueError(suggestion(text, names))
        return text

    return read


def between(low: float, high: float) -> Callable[[str], float]:
    """Return a function that parses a number x with low <= x < high."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value < high:
            raise ValueError(f"a number of at least {low:g} and below {high:g} is needed")
        return value

    return read
