"""Streams, events and copies of an NVIDIA GPU, by CuPy and the CUDA runtime."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from mpitrain.kernels.gpu.arrays import address_of
from mpitrain.kernels.gpu.cuda_memory import CudaMemory


class CudaGpu(CudaMemory):
    """An NVIDIA GPU. Implements `Gpu`, which documents the methods.

    Args:
        index: The index of the GPU among the visible GPUs.
    """

    def __init__(self, index: int) -> None:
        super().__init__(index)
        with self._device:
            self._exchange, self._out = (self._cupy.cuda.Stream(non_blocking=True) for _ in range(2))
            self._events = [self._cupy.cuda.Event(disable_timing=True) for _ in range(2)]
        self._per_thread = threading.local()

    def copy(self, to: Any, source: Any) -> None:
        """Start copying bytes on the current stream."""
        if to.nbytes:
            kind = self._runtime.memcpyDefault
            self._runtime.memcpyAsync(address_of(to), address_of(source), to.nbytes, kind, self._stream())

    def copy_out(self, to: np.ndarray, source: Any) -> Any:
        """Start copying to the host on a separate stream, and return the mark of its end."""
        self._runtime.streamWaitEvent(self._out.ptr, self.mark().ptr)
        with self._out:
            self.copy(to, source)
            return self.mark()

    def squares(self, x: Any, y: Any | None) -> float:
        """Return the sum of squares of ``x``, or of ``x - y``."""
        of_one, of_two = _squares_kernels()
        # Not all of CuPy's reductions support bfloat16.
        given = [v if v.dtype.itemsize >= 4 else v.astype(np.float32) for v in (x, y) if v is not None]
        return float((of_one if y is None else of_two)(*given))

    def synchronize(self) -> None:
        """Wait until all work started on the current stream is done."""
        self._cupy.cuda.get_current_stream().synchronize()

    def mark(self) -> Any:
        """Return an event recorded on the current stream."""
        event = self._cupy.cuda.Event(disable_timing=True)
        event.record()
        return event

    def after(self, mark: Any) -> None:
        """Make later work on the current stream start after a mark."""
        self._runtime.streamWaitEvent(self._stream(), mark.ptr)

    def wait_for(self, mark: Any) -> None:
        """Wait on the host until a mark is reached."""
        mark.synchronize()

    @contextmanager
    def exchanging(self, compute: int) -> Iterator[None]:
        """Run this thread's work in the block on the exchange stream, between earlier and later work on ``compute``."""
        with self._device, self._exchange:
            self._order(compute, self._exchange.ptr, self._events[0])
            try:
                yield
            finally:
                self._order(self._exchange.ptr, compute, self._events[1])

    @contextmanager
    def computing(self, compute: int) -> Iterator[None]:
        """Run work on the stream ``compute`` inside the block, between two parts of an exchange."""
        self._order(self._exchange.ptr, compute, self._events[1])
        try:
            yield
        finally:
            self._order(compute, self._exchange.ptr, self._events[0])

    @contextmanager
    def in_background(self) -> Iterator[None]:
        """Run this thread's work inside the block on a separate stream, and wait for it at the end."""
        with self._device:
            stream = getattr(self._per_thread, "stream", None)
            if stream is None:
                stream = self._per_thread.stream = self._cupy.cuda.Stream(non_blocking=True)
            with stream:
                try:
                    yield
                finally:
                    stream.synchronize()

    def _stream(self) -> int:
        """Return the address of CuPy's current stream."""
        address: int = self._cupy.cuda.get_current_stream().ptr
        return address

    def _order(self, first: int, second: int, event: Any) -> None:
        """Make later work on stream ``second`` start after the work so far on stream ``first``."""
        self._runtime.eventRecord(event.ptr, first)
        self._runtime.streamWaitEvent(second, event.ptr)


@functools.cache
def _squares_kernels() -> tuple[Any, Any]:
    """Return CuPy reductions to a float64: the sum of x^2, and of (x - y)^2."""
    from cupy import ReductionKernel

    difference = "((double)x - (double)y)"
    of_one = ReductionKernel("T x", "float64 s", "(double)x * (double)x", "a + b", "s = a", "0", "squares")
    of_two = ReductionKernel(
        "T x, T y", "float64 s", f"{difference} * {difference}", "a + b", "s = a", "0", "squared_distance"
    )
    return of_one, of_two
