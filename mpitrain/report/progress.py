"""The present state of a run, from the files in its folder: running, finished or interrupted."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpitrain.collectives.world.statistics import SHARES
from mpitrain.errors import printable
from mpitrain.records.lock_file import is_held
from mpitrain.records.metrics import Column
from mpitrain.report import text
from mpitrain.report.runs import Run, load_run
from mpitrain.trainer.objective_options import metric_in_words

RECENT_SECONDS = 10.0
"""Rates are means over this time of training."""

STATES = ("running", "finished", "interrupted")


@dataclass(frozen=True)
class Snapshot:
    """The state of a run at one moment. Numbers that are not known are NaN.

    Attributes:
        title: The run, and its method, data, model and ranks.
        state: One of ``STATES``.
        done: The part of the budget that is used up, from 0 to 1.
        remaining_seconds: The time until the end at the recent pace.
        numbers: Names and values, in the order in which they are shown.
        rates: (p,) the recent steps per second of each rank.
        waiting: (p,) the recent fraction of its time that each rank has waited.
        alive: (p,) whether each rank is alive.
    """

    title: str
    state: str
    done: float
    remaining_seconds: float
    numbers: dict[str, str]
    rates: Column
    waiting: Column
    alive: Column

    def line(self) -> str:
        """Return the snapshot in one line, without the ranks."""
        known = ", ".join(f"{name} {value}" for name, value in self.numbers.items() if value != "-")
        done = "" if math.isnan(self.done) else f" {self.done:.0%}"
        return f"{self.title}: {self.state}{done}, {known}"


def snapshot(folder: Path) -> Snapshot:
    """Return the state of the run in a folder.

    Raises:
        UsageError: The folder holds no run, or a file in it is damaged.
    """
    held = is_held(folder)  # before the result: a run that ends in between is not taken for an interrupted one
    run = load_run(folder)
    state = "finished" if run.result else "running" if held else "interrupted"
    done = 1.0 if run.result.get("complete") else _last(run.column("progress", "done"))
    alive, rates, waiting = _ranks(run)
    remaining = _remaining(run) if state == "running" else math.nan
    title = f"{run.label} ({', '.join(run.facts().values())})" if run.facts() else run.label
    return Snapshot(title, state, done, remaining, _numbers(run, folder, alive, remaining), rates, waiting, alive)


def _numbers(run: Run, folder: Path, alive: Column, remaining: float) -> dict[str, str]:
    """Return the numbers of a run as texts."""
    seconds = _last(run.column("progress", "seconds"))
    shares = {name: _last(run.column("progress", f"{name}_share")) for name in SHARES}
    spent = ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if not math.isnan(share))
    return {
        "time": _formatted(seconds, text.duration),
        "ETA": _formatted(remaining, text.duration),
        "step": _formatted(_last(run.column("progress", "step")), "{:,.0f}".format),
        "loss": _formatted(_last(run.column("progress", "loss")), "{:.4f}".format),
        "test loss": _formatted(_last(run.column("evaluation", "test_loss")), "{:.4f}".format),
        "test metric": _metric(run),
        "learning rate": _formatted(_last(run.column("progress", "learning_rate")), "{:.3g}".format),
        "samples/s": _formatted(_pace(run, "samples"), "{:,.0f}".format),
        "shares": spent or "-",
        "staleness": _staleness(run),
        "ranks alive": f"{int(alive.sum())} of {alive.size}" if alive.size else "-",
        "last checkpoint": _checkpoint(folder),
    }


def _formatted(value: float, form: Any) -> str:
    return "-" if math.isnan(value) else str(form(value))


def _last(values: Column) -> float:
    """Return the last finite value; NaN if there is none."""
    finite = values[np.isfinite(values)] if values.ndim == 1 else values[:0]
    return float(finite[-1]) if finite.size else math.nan


def _metric(run: Run) -> str:
    value = _last(run.column("evaluation", "test_metric"))
    if math.isnan(value):
        return "-"
    options = run.config.get("config") or {}
    name = run.result.get("metric") or options.get("metric")
    if not isinstance(name, str):
        has_classes = not math.isnan(_last(run.column("evaluation", "test_accuracy")))
        name = "accuracy" if has_classes else "mae"
    return printable(metric_in_words(name, value))


def _staleness(run: Run) -> str:
    """Return the median number of updates by others between two visits of a worker to the center."""
    rows = run.column("staleness", "histogram")
    if rows.ndim != 2 or not len(rows) or not np.nansum(rows[-1]):
        return "-"
    counts = np.nan_to_num(rows[-1])
    median = int(np.searchsorted(np.cumsum(counts), counts.sum() / 2))
    return f"median {'more than ' * (median == counts.size - 1)}{median - (median == counts.size - 1)}"


def _pace(run: Run, counter: str) -> float:
    """Return the recent growth of a counter per second of training."""
    seconds, values = run.curve("progress", "seconds", counter)
    if seconds.size < 2:
        return math.nan
    at = _recent(seconds)
    span = seconds[-1] - seconds[at]
    return float((values[-1] - values[at]) / span) if span > 0 else math.nan


def _recent(seconds: Column) -> int:
    """Return the row from which recent rates are computed, given the sorted times of all rows."""
    return min(int(np.searchsorted(seconds, seconds[-1] - RECENT_SECONDS)), seconds.size - 2)


def _remaining(run: Run) -> float:
    pace, done = _pace(run, "done"), _last(run.column("progress", "done"))
    return max(1 - done, 0.0) / pace if pace > 0 else math.nan


def _ranks(run: Run) -> tuple[Column, Column, Column]:
    """Return of each rank whether it is alive, its recent steps per second and its recent share of waiting: (p,)."""
    seconds, alive = run.column("ranks", "seconds"), run.column("ranks", "alive")
    steps, waits = run.column("ranks", "steps"), run.column("ranks", "waiting_seconds")
    if not len(seconds) or not (steps.ndim == waits.ndim == alive.ndim == 2):
        return np.empty(0), np.empty(0), np.empty(0)
    lives = np.nan_to_num(alive[-1]) > 0
    known = np.isfinite(alive[-1])  # a run that was continued on fewer ranks has rows for more
    if len(seconds) == 1:
        span, done, waited = seconds[-1], steps[-1], waits[-1]
    else:
        at = _recent(seconds)
        span, done, waited = seconds[-1] - seconds[at], steps[-1] - steps[at], waits[-1] - waits[at]
    if not span > 0:
        return lives[known].astype(float), np.full(known.sum(), np.nan), np.full(known.sum(), np.nan)
    return lives[known].astype(float), done[known] / span, np.clip(waited[known] / span, 0, 1)


def _checkpoint(folder: Path) -> str:
    """Return the step and the age of the newest checkpoint."""
    found: Sequence[Path] = sorted((folder / "checkpoints").glob("step-*"))
    if not found:
        return "-"
    number = found[-1].name.removeprefix("step-")
    try:
        age = max(time.time() - found[-1].stat().st_mtime, 0.0)
    except OSError:
        return "-"
    return f"step {int(number):,}, {text.duration(age)} ago" if number.isdigit() else "-"
