"""What a run left in its folder: its tables, its result, and the few numbers that sum it up.

    RUN/config.json  RUN/metrics.h5  RUN/result.json        the last one only when the run has finished

A run that goes on, or was killed, is read as far as it came.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mpitrain.collectives.world.statistics import SHARES
from mpitrain.errors import UsageError
from mpitrain.records.metrics import Column, read_metrics


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        label: what it is called in tables and plots.
        group: runs of one group are one method with several seeds; plots draw them as their median and range.
        metrics: table -> field -> column, as `read_metrics` returns it.
        result: the contents of result.json; empty if the run has not finished.
        config: the contents of config.json.
    """

    label: str
    group: str
    metrics: Mapping[str, Mapping[str, Column]]
    result: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    def column(self, table: str, name: str) -> Column:
        """A column of the metrics; empty where the run has none."""
        return self.metrics.get(table, {}).get(name, np.empty(0))

    def curve(self, table: str, x: str, y: str) -> tuple[Column, Column]:
        """Two columns of one table, in the order of x, without the rows where either is not finite."""
        a, b = self.column(table, x), self.column(table, y)
        if not (len(a) and len(b)):
            return np.empty(0), np.empty(0)
        finite = np.isfinite(a) & np.isfinite(b)
        order = np.argsort(a[finite], kind="stable")
        return a[finite][order], b[finite][order]

    def total(self, counter: str) -> float:
        """How far a column that counts up came in the progress or evaluation table; NaN if there is none."""
        values = np.concatenate([self.column(table, counter) for table in ("progress", "evaluation")])
        return float(np.nanmax(values)) if np.isfinite(values).any() else np.nan

    def shares(self) -> dict[str, float]:
        """Which share of the time went where, over the whole run; empty if nobody measured it."""
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
    """The run in `folder`.

    Raises:
        UsageError: if there is no such folder, if it holds no run, or if a file in it is damaged.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder: give the folder that `mpitrain train --out` was given")
    config, metrics, result = folder / "config.json", folder / "metrics.h5", folder / "result.json"
    if not (config.exists() or metrics.exists() or result.exists()):
        raise UsageError(
            f"{folder} holds no run (no config.json, metrics.h5 or result.json): give the folder of a run itself"
        )
    label = label or folder.resolve().name
    return Run(label, label, read_metrics(metrics) if metrics.exists() else {}, _read_json(result), _read_json(config))


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in `folders`, labelled with as much of the end of each path as tells them apart."""
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise UsageError("a run was given twice: name each folder once")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return [load_run(folder, "/".join(path.parts[-depth:])) for folder, path in zip(folders, paths, strict=True)]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is damaged ({error}): remove it to report the run from its metrics") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} does not hold a JSON object: remove it to report the run from its metrics")
    return content


def summarise(run: Run) -> dict[str, Any]:
    """The numbers of one row of the report; None where the run does not say."""
    result = run.result
    _, accuracies = run.curve("evaluation", "seconds", "test_accuracy")
    _, losses = run.curve("evaluation", "seconds", "test_loss")
    seconds = _number(result.get("seconds", run.total("seconds")))
    gradients = _number(result.get("gradients", run.total("gradients")))
    sent_bytes = _number(result.get("bytes_sent", run.total("bytes")))
    final_accuracy = _number(result.get("test_accuracy", accuracies[-1] if len(accuracies) else None))
    seen_accuracies = [*accuracies, *([] if final_accuracy is None else [final_accuracy])]
    return {
        "run": run.label,
        "finished": bool(result),
        "algorithm": result.get("algorithm", run.config.get("algorithm")),
        "settings": result.get("settings", run.config.get("settings", {})),
        "ranks": result.get("ranks", run.config.get("ranks")),
        "test_accuracy": final_accuracy,
        "best_test_accuracy": _number(max(seen_accuracies, default=None)),
        "test_loss": _number(result.get("test_loss", losses[-1] if len(losses) else None)),
        "seconds": seconds,
        "gradients": gradients,
        "gradients_per_second": gradients / seconds if gradients is not None and seconds else None,
        "bytes_per_gradient": sent_bytes / gradients if sent_bytes is not None and gradients else None,
        "waiting_share": _number(run.shares().get("waiting")),
        "exchanges": _number(run.total("exchanges")),
        "lock_wait_seconds": _number(run.total("lock_wait_seconds")),
    }


def _number(value: Any) -> float | None:
    return float(value) if value is not None and np.isfinite(value) else None


Curve = tuple[Sequence[float] | Column, Sequence[float] | Column]


def temporal_efficiency(a: Curve, b: Curve) -> float:
    """How much more of a rising metric run a had over time than run b (Hermans, CERN-THESIS-2017-103).

        E(a, b) = int_0^m f_a dt / int_0^m f_b dt,    m = min(T_a, T_b),    f(0) = the first measured value

    Both integrals are exact for the straight lines between the measurements.

    Args:
        a: seconds, rising, and the metric (an accuracy) at each.
        b: the same of the other run.

    Raises:
        ValueError: for an empty curve, and where b has nothing to compare with.
    """
    if not (len(a[0]) and len(b[0])):
        raise ValueError("temporal efficiency needs at least one measurement of each run")
    m = min(float(a[0][-1]), float(b[0][-1]))
    denominator = _area(b, m)
    if not denominator > 0:
        raise ValueError("temporal efficiency needs a run b whose metric is above 0 for some time")
    return _area(a, m) / denominator


def _area(curve: Curve, m: float) -> float:
    """int_0^m of the straight lines through `curve`."""
    t, f = np.asarray(curve[0], dtype=np.float64), np.asarray(curve[1], dtype=np.float64)
    stamps = np.unique(np.concatenate([[0.0, m], t[(t > 0) & (t < m)]]))
    return float(np.trapezoid(np.interp(stamps, t, f), stamps))
