"""Counting non-finite elements on the GPU without waiting for it.

A guarded kernel adds the number of elements it replaced to a counter in device memory. `ThreadCounters` hands the
counters out, and `NonfiniteCount` stands for the number until the host asks for it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from functools import total_ordering
from typing import Any, Final

import numpy as np

from mpitrain.kernels.gpu import Gpu, current

N_COUNTERS: Final = 64  # guarded launches per thread that may be uncounted at a time


@total_ordering
class NonfiniteCount:
    """The number of elements that guards have replaced, which becomes known when the GPU has computed it.

    It behaves like an int. Adding it to ints and to other counts does not wait. ``int(n_nonfinite)``, a comparison, its
    truth value and printing wait until all guarded launches of the launching thread are done. Afterwards, the number is
    known, and nothing waits any more.
    """

    __slots__ = ("_known", "_launches")

    def __init__(self, known: int, launches: tuple[GuardedLaunch, ...]) -> None:
        if len(launches) > N_COUNTERS:
            # At most N_COUNTERS launches of each thread are still uncounted, so long sums do not grow without bound.
            counted = [launch.n_nonfinite for launch in launches]
            known += sum(n for n in counted if n is not None)
            launches = tuple([launch for launch, n in zip(launches, counted, strict=True) if n is None])
        self._known, self._launches = known, launches

    def __int__(self) -> int:
        return self._known + sum(launch.counted() for launch in self._launches)

    __index__ = __int__

    def __bool__(self) -> bool:
        return int(self) != 0

    def __add__(self, other: object) -> NonfiniteCount:
        if isinstance(other, NonfiniteCount):
            return NonfiniteCount(self._known + other._known, self._launches + other._launches)
        if isinstance(other, int | np.integer):
            return NonfiniteCount(self._known + int(other), self._launches)
        return NotImplemented

    __radd__ = __add__

    def __eq__(self, other: object) -> bool:
        return int(self) == other

    def __lt__(self, other: object) -> bool:
        return int(self) < int(other) if isinstance(other, NonfiniteCount | int | np.integer) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return str(int(self))


class GuardedLaunch:
    """A launch of a guarded kernel, and the number of elements that it replaced, once that is known."""

    __slots__ = ("counters", "index", "mark", "n_nonfinite")

    def __init__(self, counters: ThreadCounters, index: int, mark: Any) -> None:
        self.counters, self.index, self.mark = counters, index, mark
        self.n_nonfinite: int | None = None

    def counted(self) -> int:
        """Return the number. If it is not known yet, wait for all launches of the thread that are not counted."""
        if self.n_nonfinite is None:
            self.counters.count(self.counters.uncounted())
        assert self.n_nonfinite is not None
        return self.n_nonfinite


class ThreadCounters:
    """Counters in device memory for the launches of one thread.

    A launch owns a counter until its count is known. Counters are never reset: the count is the increase of the
    counter. The stream therefore executes only the kernel and a copy of the counter to the host. If no counter is free,
    `next` waits for the older half of the launches.

    Args:
        gpu: The GPU that holds the counters.
    """

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self._on_device, self._on_host = gpu.zeros(N_COUNTERS, np.uint64), gpu.page_locked(N_COUNTERS, np.uint64)
        self._counters = [self._on_device[k : k + 1] for k in range(N_COUNTERS)]
        self._totals = [0] * N_COUNTERS
        self._free = deque(range(N_COUNTERS))  # the owning thread pops on the left, any counting thread appends
        self._uncounted: list[GuardedLaunch] = []
        self._lock = threading.Lock()

    def next(self) -> Any:
        """Return the counter of the next launch, (1,) uint64 in device memory."""
        if not self._free:
            self.count(self.uncounted()[: N_COUNTERS // 2])
        return self._counters[self._free[0]]

    def launched(self) -> NonfiniteCount:
        """Return the count of the launch that has just used the counter from `next`."""
        index = self._free.popleft()
        self.gpu.copy(self._on_host[index : index + 1], self._counters[index])
        launch = GuardedLaunch(self, index, self.gpu.mark())
        with self._lock:
            self._uncounted.append(launch)
        return NonfiniteCount(0, (launch,))

    def uncounted(self) -> list[GuardedLaunch]:
        """Return the launches that have not been counted yet, the oldest first."""
        with self._lock:
            return list(self._uncounted)

    def count(self, launches: Sequence[GuardedLaunch]) -> None:
        """Wait for launches, count them and free their counters."""
        for launch in launches:
            self.gpu.wait_for(launch.mark)
        with self._lock:
            for launch in launches:
                if launch.n_nonfinite is not None:  # counted by another thread meanwhile
                    continue
                before, total = self._totals[launch.index], int(self._on_host[launch.index])
                self._totals[launch.index], launch.n_nonfinite = total, total - before
                self._free.append(launch.index)
            self._uncounted = [launch for launch in self._uncounted if launch.n_nonfinite is None]


_per_thread = threading.local()


def thread_counters() -> ThreadCounters:
    """Return the counters of the calling thread on this process's GPU."""
    gpu = current()
    counters: ThreadCounters | None = getattr(_per_thread, "counters", None)
    if counters is None or counters.gpu is not gpu:
        counters = _per_thread.counters = ThreadCounters(gpu)
    return counters
