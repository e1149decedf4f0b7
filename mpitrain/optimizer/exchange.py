"""The boundary between the work of torch and that of the method's worker in a step.

    torch      forward, backward | ........................................... | forward, backward
                                 v exchanging                                  ^
    worker                       | before_update |  ............  | after_update |
                                                 v computing      ^
    torch                                        | local update   |

The worker is the object that makes the exchanges of the method. At each crossing of the boundary, the vectors are
copied if necessary, the streams of a GPU are kept in order, and the clock is started or stopped.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch.autograd import profiler

from mpitrain.algorithms.base.worker import Worker
from mpitrain.collectives.world.phases import EXCHANGE, UPDATE, recorder
from mpitrain.kernels.gpu import Gpu
from mpitrain.optimizer.flat import FlatParameters
from mpitrain.optimizer.phase import begin_range


@dataclass(slots=True)
class Stopwatch:
    """Sums of measured times, in seconds.

    Attributes:
        seconds: The time.
        cpu_seconds: The CPU time of the calling thread.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0


class ExchangeBoundary:
    """The boundary between the work of torch and the work of a worker.

    It copies vectors, orders GPU streams and measures time wherever a step passes from one to the other.

    Args:
        flat: The parameters and gradients.
        device: The GPU that holds the worker's vectors; None if they are in host memory.

    Attributes:
        clock: The total time of the blocks of ``exchanging(counts=True)``.
    """

    def __init__(self, flat: FlatParameters, device: Gpu | None) -> None:
        self._flat, self._device = flat, device
        self.clock = Stopwatch()

    def exchanging(self, *, copies: bool = False, counts: bool = False) -> Exchanging:
        """Return a context manager for the work of the worker.

        Args:
            copies: Whether the block reads gradients or changes parameters. If the model is on a GPU and the worker's
                vectors are in host memory, they are then copied before and after the block.
            counts: Whether to add the time of the block to the clock, without the time of ``computing`` blocks inside
                it.
        """
        return Exchanging(self._flat, self._device, self.clock, copies, counts)

    def wait_for_torch(self) -> None:
        """Wait until the GPU, if there is one, has finished the work that torch has started. Local."""
        if self._device is not None:
            with self.exchanging():
                self._device.synchronize()

    def computing(self) -> Computing:
        """Return a context manager for the work of torch inside ``exchanging``. It stops the clock."""
        return Computing(self._flat, self._device, self.clock)


class Exchanging:
    """The context manager of ``ExchangeBoundary.exchanging``.

    It is a class, like ``Computing``, because a generator would slow down the steps of small models by a few percent.
    """

    __slots__ = ("_began", "_clock", "_copies", "_counts", "_cpu", "_device", "_flat", "_previous", "_range", "_stream")

    def __init__(self, flat: FlatParameters, device: Gpu | None, clock: Stopwatch, copies: bool, counts: bool) -> None:
        self._flat, self._device, self._clock, self._copies, self._counts = flat, device, clock, copies, counts
        self._previous: int | None = None
        self._range: Any = None

    def __enter__(self) -> None:
        if self._counts:
            self._cpu = time.thread_time()  # outside the measured time: the call may be where a time slice ends
        self._began = time.perf_counter()
        if self._counts:
            if recorder.is_on:
                self._previous = recorder.enter(EXCHANGE, self._began)
            if profiler._is_profiler_enabled:
                self._range = begin_range(EXCHANGE)
        if self._copies:
            self._flat.to_host()
        if self._device is not None:
            self._stream = self._device.exchanging(self._flat.compute_stream)
            self._stream.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._device is not None:
            self._stream.__exit__(kind, error, trace)
        if self._copies and kind is None:
            self._flat.to_device()
        if self._counts:
            ended = time.perf_counter()
            self._clock.seconds += ended - self._began
            self._clock.cpu_seconds += time.thread_time() - self._cpu
            if self._previous is not None:
                recorder.enter(self._previous, ended)
            if self._range is not None:
                self._range.__exit__(kind, error, trace)


class Computing:
    """The context manager of ``ExchangeBoundary.computing``."""

    __slots__ = ("_began", "_clock", "_cpu", "_device", "_flat", "_previous", "_range", "_stream")

    def __init__(self, flat: FlatParameters, device: Gpu | None, clock: Stopwatch) -> None:
        self._flat, self._device, self._clock = flat, device, clock
        self._previous: int | None = None
        self._range: Any = None

    def __enter__(self) -> None:
        self._began, self._cpu = time.perf_counter(), time.thread_time()
        if recorder.is_on:
            self._previous = recorder.enter(UPDATE, self._began)
        if profiler._is_profiler_enabled:
            self._range = begin_range(UPDATE)
        self._flat.to_device()
        if self._device is not None:
            self._stream = self._device.computing(self._flat.compute_stream)
            self._stream.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._device is not None:
            self._stream.__exit__(kind, error, trace)
        if kind is None:
            self._flat.to_host()
        self._clock.cpu_seconds -= time.thread_time() - self._cpu
        ended = time.perf_counter()
        self._clock.seconds -= ended - self._began
        if self._previous is not None:
            recorder.enter(self._previous, ended)
        if self._range is not None:
            self._range.__exit__(kind, error, trace)


class EarlyGradients:
    """The notifications that tell a worker, during the backward pass, which gradients are complete.

    Args:
        worker: The worker of a method that declares ``takes_gradients_early``.
        boundary: The boundary around the work of the worker.
    """

    def __init__(self, worker: Worker, boundary: ExchangeBoundary) -> None:
        self._worker, self._boundary = worker, boundary

    def ready(self, layer: int) -> None:
        """Report that the gradient of a layer is in the vector."""
        if self._worker.gradient_ready(layer):
            with self._boundary.exchanging():
                self._worker.begin_ready()

    def complete(self) -> None:
        """Report that the backward pass has ended."""
        with self._boundary.exchanging(counts=True):
            self._worker.gradient_complete()
