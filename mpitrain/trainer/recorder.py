"""What rank 0 shows and stores of all ranks while they train: progress bar, metrics, evaluations.

Every rank writes its counters on a board after each step; rank 0 reads it a few times a second, one-sided.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpitrain.collectives.rma.scoreboard import Scoreboard
from mpitrain.collectives.world.statistics import DISTANCE_BINS, SHARES, STALENESS_BINS, Statistics
from mpitrain.collectives.world.world import World
from mpitrain.errors import UsageError, reason
from mpitrain.records.metrics import FAILURES, MetricsWriter
from mpitrain.trainer.evaluation import Point
from mpitrain.trainer.progress import Progress

SECONDS_BETWEEN_RECORDS = 0.25
LOSS_MEMORY = 0.95
"""The loss shown is a running mean with this memory."""

COUNTERS = ("steps", "loss", *SHARES, "bytes", "n_nonfinite", "exchanges", "lock_wait")
HISTOGRAMS = {"staleness": STALENESS_BINS, "staleness_distance": DISTANCE_BINS}
OF_METHOD = "method_"
"""Before the name of what a method tells of its workers, on the board."""


def tables(n_workers: int, metrics: Sequence[str]) -> dict[str, list[Any]]:
    """The tables of a run.

    Args:
        n_workers: Ranks.
        metrics: What the method tells of each of them.
    """
    return {
        "progress": [
            *("seconds", "step", "gradients", "samples", "bytes", "loss", "learning_rate", "samples_per_second"),
            *(f"{name}_share" for name in SHARES),
            *("n_nonfinite", "exchanges", "lock_wait_seconds"),
            *("consensus_distance", "elastic_energy"),
        ],
        "evaluation": ["seconds", "step", "gradients", "bytes", "epoch", "test_loss", "test_accuracy"],
        # Over all workers; each worker's own are in the table below.
        "staleness": ["seconds", ("histogram", (STALENESS_BINS,)), ("distance", (DISTANCE_BINS,))],
        "workers": [
            "seconds",
            *((name, (n_workers,)) for name in ("steps", "bytes", "exchanges", "lock_wait_seconds", "waiting_seconds")),
            *((name, (n_workers, bins)) for name, bins in HISTOGRAMS.items()),
        ],
        **({"method": ["seconds", *((name, (n_workers,)) for name in metrics)]} if metrics else {}),
    }


def _open_metrics(path: Path, wanted: dict[str, list[Any]], continue_from: float | None = None) -> MetricsWriter | None:
    """The file of a run, or a new one in the place of one that cannot be read; None where none can be written.

    Metrics are for plots: a run goes on without.
    """
    try:
        metrics = MetricsWriter(path, wanted)
        if continue_from is not None:
            for table in wanted:
                metrics.truncate_after(table, "seconds", continue_from)
        return metrics
    except UsageError as error:
        others = (path.with_name(f"{path.name}.damaged-{n}") for n in itertools.count(1))
        aside = next(other for other in others if not other.exists())
        text = f"{error}: it is {aside.name} now, and a new one begins"
    except FAILURES as error:
        _tell_without(path, error)
        return None
    print(f"mpitrain: warning: {text}", file=sys.stderr, flush=True)
    try:
        path.rename(aside)
        return MetricsWriter(path, wanted)
    except (UsageError, *FAILURES) as error:
        _tell_without(path, error)
        return None


def _tell_without(path: Path, error: Exception) -> None:
    print(f"mpitrain: warning: {path} cannot be written ({reason(error)}): this run has no metrics", file=sys.stderr)


class Totals:
    """Sums over all ranks, from one look at the board.

    Args:
        board: (p,) of each counter, (p, bins) of each histogram.
        dead: Ranks whose loss is of the past.

    Attributes:
        board: The same.
    """

    def __init__(self, scoreboard: dict[str, np.ndarray], dead: Collection[int] = ()) -> None:
        self.steps_of_ranks = scoreboard["steps"].astype(int).tolist()
        self.gradients, self.bytes = int(scoreboard["steps"].sum()), int(scoreboard["bytes"].sum())
        self.n_nonfinite, self.exchanges = int(scoreboard["n_nonfinite"].sum()), int(scoreboard["exchanges"].sum())
        self.lock_wait_seconds = float(scoreboard["lock_wait"].sum())
        self.scoreboard = scoreboard
        counts = np.isfinite(scoreboard["loss"]) & (scoreboard["steps"] > 0)
        counts[list(dead)] = False
        self.loss = float(scoreboard["loss"][counts].mean()) if counts.any() else float("nan")
        busy = max(sum(float(scoreboard[name].sum()) for name in SHARES), 1e-12)
        self.shares = {name: float(scoreboard[name].sum()) / busy for name in SHARES}


class Recorder:
    """The board, and what rank 0 makes of it. Collective to create and to free.

    Args:
        world: The ranks.
        folder: Of the run; metrics are stored only if there is one.
        batch_size: Samples of a step.
        metrics: The names of what the method tells of each worker.
        continue_from: Seconds of the run that is resumed: rows of what came after its checkpoint are dropped.
    """

    def __init__(
        self,
        world: World,
        folder: Path | None,
        batch_size: int,
        metrics: Sequence[str] = (),
        continue_from: float | None = None,
    ) -> None:
        self._world, self._batch_size, self._names = world, batch_size, tuple(metrics)
        self._scoreboard = Scoreboard(world, [*COUNTERS, *HISTOGRAMS.items(), *(OF_METHOD + name for name in metrics)])
        self._recorded = -1.0
        self._loss = float("nan")
        self.progress: Progress | None = None
        self._metrics: MetricsWriter | None = None
        if world.rank == 0 and folder is not None:
            self._metrics = _open_metrics(folder / "metrics.h5", tables(world.size, metrics), continue_from)

    def step_made(
        self,
        step: int,
        loss: float,
        compute: float,
        exchange: float,
        statistics: Statistics,
        metrics: Mapping[str, float],
    ) -> None:
        """Put this rank's counters on the board. Local.

        Args:
            step: Steps made.
            loss: Of the last mini-batch; the running mean so far when the run is resumed.
            compute, exchange: Seconds so far; exchange with waiting.
            statistics: Of the exchanges.
            metrics: What the method tells of this worker.
        """
        self._loss = loss if np.isnan(self._loss) else LOSS_MEMORY * self._loss + (1 - LOSS_MEMORY) * loss
        self._scoreboard.write(
            steps=step,
            loss=self._loss,
            compute=compute,
            exchange=max(exchange - statistics.wait_seconds, 0.0),
            waiting=statistics.wait_seconds,
            bytes=statistics.bytes_sent,
            n_nonfinite=int(statistics.n_nonfinite),
            exchanges=statistics.n_exchanges,
            lock_wait=statistics.lock_wait_seconds,
            **{name: getattr(statistics, name) for name in HISTOGRAMS},
            **{OF_METHOD + name: value for name, value in metrics.items()},
        )

    @property
    def loss(self) -> float:
        """The running mean of this rank's loss; NaN before the first step."""
        return self._loss

    def totals(self) -> Totals:
        """Sums over all ranks as they stand now. Local."""
        return Totals(self._scoreboard.read(), self._world.dead)

    def record(self, seconds: float, step: int, learning_rate: float, *, now: bool = False) -> None:
        """Move the progress bar on and append a row of metrics, if it is time (or ``now``). Local; rank 0 only."""
        if not now and seconds - self._recorded < SECONDS_BETWEEN_RECORDS:
            return
        self._recorded = seconds
        totals = self.totals()
        samples = totals.gradients * self._batch_size
        rate = samples / max(seconds, 1e-9)
        if self.progress is not None:
            self.progress.update(
                gradients=totals.gradients,
                seconds=seconds,
                loss=totals.loss,
                samples_per_second=rate,
                shares=totals.shares,
            )
        if self._metrics is not None:
            self._metrics.append(
                "progress",
                seconds=seconds,
                step=step,
                gradients=totals.gradients,
                samples=samples,
                bytes=totals.bytes,
                loss=totals.loss,
                learning_rate=learning_rate,
                samples_per_second=rate,
                n_nonfinite=totals.n_nonfinite,
                exchanges=totals.exchanges,
                lock_wait_seconds=totals.lock_wait_seconds,
                **{f"{name}_share": share for name, share in totals.shares.items()},
            )
            scoreboard = totals.scoreboard
            histograms = {
                "histogram": scoreboard["staleness"].sum(0),
                "distance": scoreboard["staleness_distance"].sum(0),
            }
            self._metrics.append("staleness", seconds=seconds, **histograms)
            if self._names:
                of_method = {name: scoreboard[OF_METHOD + name] for name in self._names}
                self._metrics.append("method", seconds=seconds, **of_method)
            if now:  # as large as there are workers, so not at every row of the others
                self._metrics.append(
                    "workers",
                    seconds=seconds,
                    **{name: scoreboard[name] for name in ("steps", "bytes", "exchanges", *HISTOGRAMS)},
                    lock_wait_seconds=scoreboard["lock_wait"],
                    waiting_seconds=scoreboard["waiting"],
                )

    def evaluated(self, point: Point) -> None:
        """Store an evaluation. Local; rank 0 only."""
        if self._metrics is not None:
            spread = {name: getattr(point, name) for name in ("consensus_distance", "elastic_energy")}
            row = {name: value for name, value in vars(point).items() if name not in spread}
            self._metrics.append("evaluation", **row)
            at = {name: row[name] for name in ("seconds", "step", "gradients", "bytes")}
            self._metrics.append("progress", **at, **spread)

    def close(self) -> None:
        """Finish the bar and the file. Local."""
        if self.progress is not None:
            self.progress.close()
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None

    def free(self) -> None:
        """Give the board back. Collective."""
        self._scoreboard.free()
