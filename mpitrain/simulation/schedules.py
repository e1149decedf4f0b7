"""Schedules, which decide the order in which the workers of a simulated world run."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np


class Ready:
    """The workers that can run, as a sorted set of ranks.

    The cost of each operation hardly depends on the number of workers.

    Args:
        size: The number of workers; none is ready at first.
    """

    def __init__(self, size: int) -> None:
        self._is_ready = bytearray(size)
        self._n = 0

    def add(self, ranks: Iterable[int]) -> None:
        """Add workers. Workers that are ready already stay ready."""
        for rank in ranks:
            self._n += not self._is_ready[rank]
            self._is_ready[rank] = 1

    def discard(self, rank: int) -> None:
        """Remove a worker, if it is ready."""
        self._n -= self._is_ready[rank]
        self._is_ready[rank] = 0

    def after(self, rank: int) -> int:
        """Return the first ready worker above ``rank``; if there is none, the first ready worker."""
        found = self._is_ready.find(1, rank + 1)
        return found if found >= 0 else self._is_ready.find(1)

    def __contains__(self, rank: object) -> bool:
        return isinstance(rank, int | np.integer) and bool(self._is_ready[int(rank)])

    def __iter__(self) -> Iterator[int]:
        rank = self._is_ready.find(1)
        while rank >= 0:
            yield rank
            rank = self._is_ready.find(1, rank + 1)

    def __len__(self) -> int:
        return self._n

    def __repr__(self) -> str:
        return repr(list(self))


Watched = tuple[int, int]
"""A block of shared memory: the number of its memory and its index."""


class Schedule(Protocol):
    """A rule that chooses the worker that runs next. It is notified of all operations, and may let them take time.

    A block is a shard of a shared vector, or a mailbox; its home is the rank whose memory contains it.
    """

    def choose(self, ready: Ready) -> int | None:
        """Return a ready worker, or None to end the run. There is at least one ready worker."""

    def step_made(self, rank: int, n_exchanges: int = 0, n_bytes: int = 0) -> None:
        """Note that a worker has finished a local step, in which it made ``n_exchanges`` and sent ``n_bytes``."""

    def computing(self, rank: int) -> bool:
        """Let time pass for the worker's gradient; return whether others should run before the worker calls again."""

    def asking(self, rank: int, block: Watched, home: int) -> bool:
        """Let time pass for the request of a lock; return whether others should run before the worker calls again."""

    def visit_begun(self, rank: int, block: Watched, home: int, n_bytes: int, following: Watched | None) -> None:
        """Note that a worker acquires the lock of a block, and that it will visit the block ``following`` next."""

    def visit_ended(self, rank: int, block: Watched, home: int, n_bytes: int, *, updated: bool) -> None:
        """Note that a worker releases a block."""

    def peer_read(self, rank: int, peer: int, n_bytes: int) -> None:
        """Note that a worker has read the vector of a peer."""

    def all_met(self, ranks: Sequence[int], kind: str = "set-up", n_bytes: int = 0) -> None:
        """Note that these workers have completed a collective. All of them leave it at the same time.

        Args:
            ranks: The workers.
            kind: ``allreduce``, ``tree`` (a broadcast or reduction), ``gather``, ``barrier``, or ``set-up``.
            n_bytes: The size of the vector; in a gather, the size of one worker's part.
        """

    def released(self, rank: int) -> None:
        """Note that the worker that ran last has made the condition of this waiting worker true."""

    def ready_again(self, ranks: Iterable[int]) -> None:
        """Note that these workers can run, because a run has started or the death of a worker ended their wait."""


class _Instant:
    """The events that take no time."""

    def computing(self, rank: int) -> bool:
        """Return False, because no time passes: the worker can go on."""
        return False

    def asking(self, rank: int, block: Watched, home: int) -> bool:
        """Return False, because no time passes: the worker can go on."""
        return False

    def visit_begun(self, rank: int, block: Watched, home: int, n_bytes: int, following: Watched | None) -> None:
        """Do nothing."""

    def visit_ended(self, rank: int, block: Watched, home: int, n_bytes: int, *, updated: bool) -> None:
        """Do nothing."""

    def peer_read(self, rank: int, peer: int, n_bytes: int) -> None:
        """Do nothing."""


class _Timeless(_Instant):
    """A schedule without clocks."""

    def step_made(self, rank: int, n_exchanges: int = 0, n_bytes: int = 0) -> None:
        """Do nothing."""

    def all_met(self, ranks: Sequence[int], kind: str = "set-up", n_bytes: int = 0) -> None:
        """Do nothing."""

    def released(self, rank: int) -> None:
        """Do nothing."""

    def ready_again(self, ranks: Iterable[int]) -> None:
        """Do nothing."""


class RoundRobin(_Timeless):
    """The schedule 0, 1, ..., p-1, 0, 1, ... of Zhang's round-robin analysis (arXiv 1412.6651, section 4)."""

    def __init__(self) -> None:
        self._last = -1

    def choose(self, ready: Ready) -> int:
        """Return the first ready worker after the one that ran last."""
        self._last = ready.after(self._last)
        return self._last


