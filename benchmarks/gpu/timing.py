"""The timing of GPU work: by GPU events, or by the host clock around it.

A GPU is given work and does it later. `EventTimer` asks the GPU, and gives Python a head start, so that a short kernel
is not timed with the pauses in which the GPU waits for the next one. `ClockTimer` waits for the end on the host, so
that its figures are what a program sees: with the launch and with the wait.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from mpitrain.kernels import gpu

HEAD_START_SECONDS = 1e-4
"""For each call: what the slowest candidates need to be launched from Python, several operations each."""

SPIN = r"""
extern "C" __global__ void spin(unsigned long long nanoseconds) {
    unsigned long long begin, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begin));
    do {
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    } while (now - begin < nanoseconds);
}
"""

RANDOM_ELEMENTS = 2**22

MOST_CALLS = 20
BYTES_OF_A_REPEAT = 2**28  # smaller vectors are passed several times for one figure


class Timer(Protocol):
    """A timer of operations that Python starts and a GPU performs."""

    def seconds(self, operation: Callable[[], object], n_calls: int) -> float:
        """Return the seconds per call over ``n_calls`` consecutive calls."""


class EventTimer:
    """A timer of GPU work on CuPy's current stream, by two CUDA events.

    The first event waits behind a kernel that does nothing for a while, meanwhile Python puts the calls in the queue.
    An operation that waits for the GPU itself is timed with its waits.
    """

    def __init__(self) -> None:
        import cupy

        self._elapsed = cupy.cuda.get_elapsed_time
        self._begin, self._end = cupy.cuda.Event(), cupy.cuda.Event()
        self._spin = cupy.RawKernel(SPIN, "spin")

    def seconds(self, operation: Callable[[], object], n_calls: int) -> float:
        """Return the seconds per call over ``n_calls`` consecutive calls."""
        self._spin((1,), (1,), (np.uint64(1e9 * HEAD_START_SECONDS * n_calls),))
        self._begin.record()
        for _ in range(n_calls):
            operation()
        self._end.record()
        self._end.synchronize()
        milliseconds: float = self._elapsed(self._begin, self._end)
        return milliseconds / 1e3 / n_calls


class ClockTimer:
    """A timer by the host clock, from before the first call until the GPU has finished the last.

    Args:
        settle: Waits for the GPU.
    """

    def __init__(self, synchronize: Callable[[], object]) -> None:
        self._synchronize = synchronize

    def seconds(self, operation: Callable[[], object], n_calls: int) -> float:
        """Return the seconds per call over ``n_calls`` consecutive calls."""
        self._synchronize()
        began = time.perf_counter()
        for _ in range(n_calls):
            operation()
        self._synchronize()
        return (time.perf_counter() - began) / n_calls


def calls_of(n_bytes: int) -> int:
    """Return how many calls make one figure for vectors of this size."""
    return max(1, min(MOST_CALLS, BYTES_OF_A_REPEAT // max(n_bytes, 1)))


def medians(
    operations: Mapping[str, Callable[[], object]], timer: Timer, n_repeats: int, n_calls: int
) -> dict[str, float]:
    """Return the median seconds per call of each operation; the operations take turns.

    Args:
        operations: By name.
        timer: Measures them.
        n_repeats: Turns, after two that warm up.
        n_calls: Of each, in a turn.
    """
    for operation in operations.values():
        operation()
        operation()
    seconds: dict[str, list[float]] = {name: [] for name in operations}
    for _ in range(n_repeats):
        for name, operation in operations.items():
            seconds[name].append(timer.seconds(operation, n_calls))
    return {name: statistics.median(of_one) for name, of_one in seconds.items()}


def fill(device: gpu.Gpu, array: Any, seed: int) -> Any:
    """Fill an array (n,) in device memory with random numbers in [0, 1), one block and its copies, and return it."""
    n, done = len(array), min(len(array), RANDOM_ELEMENTS)
    gpu.assign(array[:done], np.random.default_rng(seed).random(done, np.float32))
    while done < n:
        more = min(done, n - done)
        device.copy(array[done : done + more], array[:more])
        done += more
    return array
