"""The interface of a logger, and the functions that its back-ends share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from mpitrain.records.durable import replace_text
from mpitrain.records.json_file import read_json

IDENTIFIERS = "loggers.json"
"""The file in a run folder with the identifiers that servers have given to the run."""


class Logger(Protocol):
    """An object that receives the numbers of a run. Only the lead, the first rank alive, calls it.

    Any object with these three methods is a logger.
    """

    def begin(self, config: Mapping[str, Any]) -> None:
        """Open the log. Called before the first ``log``, and again in a new object when a run is resumed.

        Args:
            config: The options of the run; values are JSON types.
        """

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers.

        Args:
            step: The step of the lead. It never decreases, except after a resume.
            values: The numbers by name, such as ``train/loss``. Calls may have different names.
        """

    def end(self, result: Mapping[str, Any] | None) -> None:
        """Close the log.

        Args:
            result: The result of the run, as in ``result.json``; None if an error has ended the run.
        """


def flat(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping as a flat one, with keys such as ``world.size``."""
    found: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def identifier(folder: Path | None, name: str) -> str | None:
    """Return the identifier that a back-end has stored in a run folder; None if there is none."""
    try:
        found = None if folder is None else read_json(folder / IDENTIFIERS).get(name)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, str) else None


def store_identifier(folder: Path | None, name: str, value: str) -> None:
    """Store the identifier of a run for its continuation; do nothing without a folder."""
    if folder is None:
        return
    try:
        known = read_json(folder / IDENTIFIERS)
    except (OSError, ValueError):
        known = {}
    if known.get(name) != value:
        replace_text(folder / IDENTIFIERS, json.dumps({**known, name: value}, indent=2) + "\n")
