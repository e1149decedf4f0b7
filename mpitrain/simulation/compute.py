"""How long the gradients of simulated workers take: distributions of their duration, and cores that workers share."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

TICK_SECONDS = 1e-9
"""How much later than the owner of a core those look at it again who wait for it, each after the one before."""


class ComputeTime:
    """The duration of a gradient: a mean times a random factor, plus pauses.

    Args:
        means: (p,) mean duration of a gradient of each worker without pauses, in seconds.
        jitter: The parameter s of the random factor J, which is log-normal with mean 1: ln J ~ N(-s^2/2, s^2).
        measured: The durations in a real run. If they are given, a duration is also multiplied by a randomly drawn one
            of them, divided by their mean.
        pauses_per_second, pause_seconds: The mean number of pauses per second, and the length of each. Pauses are a
            Poisson process; they model another job, the operating system or a garbage collection.
        seed: The seed.

    Attributes:
        spent: (p,) the total seconds of the gradients drawn so far.
    """

    def __init__(
        self,
        means: Sequence[float],
        *,
        jitter: float = 0.0,
        measured: Sequence[float] = (),
        pauses_per_second: float = 0.0,
        pause_seconds: float = 0.0,
        seed: int = 0,
    ) -> None:
        self._means = np.asarray(means, np.float64)
        self._jitter, self._factors = jitter, np.asarray(measured, np.float64)
        if self._factors.size:
            self._factors = self._factors / self._factors.mean()
        self._rate, self._pause = pauses_per_second, pause_seconds
        self.spent = np.zeros(self._means.size)
        self._rngs = [np.random.default_rng([seed, 7, rank]) for rank in range(self._means.size)]

    def draw(self, rank: int) -> float:
        """Return the duration of a worker's next gradient. It does not depend on the durations of other workers."""
        rng, seconds = self._rngs[rank], float(self._means[rank])
        if self._factors.size:
            seconds *= float(self._factors[rng.integers(self._factors.size)])
        if self._jitter:
            seconds *= float(np.exp(self._jitter * rng.standard_normal() - self._jitter**2 / 2))
        if self._rate:
            seconds += self._pause * int(rng.poisson(self._rate * seconds))
        self.spent[rank] += seconds
        return seconds


class Cores:
    """The cores of a node, which its workers share in time slices.

    A worker keeps its core until its time slice ends, and longer if no other worker needs the core. It releases the
    core when it waits for others. The worker that has waited longest gets the first core that is free, as under a
    scheduler that moves processes to idle cores.

    Args:
        n_cores: The number of cores.
        slice_seconds: The mean time slice.
        spread: The largest relative deviation of a slice from the mean. Slices are uniformly distributed; those of an
            operating system vary because of its clock ticks and of processes that wake up.
        seed: The seed of the slices.
    """

    def __init__(self, n_cores: int, slice_seconds: float, *, spread: float = 0.0, seed: int = 0) -> None:
        self._slice, self._spread, self._rng = slice_seconds, spread, np.random.default_rng([seed, 11])
        self._owner: list[int | None] = [None] * n_cores
        self._slice_end, self._busy_until = [0.0] * n_cores, [0.0] * n_cores
        self._core_of: dict[int, int] = {}
        self._queue: deque[int] = deque()

    def run(self, rank: int, now: float, left: float) -> tuple[float, float]:
        """Let a worker compute on a core, or wait for one. ``now`` must not decrease from call to call.

        Args:
            rank: The worker.
            now: The time on the worker's clock.
            left: The seconds of computation that it needs.

        Returns:
            The time at which the worker must call again, and the seconds of computation that it will still need then.
        """
        others = any(other != rank for other in self._queue)
        core = self._core_of.get(rank)
        keeps = core is not None and now >= self._busy_until[core] and not (others and self._is_over(core, now))
        if not keeps:
            core = self._free_core(now, core) if not self._queue or self._queue[0] == rank else None
        if core is None:
            if rank not in self._queue:
                self._queue.append(rank)
            later = TICK_SECONDS * (1 + self._queue.index(rank))
            return max(now, min(self._busy_until)) + later, left
        if self._owner[core] != rank or self._is_over(core, now):
            self._give(core, rank)
            self._slice_end[core] = now + self._slice * (1 + self._spread * self._rng.uniform(-1, 1))
        if rank in self._queue:
            self._queue.remove(rank)
        seconds = min(left, self._slice_end[core] - now)  # others may come in the meantime
        self._busy_until[core] = now + seconds
        return now + seconds, left - seconds

    def keep(self, rank: int, until: float) -> None:
        """Let a worker that has a core keep it until the given time, while it accesses memory."""
        core = self._core_of.get(rank)
        if core is not None:
            self._busy_until[core] = max(self._busy_until[core], until)

    def turn_at(self, at: float) -> float:
        """Return when a thread that needs a core briefly gets it: at once if a core is idle, else after a slice."""
        idle = any(until < at - TICK_SECONDS / 2 and not self._queue for until in self._busy_until)
        return at if idle else max(at, min(self._slice_end))

    def _is_over(self, core: int, now: float) -> bool:
        return now >= self._slice_end[core] - TICK_SECONDS

    def _free_core(self, now: float, own: int | None) -> int | None:
        """Return a core on which nobody computes, if possible the worker's own or one without an owner."""
        if own is not None and self._busy_until[own] <= now:
            return own
        # The owner has called at the end of its computation, and may have continued.
        free = [core for core, until in enumerate(self._busy_until) if until < now - TICK_SECONDS / 2 or not until]
        return min(free, key=lambda core: self._owner[core] is not None, default=None)

    def _give(self, core: int, rank: int) -> None:
        """Make a worker the owner of a core, and of no other."""
        former, before = self._owner[core], self._core_of.get(rank)
        if former is not None:
            del self._core_of[former]
        if before is not None and before != core:
            self._owner[before] = None
        self._owner[core], self._core_of[rank] = rank, core
