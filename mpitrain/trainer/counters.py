"""The counters that every rank publishes after each step, and that rank 0 adds up, one-sided."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from mpitrain.collectives.rma.scoreboard import Scoreboard
from mpitrain.collectives.world.statistics import DISTANCE_BINS, SHARES, STALENESS_BINS, Statistics
from mpitrain.collectives.world.world import World

LOSS_MEMORY = 0.95
"""The memory of the running mean of the loss."""

CPU = ("cpu", "serving_cpu", "gradient_cpu", "exchange_cpu")
"""CPU seconds: of all threads, of the thread that serves other nodes, of an undisturbed gradient and exchange."""

COUNTERS = (
    *("steps", "loss", *SHARES, *CPU, "bytes", "wire_bytes", "n_nonfinite", "n_clipped", "exchanges"),
    "lock_wait",
)
HISTOGRAMS = {"staleness": STALENESS_BINS, "staleness_distance": DISTANCE_BINS}
METHOD_PREFIX = "method_"
"""Precedes the names of the method's own metrics on the scoreboard."""


class Totals:
    """Sums over all ranks, from one reading of the scoreboard.

    Args:
        scoreboard: The counters (p,) and histograms (p, bins) of all ranks, by name.
        dead: The ranks that have died. Their losses are left out of the mean.

    Attributes:
        scoreboard: See the argument.
        loss: The mean loss of the ranks that have made a step.
        shares: The fractions of their time that the ranks have spent on computation, on exchanges and on waiting.
    """

    def __init__(self, scoreboard: dict[str, np.ndarray], dead: Collection[int] = ()) -> None:
        self.steps_of_ranks = scoreboard["steps"].astype(int).tolist()
        self.gradients, self.bytes = int(scoreboard["steps"].sum()), int(scoreboard["bytes"].sum())
        self.n_nonfinite, self.exchanges = int(scoreboard["n_nonfinite"].sum()), int(scoreboard["exchanges"].sum())
        self.n_clipped = int(scoreboard["n_clipped"].sum())
        self.cpu_seconds = float(scoreboard["cpu"].sum())
        self.lock_wait_seconds = float(scoreboard["lock_wait"].sum())
        self.scoreboard = scoreboard
        counts = np.isfinite(scoreboard["loss"]) & (scoreboard["steps"] > 0)
        counts[list(dead)] = False
        self.loss = float(scoreboard["loss"][counts].mean()) if counts.any() else float("nan")
        busy = max(sum(float(scoreboard[name].sum()) for name in SHARES), 1e-12)
        self.shares = {name: float(scoreboard[name].sum()) / busy for name in SHARES}


class Counters:
    """The counters of all ranks. Collective to create and to free.

    Args:
        world: The ranks.
        metrics: The names of the method's own metrics.
        loss: The running mean of this rank's loss to start from, in a resumed run.
    """

    def __init__(self, world: World, metrics: Sequence[str] = (), loss: float = float("nan")) -> None:
        self._world, self._loss = world, loss
        own = (METHOD_PREFIX + name for name in metrics)
        self._scoreboard = Scoreboard(world, [*COUNTERS, *HISTOGRAMS.items(), *own])

    @property
    def loss(self) -> float:
        """The running mean of this rank's loss; NaN before the first step."""
        return self._loss

    def add_loss(self, loss: float) -> None:
        """Add the loss of a mini-batch to the running mean. Local."""
        self._loss = loss if np.isnan(self._loss) else LOSS_MEMORY * self._loss + (1 - LOSS_MEMORY) * loss

    def publish(
        self,
        *,
        step: int,
        compute: float,
        exchange: float,
        cpu: Mapping[str, float],
        statistics: Statistics,
        metrics: Mapping[str, float],
    ) -> None:
        """Publish this rank's counters. Local.

        Args:
            step: The number of gradients of this rank. In a run that was continued on another number of ranks, it
                includes this rank's share of the gradients from before.
            compute, exchange: The seconds of computation and of exchanges so far; exchanges include waiting.
            cpu: The CPU times of this rank so far, by their names in ``CPU``.
            statistics: The statistics of the exchanges.
            metrics: The method's own metrics of this worker.
        """
        self._scoreboard.write(
            steps=step,
            loss=self._loss,
            compute=compute,
            exchange=max(exchange - statistics.wait_seconds, 0.0),
            waiting=statistics.wait_seconds,
            bytes=statistics.bytes_sent,
            wire_bytes=statistics.wire_bytes,
            n_nonfinite=int(statistics.n_nonfinite),
            n_clipped=statistics.n_clipped,
            exchanges=statistics.n_exchanges,
            lock_wait=statistics.lock_wait_seconds,
            **cpu,
            **{name: getattr(statistics, name) for name in HISTOGRAMS},
            **{METHOD_PREFIX + name: value for name, value in metrics.items()},
        )

    def totals(self) -> Totals:
        """Return the present sums over all ranks. Local."""
        return Totals(self._scoreboard.read(), self._world.dead)

    def free(self) -> None:
        """Free the scoreboard. Collective."""
        self._scoreboard.free()
