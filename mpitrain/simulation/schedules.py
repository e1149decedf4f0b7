"""Who goes on: the schedules of a simulated world."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np


class Schedule(Protocol):
    """Decides which worker runs next."""

    def choose(self, ready: list[int]) -> int | None:
        """One of the ready workers (ascending, not empty), or None to end the run."""

    def step_made(self, rank: int, n_exchanges: int = 0, n_bytes: int = 0) -> None:
        """A worker has finished a local step, in which it exchanged so often and moved so many bytes."""

    def all_met(self, ranks: Sequence[int]) -> None:
        """These workers have met in a collective: none of them is ahead of another."""

    def released(self, rank: int) -> None:
        """A worker has what it waited for, from the worker that ran last."""


class _Timeless:
    """Schedules to which steps and collectives make no difference."""

    def step_made(self, rank: int, n_exchanges: int = 0, n_bytes: int = 0) -> None:
        """No clock to move."""

    def all_met(self, ranks: Sequence[int]) -> None:
        """No clock to move."""

    def released(self, rank: int) -> None:
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

    A step with exchanges takes longer by a latency for each of them and by the time of its bytes on a link of the
    worker's own. Nothing is shared, so nobody is held up by another's bytes.

    Args:
        step_seconds: (p,) what a local step costs each worker; a straggler that is 4 times slower has 4 times as much.
        latency_seconds: Of an exchange.
        bytes_per_second: Of a worker's link.
        jitter: Standard deviation of the logarithm of a step's cost; its mean stays ``step_seconds``.
        seed: Of the jitter.

    Attributes:
        clocks: (p,) seconds of virtual time each worker has used.
    """

    def __init__(
        self,
        step_seconds: Sequence[float],
        *,
        latency_seconds: float = 0.0,
        bytes_per_second: float = math.inf,
        jitter: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.step_seconds = np.asarray(step_seconds, np.float64)
        if not np.all(np.isfinite(self.step_seconds) & (self.step_seconds > 0)):
            raise ValueError(f"a step takes a positive number of seconds, not {step_seconds}")
        self._latency, self._rate, self._jitter = latency_seconds, bytes_per_second, jitter
        self._rng = np.random.default_rng(seed)
        self.clocks = np.zeros(self.step_seconds.size)
        self._last = 0

    def choose(self, ready: list[int]) -> int:
        """The ready worker with the smallest clock; the lowest rank among equals."""
        self._last = ready[int(np.argmin(self.clocks[ready]))]
        return self._last

    def step_made(self, rank: int, n_exchanges: int = 0, n_bytes: int = 0) -> None:
        """The worker's clock moves on."""
        slower = np.exp(self._jitter * self._rng.standard_normal() - self._jitter**2 / 2) if self._jitter else 1.0
        self.clocks[rank] += self.step_seconds[rank] * slower + n_exchanges * self._latency + n_bytes / self._rate

    def all_met(self, ranks: Sequence[int]) -> None:
        """They have waited for the last one."""
        self.clocks[list(ranks)] = self.clocks[list(ranks)].max()

    def released(self, rank: int) -> None:
        """It has waited for the worker that ran last."""
        self.clocks[rank] = max(self.clocks[rank], self.clocks[self._last])


class Until:
    """Another schedule, until something holds: then the run ends, wherever the workers are.

    Args:
        schedule: Who goes on until then.
        is_over: Whether it holds.
    """

    def __init__(self, schedule: Schedule, is_over: Callable[[], bool]) -> None:
        self._schedule, self._is_over = schedule, is_over
        self.step_made, self.all_met, self.released = schedule.step_made, schedule.all_met, schedule.released

    def choose(self, ready: list[int]) -> int | None:
        """As the other one."""
        return None if self._is_over() else self._schedule.choose(ready)
