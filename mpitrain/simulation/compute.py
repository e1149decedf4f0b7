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


class Core:
    """A core that several workers share in time slices.

    A worker keeps the core until its time slice ends, and longer if no other worker needs the core. It releases the
    core when it waits for others.

    Args:
        slice_seconds: The time slice.
    """

    def __init__(self, slice_seconds: float) -> None:
        self._slice = slice_seconds
        self._owner: int | None = None
        self._slice_end = self._busy_until = 0.0
        self._queue: deque[int] = deque()

    def run(self, rank: int, now: float, left: float) -> tuple[float, float]:
        """Let a worker compute on the core, or wait for it. ``now`` must not decrease from call to call.

        Args:
            rank: The worker.
            now: The time on the worker's clock.
            left: The seconds of computation that it needs.

        Returns:
            The time at which the worker must call again, and the seconds of computation that it will still need then.
        """
        others = any(other != rank for other in self._queue)
        is_over = now >= self._slice_end - TICK_SECONDS
        has_slice = rank == self._owner and not (is_over and others)
        if now >= self._busy_until and (has_slice or not self._queue or self._queue[0] == rank):
            if rank != self._owner or is_over:
                self._owner, self._slice_end = rank, now + self._slice
            if rank in self._queue:
                self._queue.remove(rank)
            seconds = min(left, self._slice_end - now) if others else left
            self._busy_until = now + seconds
            return self._busy_until, left - seconds
        if rank not in self._queue:
            self._queue.append(rank)
        later = TICK_SECONDS * (1 + self._queue.index(rank))
        return max(now, self._busy_until) + later, left

    def keep(self, rank: int, until: float) -> None:
        """Let a worker that has the core keep it until the given time, while it accesses memory."""
        if rank == self._owner:
            self._busy_until = max(self._busy_until, until)
