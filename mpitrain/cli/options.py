"""Command-line options built from the options that dataclasses declare (``trainer.options``)."""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mpitrain.cli.failure import fail
from mpitrain.errors import UsageError, nearest, unknown
from mpitrain.trainer.options import Option, default_of, flag_of, options_of


class Parser(argparse.ArgumentParser):
    """An argument parser that reports an error as one line, on one rank.

    The parser of a sub-command refuses unknown options itself, so that the message refers to the help of the
    sub-command.
    """

    _words: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse arguments, and report an unknown one as an error."""
        self._words = [str(word) for word in (sys.argv[1:] if args is None else args)]
        found, unknown_words = super().parse_known_args(args, namespace)
        if unknown_words:
            word = unknown_words[0]
            close = nearest(word.partition("=")[0], self._option_string_actions) if word.startswith("--") else None
            self.error(
                f"unrecognized arguments: {' '.join(unknown_words)}{f': did you mean {close}?' if close else ''}"
            )
        return found, []

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, unknown("value", str(value), map(str, action.choices)))

    def error(self, message: str) -> Any:
        """Print an error, and exit with code 2."""
        raise SystemExit(fail(f"{message}{self._dash_hint(message)} (see {self.prog} --help)", on_all_ranks=True))

    def _dash_hint(self, message: str) -> str:
        """Return how to pass a value that begins with a dash, if the message is about one; otherwise nothing."""
        if message.endswith("expected one argument"):
            for word, value in itertools.pairwise(self._words):
                if f"argument {word}:" in message and value.startswith("-"):
                    return f": for a value that begins with a dash, write {word}={shlex.quote(value)}"
        if message.startswith("the following arguments are required"):
            unknown_words = [word for word in self._words if word.startswith("-") and not self._is_option(word)]
            if unknown_words:
                return f": write -- before values that begin with a dash, as in -- {shlex.quote(unknown_words[0])}"
        return ""

    def _is_option(self, word: str) -> bool:
        return word.partition("=")[0] in self._option_string_actions


def add_options(
    parser: argparse.ArgumentParser,
    config: type[Any],
    names: Sequence[str] | None = None,
    *,
    help: Mapping[str, str] | None = None,
    keep_defaults: bool = False,
    sections: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Add the options that a dataclass declares.

    Args:
        parser: The parser. The options of a mutually exclusive group may come from several dataclasses.
        config: The dataclass.
        names: The fields to add, in this order; all by default.
        help: Help texts that replace the declared ones, by field name.
        keep_defaults: Whether an option that is not given has the default of the field. Otherwise it is None, so that a
            resumed run can tell that the option was not given.
        sections: The fields under each heading of the help. Other options are under the parser's own heading.
    """
    declared = options_of(config)
    places = {name: heading for heading, fields in (sections or {}).items() for name in fields}
    for name in declared if names is None else names:
        option = declared[name]
        if option.on_command_line:
            default = default_of(config, name)
            section = parser if name not in places else _section(parser, places[name])
            place = section if option.group is None else _group(parser, option.group, section)
            text = f"{(help or {}).get(name, option.help)}{_default_text(option, default)}"
            place.add_argument(
                flag_of(name, option), help=text, **_keywords(option, default if keep_defaults else None)
            )


def _group(parser: argparse.ArgumentParser, name: str, section: Any) -> Any:
    """Return the parser's mutually exclusive group of this name, and create it in a section on first use."""
    groups = parser.__dict__.setdefault("exclusive_groups", {})
    if name not in groups:
        groups[name] = section.add_mutually_exclusive_group()
    return groups[name]


def _section(parser: argparse.ArgumentParser, heading: str) -> Any:
    """Return the parser's section of the help under a heading, and create it on first use."""
    sections = parser.__dict__.setdefault("sections", {})
    if heading not in sections:
        sections[heading] = parser.add_argument_group(heading)
    return sections[heading]


def _keywords(option: Option, default: Any) -> dict[str, Any]:
    """Return the arguments of ``add_argument`` for an option."""
    if option.parse is None:
        return {"action": argparse.BooleanOptionalAction, "default": default}
    keywords: dict[str, Any] = {"type": _reporting(option.parse), "metavar": option.metavar}
    if option.choices is not None:
        keywords["choices"] = option.choices
    if option.repeated:
        return {**keywords, "action": "append", "default": None if default is None else list(default)}
    return {**keywords, "default": default}


def _reporting(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Wrap ``parse`` so that argparse reports the text of a UsageError; return types such as ``int`` unchanged."""
    if isinstance(parse, type):
        return parse

    def parse_argument(text: str) -> Any:
        try:
            return parse(text)
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse_argument


def _default_text(option: Option, default: Any) -> str:
    """Return the part of a help text that states the default."""
    if option.default_text is not None:
        return f" (default: {option.default_text})"
    if default is None or option.parse is None or option.repeated:
        return ""
    return f" (default: {default:g})" if isinstance(default, (int, float)) else f" (default: {default})"
