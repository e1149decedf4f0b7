"""Completion of commands, options and values in shells, through argcomplete.

    pip install 'mpitrain[completion]'
    eval "$(register-python-argcomplete mpitrain)"        in ~/.bashrc or ~/.zshrc

The shell calls ``mpitrain`` with the variable ``_ARGCOMPLETE`` and the line so far.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
from collections.abc import Callable, Mapping
from typing import Any

from mpitrain.cli.options import Parser
from mpitrain.trainer.data_options import BUILT_IN

VARIABLE = "_ARGCOMPLETE"


def is_requested() -> bool:
    """Return whether a shell asks for completions."""
    return VARIABLE in os.environ


def complete(parser: Parser, commands: Mapping[str, argparse.ArgumentParser]) -> None:
    """Print the completions of the line so far, and exit.

    Args:
        parser: The parser of the program.
        commands: The parser of each command, without its options.
    """
    try:
        import argcomplete
    except ImportError:
        raise SystemExit(1) from None
    name = typed_command(os.environ.get("COMP_LINE", ""), commands)
    if name is not None:
        importlib.import_module(f"mpitrain.cli.{name}").add_arguments(commands[name])
        _add_values(commands[name], argcomplete.completers.FilesCompleter)
    argcomplete.autocomplete(parser)


def typed_command(line: str, commands: Mapping[str, Any]) -> str | None:
    """Return the command in a line; None if there is none yet."""
    try:
        words = shlex.split(line)
    except ValueError:  # a quote is still open
        words = line.split()
    return next((word for word in words[1:] if word in commands), None)


def _add_values(parser: argparse.ArgumentParser, files: Callable[..., Any]) -> None:
    """Attach the values that an option can have and that its declaration does not list."""
    known = {"algorithm": algorithms, "model": model_names, "data": lambda: list(BUILT_IN)}
    for action in parser._actions:
        names = known.get(action.dest)
        if names is not None:
            of_files = files(("h5",)) if action.dest == "data" else None
            action.completer = _completer(names, of_files)  # type: ignore[attr-defined]


def _completer(names: Callable[[], list[str]], files: Any) -> Callable[..., list[str]]:
    """Return a function that lists names, and files if there may be some."""

    def values(prefix: str, **context: Any) -> list[str]:
        found = [name for name in names() if name.startswith(prefix)]
        return found if files is None else [*found, *files(prefix, **context)]

    return values


def algorithms() -> list[str]:
    """Return the names of all methods."""
    from mpitrain.algorithms import METHODS

    return list(METHODS)


def model_names() -> list[str]:
    """Return the names of the models that come with mpitrain."""
    from mpitrain import models

    return list(models.MODELS)
