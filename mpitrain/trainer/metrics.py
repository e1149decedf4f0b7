"""The hook that stores totals and evaluations in ``RUN/metrics.h5``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpitrain.collectives.world.statistics import DISTANCE_BINS, SHARES, STALENESS_BINS
from mpitrain.errors import UsageError, reason
from mpitrain.log import logger
from mpitrain.records.metrics import FAILURES, MetricsWriter
from mpitrain.trainer.counters import HISTOGRAMS, METHOD_PREFIX, Totals
from mpitrain.trainer.run import Hook, Point, Run

PER_WORKER = ("workers", "method", "ranks")
"""The tables whose entries have one element per rank."""

SECONDS_BETWEEN_RANKS = 1.0
RANKS_PER_SECOND = 100
"""The table of the ranks gets a row a second, and fewer rows in a job of more ranks than this."""


def tables(n_workers: int, metrics: Sequence[str]) -> dict[str, list[Any]]:
    """Return the fields of each table in ``metrics.h5``.

    Args:
        n_workers: The number of ranks.
        metrics: Names of the method's own metrics of each worker.
    """
    return {
        "progress": [
            *(
                "seconds",
                "step",
                "gradients",
                "samples",
                "bytes",
                "loss",
                "learning_rate",
                "samples_per_second",
                "done",
            ),
            *(f"{name}_share" for name in SHARES),
            *("n_nonfinite", "n_clipped", "exchanges", "lock_wait_seconds"),
            *("consensus_distance", "elastic_energy"),
        ],
        "evaluation": ["seconds", "step", "gradients", "bytes", "epoch", "test_loss", "test_accuracy", "test_metric"],
        # Sums over all workers; the table below has each worker's own.
        "staleness": ["seconds", ("histogram", (STALENESS_BINS,)), ("distance", (DISTANCE_BINS,))],
        "ranks": ["seconds", *((name, (n_workers,)) for name in ("steps", "waiting_seconds", "alive"))],
        "workers": [
            "seconds",
            *((name, (n_workers,)) for name in ("steps", "bytes", "exchanges", "lock_wait_seconds", "waiting_seconds")),
            *((name, (n_workers, bins)) for name, bins in HISTOGRAMS.items()),
        ],
        **({"method": ["seconds", *((name, (n_workers,)) for name in metrics)]} if metrics else {}),
    }


class MetricsFile(Hook):
    """The hook that writes ``metrics.h5``. Only the lead (the first rank alive) writes, and only in a run folder.

    Args:
        run_folder: The folder of the run.
        wanted: The tables, from ``tables``.
        metrics: Names of the method's own metrics.
        continue_from: The training time of the checkpoint to resume, in seconds. Later rows are removed.
    """

    def __init__(
        self,
        run_folder: Path | None,
        wanted: dict[str, list[Any]],
        metrics: Sequence[str] = (),
        continue_from: float | None = None,
    ) -> None:
        self._path = None if run_folder is None else run_folder / "metrics.h5"
        self._wanted, self._names, self._continue_from = wanted, tuple(metrics), continue_from
        self._writer: MetricsWriter | None = None
        self._ranks_written = -math.inf

    def on_start(self, run: Run) -> None:
        """Open the file. If a resume is refused before this call, the file does not change."""
        if self._path is not None and run.is_leader:
            self._writer = _open(self._path, self._wanted, self._continue_from)

    def on_lead(self, run: Run) -> None:
        """Continue the file of the dead lead; the rows of its last second may be missing."""
        if self._path is not None:
            self._writer = _open(self._path, self._wanted, None)

    def on_totals(self, run: Run, totals: Totals, *, in_full: bool) -> None:
        """Append rows to all tables. The table of the workers, whose rows are long, gets a row only if ``in_full``."""
        if self._writer is None:
            return
        seconds, scoreboard = run.clock.seconds, totals.scoreboard
        samples = run.plan.n_samples(totals.steps_of_ranks)
        self._writer.append(
            "progress",
            seconds=seconds,
            step=run.step,
            gradients=totals.gradients,
            samples=samples,
            bytes=totals.bytes,
            loss=totals.loss,
            learning_rate=run.learning_rate,
            samples_per_second=samples / max(seconds, 1e-9),
            done=_done(run, totals),
            n_nonfinite=totals.n_nonfinite,
            n_clipped=totals.n_clipped,
            exchanges=totals.exchanges,
            lock_wait_seconds=totals.lock_wait_seconds,
            **{f"{name}_share": share for name, share in totals.shares.items()},
        )
        histograms = {"histogram": scoreboard["staleness"].sum(0), "distance": scoreboard["staleness_distance"].sum(0)}
        self._writer.append("staleness", seconds=seconds, **histograms)
        if self._names:
            own = {name: scoreboard[METHOD_PREFIX + name] for name in self._names}
            self._writer.append("method", seconds=seconds, **own)
        pause = SECONDS_BETWEEN_RANKS * max(1.0, run.world.size / RANKS_PER_SECOND)
        if in_full or seconds - self._ranks_written >= pause:
            self._ranks_written = seconds
            alive = [rank not in run.world.dead for rank in range(run.world.size)]
            steps, waits = scoreboard["steps"], scoreboard["waiting"]
            self._writer.append("ranks", seconds=seconds, steps=steps, waiting_seconds=waits, alive=alive)
        if in_full:
            self._writer.append(
                "workers",
                seconds=seconds,
                **{name: scoreboard[name] for name in ("steps", "bytes", "exchanges", *HISTOGRAMS)},
                lock_wait_seconds=scoreboard["lock_wait"],
                waiting_seconds=scoreboard["waiting"],
            )

    def on_evaluation(self, run: Run, point: Point) -> None:
        """Append the evaluation, and the distance of the workers from the consensus."""
        if self._writer is None:
            return
        spread = {name: getattr(point, name) for name in ("consensus_distance", "elastic_energy")}
        row = {name: value for name, value in vars(point).items() if name not in spread}
        self._writer.append("evaluation", **row)
        at = {name: row[name] for name in ("seconds", "step", "gradients", "bytes")}
        self._writer.append("progress", **at, **spread)

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _done(run: Run, totals: Totals) -> float:
    """Return the part of the budget that is used up, from 0 to 1."""
    if run.budget.seconds is not None:
        return min(run.clock.seconds / run.budget.seconds, 1.0)
    return min(totals.gradients / run.budget.gradients, 1.0) if run.budget.gradients else 0.0


def _open(path: Path, wanted: dict[str, list[Any]], continue_from: float | None) -> MetricsWriter | None:
    """Open the file of a run, or replace one that cannot be read; return None where no file can be written.

    Metrics are for plots: a run goes on without them.
    """
    try:
        metrics = MetricsWriter(path, wanted, per_worker=PER_WORKER)
        if continue_from is not None:
            for table in wanted:
                metrics.truncate_after(table, "seconds", continue_from)
        return metrics
    except UsageError as error:
        others = (path.with_name(f"{path.name}.damaged-{n}") for n in itertools.count(1))
        aside = next(other for other in others if not other.exists())
        logger.warning("%s: it is renamed to %s, and a new file begins", error, aside.name)
    except FAILURES as error:
        _warn_without(path, error)
        return None
    try:
        path.rename(aside)
        return MetricsWriter(path, wanted)
    except (UsageError, *FAILURES) as error:
        _warn_without(path, error)
        return None


def _warn_without(path: Path, error: Exception) -> None:
    logger.warning("%s cannot be written (%s): this run has no metrics", path, reason(error))
