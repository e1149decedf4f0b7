"""Runs as their folders record them.

    RUN/config.json  RUN/metrics.h5  RUN/result.json        the last one only when the run has finished

A run that is running or was killed is read as far as its metrics go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mpitrain.collectives.world.statistics import SHARES
from mpitrain.errors import UsageError, printable
from mpitrain.records.json_file import read_json
from mpitrain.records.metrics import Column, read_metrics


@dataclass(frozen=True)
class Run:
    """The contents of one run folder.

    Attributes:
        label: The name of the run in tables and plots.
        group: The name of the run's group. The runs of a group differ only in their seeds. Plots show the median and
            the range of a group.
        metrics: The tables of metrics, as `read_metrics` returns them.
        result: The contents of result.json; empty if the run has not finished.
        config: The contents of config.json.
    """

    label: str
    group: str
    metrics: Mapping[str, Mapping[str, Column]]
    result: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    def column(self, table: str, name: str) -> Column:
        """Return a column of the metrics; empty if the run does not have it."""
        return self.metrics.get(table, {}).get(name, np.empty(0))

    def curve(self, table: str, x: str, y: str) -> tuple[Column, Column]:
        """Return two columns of a table, sorted by x, without rows that are not finite."""
        a, b = self.column(table, x), self.column(table, y)
        if not (len(a) and len(b)):
            return np.empty(0), np.empty(0)
        finite = np.isfinite(a) & np.isfinite(b)
        order = np.argsort(a[finite], kind="stable")
        return a[finite][order], b[finite][order]

    def total(self, counter: str) -> float:
        """Return the largest value of a counter in the progress and evaluation tables; NaN if there is none."""
        values = np.concatenate([self.column(table, counter) for table in ("progress", "evaluation")])
        return float(np.nanmax(values)) if np.isfinite(values).any() else np.nan

    def facts(self) -> dict[str, str]:
        """Return the method, the data, the model and the number of ranks, as far as they are known."""
        options = self.config.get("config", {})
        options = options if isinstance(options, Mapping) else {}
        ranks = self.result.get("ranks", self.config.get("ranks"))
        known = {
            "algorithm": self.result.get("algorithm", self.config.get("algorithm")),
            "data": _base_name(options.get("data")),
            "model": _base_name(options.get("model")),
            "ranks": None if ranks is None else f"{ranks} rank{'s' * (ranks != 1)}",
        }
        return {name: printable(str(value)) for name, value in known.items() if value is not None}

    def shares(self) -> dict[str, float]:
        """Return the fractions of time for computing, exchanging and waiting; empty if they were not measured."""
        if self.result.get("shares"):
            return {name: float(self.result["shares"].get(name, 0)) for name in SHARES}
        seconds = self.column("progress", "seconds")
        weights = np.diff(seconds, prepend=0)
        shares = {}
        for name in SHARES:
            values = self.column("progress", f"{name}_share")
            known = np.isfinite(values) & (weights > 0) if len(values) else np.zeros(0, bool)
            if known.any():
                shares[name] = float(np.average(values[known], weights=weights[known]))
        return shares


def load_run(folder: Path, label: str | None = None) -> Run:
    """Return the run in `folder`.

    Raises:
        UsageError: The folder does not exist, does not contain a run, or contains a damaged file.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder: give the folder that `mpitrain train --out` was given")
    config, metrics, result = folder / "config.json", folder / "metrics.h5", folder / "result.json"
    if not (config.exists() or metrics.exists() or result.exists()):
        raise UsageError(
            f"{folder} holds no run (no config.json, metrics.h5 or result.json): give the folder of a run itself"
        )
    label = (label or folder.resolve().name).encode(errors="backslashreplace").decode()  # any bytes may be a name
    label = printable(label)
    return Run(label, label, read_metrics(metrics) if metrics.exists() else {}, _read_json(result), _read_json(config))


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """Return the runs in `folders`. The label of a run is the shortest unique end of its path."""
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise UsageError("a run was given twice: name each folder once")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return [load_run(folder, "/".join(path.parts[-depth:])) for folder, path in zip(folders, paths, strict=True)]


def _base_name(value: Any) -> str | None:
    """Return the name of a data set or a model: of a file without its folder."""
    return None if value is None else str(value).rpartition("/")[2]


NUMBERS = ("ranks", "seconds", "gradients", "bytes_sent", "test_accuracy", "test_loss")
TYPES: Mapping[str, Any] = {
    "algorithm": str,
    "settings": Mapping,
    "shares": Mapping,
    "config": Mapping,
    **dict.fromkeys(NUMBERS, (int, float)),
}
"""The types of the values that a report uses, by their names in config.json and result.json."""


def _check_types(content: Mapping[str, Any]) -> None:
    """Raise a ValueError if a value that a report uses is of another type."""
    for name, kind in TYPES.items():
        value = content.get(name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ValueError(f"{name} is a {type(value).__name__}")
    for name, value in (content.get("shares") or {}).items():
        if not isinstance(value, int | float):
            raise ValueError(f"the share {name} is a {type(value).__name__}")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = read_json(path)
        _check_types(content)
        return content
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} is damaged ({printable(str(error))}): remove it to report the run from its metrics"
        ) from error
