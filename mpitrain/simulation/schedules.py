"""Schedules, which decide the order in which the workers of a simulated world run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np


class Schedule(Protocol):
    """Decides which worker runs next."""

    def choose(self, ready: list[int]) -> int | None:
        """Return one of the ready workers (ascending, not empty), or None to end the run."""

    def step_made(self, rank: int, n_exchanges: int = 0, n_bytes: int = 0) -> None:
        """Note that a worker has finished a local step, with the exchanges it made and the bytes it sent in it."""

    def all_met(self, ranks: Sequence[int]) -> None:
        """Note that these workers have completed a collective, which lets none of them be ahead of another."""

    def released(self, rank: int) -> None:
        """Note that the worker that ran last has made true the condition for which this one waits."""


class _Timeless:
    """A schedule without clocks."""

    def step_made(self, rank: int, n_exchanges: int = 0, n_bytes: int = 0) -> None:
        """Do nothing."""

    def all_met(self, ranks: Sequence[int]) -> None:
        """Do nothing."""

    def released(self, rank: int) -> None:
        """Do nothing."""


class RoundRobin(_Timeless):
    """0, 1, ..., p-1, 0, 1, ...: the schedule of Zhang's round-robin analysis (arXiv 1412.6651, section 4)."""

    def __init__(self) -> None:
        self._last = -1

    def choose(self, ready: list[int]) -> int:
        """Return the first ready worker after the one that ran last."""
        self._last = next((rank for rank in ready if rank > self._last), ready[0])
        return self._last


class RandomOrder(_Timeless):
    """A worker drawn uniformly from the ready ones at each turn."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def choose(self, ready: list[int]) -> int:
        """Return a random ready worker."""
        return ready[int(self._rng.integers(len(ready)))]


class Scripted(_Timeless):
    """The given workers in the given order; the run ends with the script.

    Args:
        ranks: One worker for each turn, which lasts until the worker gives way.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        self._ranks = iter(ranks)

    def choose(self, ready: list[int]) -> int | None:
        """Return the next worker of the script.

        Raises:
            ValueError: The script names a worker that waits or has finished.
        """
        rank = next(self._ranks, None)
        if rank is not None and rank not in ready:
            raise ValueError(f"the script lets worker {rank} run, but only {ready} can")
        return rank


class VirtualTime:
    """The worker whose virtual clock is furthest behind.

    A step of worker i that makes k exchanges and sends m bytes advances the worker's clock by

        step_seconds[i]*J + k*latency_seconds + m/bytes_per_second,    ln J ~ N(-jitter^2/2, jitter^2)

    Each worker has a link of its own, so that no worker is delayed by the bytes of another.

    Args:
        step_seconds: (p,) mean duration of a local step of each worker; that of a worker 4 times slower is 4 times as
            long.
        latency_seconds: Latency of an exchange.
        bytes_per_second: Bandwidth of a worker's link.
        jitter: Standard deviation of the logarithm of a step's duration; the mean stays ``step_seconds``.
        seed: The seed of the jitter.

    Attributes:
        clocks: (p,) the seconds of virtual time that each worker has used.
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
        """Return the ready worker with the smallest clock, the one of lowest rank among equals."""
        self._last = ready[int(np.argmin(self.clocks[ready]))]
        return self._last

    def step_made(self, rank: int, n_exchanges: int = 0, n_bytes: int = 0) -> None:
        """Advance the worker's clock."""
        factor = np.exp(self._jitter * self._rng.standard_normal() - self._jitter**2 / 2) if self._jitter else 1.0
        self.clocks[rank] += self.step_seconds[rank] * factor + n_exchanges * self._latency + n_bytes / self._rate

    def all_met(self, ranks: Sequence[int]) -> None:
        """Set the clocks of these workers to the latest of them."""
        self.clocks[list(ranks)] = self.clocks[list(ranks)].max()

    def released(self, rank: int) -> None:
        """Advance the worker's clock to that of the worker that ran last, if it is behind."""
        self.clocks[rank] = max(self.clocks[rank], self.clocks[self._last])


class Until:
    """Another schedule that ends the run as soon as a condition holds, wherever the workers are.

    Args:
        schedule: The schedule until then.
        is_over: The condition, checked before each turn.
    """

    def __init__(self, schedule: Schedule, is_over: Callable[[], bool]) -> None:
        self._schedule, self._is_over = schedule, is_over
        self.step_made, self.all_met, self.released = schedule.step_made, schedule.all_met, schedule.released

    def choose(self, ready: list[int]) -> int | None:
        """Return the other schedule's choice, or None once the condition holds."""
        return None if self._is_over() else self._schedule.choose(ready)
