"""Who goes on: the schedules of a simulated world."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Schedule(Protocol):
    """Decides which worker runs next."""

    def choose(self, ready: list[int]) -> int | None:
        """One of the ready workers (ascending, not empty), or None to end the run."""

    def step_made(self, rank: int) -> None:
        """A worker has finished a local step."""

    def all_met(self) -> None:
        """All workers have met in a collective: none of them is ahead of another."""


class _Timeless:
    """Schedules to which steps and collectives make no difference."""

    def step_made(self, rank: int) -> None:
        """No clock to move."""

    def all_met(self) -> None:
        """No clock to move."""


class RoundRobin(_Timeless):
    """0, 1, ..., p-1, 0, 1, ...: the schedule of Zhang's round-robin analysis (arXiv 1412.6651, section 4)."""

    def __init__(self) -> None:
        self._last = -1

    def choose(self, ready: list[int]) -> int:
        """The first ready worker after the one that ran last."""
        self._last = next((rank for rank in ready if rank > self._last), ready[0])
        return self._last


class RandomOrder(_Timeless):
    """Each time a worker drawn uniformly from the ready ones."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def choose(self, ready: list[int]) -> int:
        """Any of them."""
        return ready[int(self._rng.integers(len(ready)))]


class Scripted(_Timeless):
    """Exactly these workers in this order; the run ends with the script.

    Args:
        ranks: Each entry lets one worker run until it gives way.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        self._ranks = iter(ranks)

    def choose(self, ready: list[int]) -> int | None:
        """The next one of the script.

        Raises:
            ValueError: When the script names a worker that waits or has finished.
        """
        rank = next(self._ranks, None)
        if rank is not None and rank not in ready:
            raise ValueError(f"the script lets worker {rank} run, but only {ready} can")
        return rank


class VirtualTime:
    """The worker whose clock is behind runs: ``step_seconds`` a step, one number for each worker.

    Args:
        step_seconds: (p,) what a local step costs each worker; a straggler that is 4 times slower has 4 times as much.

    Attributes:
        clocks: (p,) seconds of virtual time each worker has used.
    """

    def __init__(self, step_seconds: Sequence[float]) -> None:
        self.step_seconds = np.asarray(step_seconds, np.float64)
        if not np.all(np.isfinite(self.step_seconds) & (self.step_seconds > 0)):
            raise ValueError(f"a step takes a positive number of seconds, not {step_seconds}")
        self.clocks = np.zeros(self.step_seconds.size)

    def choose(self, ready: list[int]) -> int:
        """The ready worker with the smallest clock; the lowest rank among equals."""
        return ready[int(np.argmin(self.clocks[ready]))]

    def step_made(self, rank: int) -> None:
        """The worker's clock moves on."""
        self.clocks[rank] += self.step_seconds[rank]

    def all_met(self) -> None:
        """Everybody has waited for the last one."""
        self.clocks[:] = self.clocks.max()