class RandomOrder(_Timeless):
    """A schedule that draws the next worker uniformly from the ready ones."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def choose(self, ready: Ready) -> int:
        """Return a random ready worker."""
        return list(ready)[int(self._rng.integers(len(ready)))]


class Scripted(_Timeless):
    """A schedule given as a list of workers; the run ends with the list.

    Args:
        ranks: The workers. Each runs until it gives way.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        self._ranks = iter(ranks)

    def choose(self, ready: Ready) -> int | None:
        """Return the next worker of the list.

        Raises:
            ValueError: This worker waits or has finished.
        """
        rank = next(self._ranks, None)
        if rank is not None and rank not in ready:
            raise ValueError(f"the script lets worker {rank} run, but only {ready} can")
        return rank


class ClockSchedule(_Instant):
    """A schedule that runs the worker with the smallest clock.

    Args:
        clocks: (p,) the initial clocks, in seconds.

    Attributes:
        clocks: (p,) the seconds of virtual time that each worker has used.
    """

    def __init__(self, clocks: np.ndarray) -> None:
        self.clocks = clocks
        self._turns = ClockQueue(self.clocks)
        self._last = 0

    def choose(self, ready: Ready) -> int:
        """Return the ready worker with the smallest clock; among equal clocks, the one with the lowest rank."""
        self._last = self._turns.earliest(ready)
        return self._last

    def step_made(self, rank: int, n_exchanges: int = 0, n_bytes: int = 0) -> None:
        """Do nothing."""

    def all_met(self, ranks: Sequence[int], kind: str = "set-up", n_bytes: int = 0) -> None:
        """Set the clocks of these workers to the largest of them."""
        self.clocks[list(ranks)] = self.clocks[list(ranks)].max()
        self._turns.add(ranks)

    def released(self, rank: int) -> None:
        """Advance the worker's clock to that of the worker that ran last, if it is behind."""
        self.clocks[rank] = max(self.clocks[rank], self.clocks[self._last])
        self._turns.add((rank,))

    def ready_again(self, ranks: Iterable[int]) -> None:
        """Add these workers to those that can be chosen."""
        self._turns.add(ranks)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let operations inside the block take no time, for an evaluation."""
        yield


class VirtualTime(ClockSchedule):
    """A schedule that runs the worker with the smallest clock; each worker has its own network link.

    A step with k exchanges and m bytes advances the clock of worker i by this time, with a random factor J:

        step_seconds[i]*J + k*latency_seconds + m/bytes_per_second,    ln J ~ N(-jitter^2/2, jitter^2)

    Because links are not shared, no worker is delayed by the traffic of another.

    Args:
        step_seconds: (p,) the mean duration of a local step of each worker.
        latency_seconds: The latency of an exchange.
        bytes_per_second: The bandwidth of a worker's link.
        jitter: The standard deviation of the logarithm of a step's duration. It does not change the mean.
        seed: The seed of the jitter.
        starts: (p,) the time at which each worker joins; by default 0.

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
        starts: Sequence[float] | None = None,
    ) -> None:
        self.step_seconds = np.asarray(step_seconds, np.float64)
        if not np.all(np.isfinite(self.step_seconds) & (self.step_seconds > 0)):
            raise ValueError(f"a step takes a positive number of seconds, not {step_seconds}")
        self._latency, self._rate, self._jitter = latency_seconds, bytes_per_second, jitter
        self._rng = np.random.default_rng(seed)
        super().__init__(np.zeros(self.step_seconds.size) if starts is None else np.array(starts, np.float64))

    def step_made(self, rank: int, n_exchanges: int = 0, n_bytes: int = 0) -> None:
        """Advance the worker's clock."""
        factor = math.exp(self._jitter * self._rng.standard_normal() - self._jitter**2 / 2) if self._jitter else 1.0
        self.clocks[rank] += self.step_seconds[rank] * factor + n_exchanges * self._latency + n_bytes / self._rate
        self._turns.add((rank,))


class ClockQueue:
    """A priority queue of workers, ordered by their clocks. An operation costs O(log p).

    An entry holds the clock at the time of ``add``, and is ignored if the clock has changed since. An entry of a worker
    that waits is dropped; the worker is added again when it can run.

    Args:
        clocks: (p,) the clocks in seconds. The caller advances them.
    """

    def __init__(self, clocks: np.ndarray) -> None:
        self._clocks = clocks
        self._entries = [(float(clock), rank) for rank, clock in enumerate(clocks)]

    def add(self, ranks: Iterable[int]) -> None:
        """Add workers whose clocks have changed, or that can run again."""
        for rank in ranks:
            heapq.heappush(self._entries, (float(self._clocks[rank]), rank))

    def earliest(self, among: Container[int]) -> int:
        """Return the worker of ``among`` with the smallest clock; among equal clocks, the one with the lowest rank.

        Raises:
            IndexError: No worker of ``among`` has been added.
        """
        while True:
            clock, rank = self._entries[0]
            if clock == self._clocks[rank] and rank in among:
                return rank
            heapq.heappop(self._entries)


class Until:
    """A schedule that follows another schedule, and ends the run as soon as a condition holds.

    Args:
        schedule: The other schedule.
        is_over: The condition, checked before each choice.
    """

    def __init__(self, schedule: Schedule, is_over: Callable[[], bool]) -> None:
        self._schedule, self._is_over = schedule, is_over

    def __getattr__(self, name: str) -> Any:
        """Return everything but the choice from the other schedule."""
        return getattr(self._schedule, name)

    def choose(self, ready: Ready) -> int | None:
        """Return the choice of the other schedule, or None if the condition holds."""
        return None if self._is_over() else self._schedule.choose(ready)
