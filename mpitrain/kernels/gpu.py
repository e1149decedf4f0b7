"""What mpitrain uses of a GPU: memory that other processes can map, page-locked host memory, and the order of things.

A GPU works through streams, and the host runs ahead of it. Two streams of a process matter here::

    compute     backward | ............................ | local step, forward      torch's current stream
                         v                              ^
    exchange             | the method's kernels, copies |                          of this module

``exchanging`` draws the two arrows with events: the exchange sees the finished gradient, the next forward pass the
exchanged parameters, and neither waits on the host. The third arrow, from the GPU to whoever is not on it, is `settle`:
it must come before MPI or another process may touch device memory, and before a lock of such memory is given back. It
waits for the current stream only, never for the device. Nothing is needed in the other direction: MPI's blocking calls
and the locks return on the host, and what is launched afterwards comes afterwards.

CuPy is imported with the first GPU. `current` is the one of this process.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, Protocol

import numpy as np

from mpitrain.errors import UsageError

ALLOCATION_BYTES: Final = 2 << 20
"""Allocations are whole blocks of the driver: smaller ones may share a block, and its handle maps all of it."""


class Gpu(Protocol):
    """A GPU; `CudaGpu` is one, and tests have one in host memory."""

    index: int

    @property
    def identity(self) -> str:
        """Which of the machine's GPUs this is, whatever the processes call it."""

    def zeros(self, n: int, dtype: Any) -> Any:
        """(n,) zeros in device memory of their own, which `handle` can export."""

    def handle(self, array: Any) -> bytes:
        """What another process needs to map an array made by `zeros`."""

    def mapped(self, handle: bytes, n: int, dtype: Any) -> Any:
        """(n,) the array of another process, in place."""

    def unmap(self, array: Any) -> None:
        """Undo `mapped`; the owner frees its array afterwards."""

    def page_locked(self, n: int, dtype: Any) -> np.ndarray:
        """(n,) zeros in host memory that the GPU copies from and to by itself."""

    def lock_pages(self, array: np.ndarray) -> None:
        """Make host memory like that of `page_locked`. Where the system refuses, copies are slower and still right."""

    def unlock_pages(self, array: np.ndarray) -> None:
        """Undo `lock_pages`."""

    def copy(self, to: Any, source: Any) -> None:
        """Begin to copy bytes on the current stream; each side is a device array or page-locked memory."""

    def copy_out(self, to: np.ndarray, source: Any) -> Any:
        """Begin to copy to the host beside the current stream, after what was begun on it; the mark of its end."""

    def squares(self, x: Any, y: Any | None) -> float:
        """The sum of the squares of ``x``, or of ``x - y``, both (n,), in float64."""

    def synchronize(self) -> None:
        """Wait until the current stream has done all that was begun on it."""

    def mark(self) -> Any:
        """A point in the current stream, for `after` and `wait_for`."""

    def after(self, mark: Any) -> None:
        """What is begun on the current stream from now on begins after a mark, of whichever stream."""

    def wait_for(self, mark: Any) -> None:
        """Wait on the host until a mark is reached."""

    @contextmanager
    def exchanging(self, compute: int) -> Iterator[None]:
        """Inside, this thread's work is on the exchange stream, after what ``compute`` was given so far.

        What ``compute`` is given later comes after all of it.

        Args:
            compute: The address of torch's stream.
        """
        yield

    @contextmanager
    def computing(self, compute: int) -> Iterator[None]:
        """Inside ``exchanging``: work that others begin on ``compute`` comes after the exchange so far, and the
        exchange goes on after it."""
        yield

    @contextmanager
    def in_background(self) -> Iterator[None]:
        """Inside, this thread's work is on a stream of its own; all of it is done at the end."""
        yield


class CudaGpu:
    """A GPU of NVIDIA's, by CuPy. See `Gpu`.

    Args:
        index: Among the visible ones.
    """

    def __init__(self, index: int) -> None:
        import cupy

        self.index = index
        self._cupy, self._runtime = cupy, cupy.cuda.runtime
        self._device = cupy.cuda.Device(index)
        with self._device:
            self._exchange, self._out = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
            self._events = [cupy.cuda.Event(disable_timing=True) for _ in range(2)]
        self._of_thread = threading.local()

    @property
    def identity(self) -> str:
        """Its address on the PCI bus."""
        return str(self._runtime.deviceGetPCIBusId(self.index))

    def zeros(self, n: int, dtype: Any) -> Any:
        """(n,) zeros in device memory of their own, which `handle` can export.

        Raises:
            UsageError: There is no room.
        """
        n_bytes = n * np.dtype(dtype).itemsize
        with self._device:
            # Not from CuPy's pool: its blocks are parts of larger allocations.
            size = -(-max(n_bytes, 1) // ALLOCATION_BYTES) * ALLOCATION_BYTES
            try:
                memory = self._cupy.cuda.Memory(size)
            except self._runtime.CUDARuntimeError as error:
                free, total = self._runtime.memGetInfo()
                raise UsageError(
                    f"no {size >> 20} MiB of memory on GPU {self.index} ({free >> 20} of {total >> 20} MiB are free; "
                    f"{error}): use a smaller model or batch, or fewer ranks a GPU; "
                    "torch keeps what it has freed (torch.cuda.empty_cache())"
                ) from error
            array = self._cupy.ndarray((n,), dtype, self._cupy.cuda.MemoryPointer(memory, 0))
            if n:
                self._runtime.memsetAsync(array.data.ptr, 0, n_bytes, self._stream())
            self.synchronize()
        return array

    def handle(self, array: Any) -> bytes:
        """What another process needs to map an array made by `zeros`."""
        with self._device:
            return bytes(self._runtime.ipcGetMemHandle(array.data.ptr))

    def mapped(self, handle: bytes, n: int, dtype: Any) -> Any:
        """(n,) the array of another process, in place. A process cannot map what is its own."""
        with self._device:
            address = self._runtime.ipcOpenMemHandle(handle)
            memory = self._cupy.cuda.UnownedMemory(address, n * np.dtype(dtype).itemsize, self, self.index)
            return self._cupy.ndarray((n,), dtype, self._cupy.cuda.MemoryPointer(memory, 0))

    def unmap(self, array: Any) -> None:
        """Undo `mapped`; the owner frees its array afterwards."""
        with self._device:
            self._runtime.ipcCloseMemHandle(array.data.ptr)

    def page_locked(self, n: int, dtype: Any) -> np.ndarray:
        """(n,) zeros in host memory that the GPU copies from and to by itself."""
        with self._device:
            memory = self._cupy.cuda.alloc_pinned_memory(max(n * np.dtype(dtype).itemsize, 1))
        array = np.frombuffer(memory, np.uint8)[: n * np.dtype(dtype).itemsize].view(dtype)
        array[...] = 0
        return array

    def lock_pages(self, array: np.ndarray) -> None:
        """Make host memory like that of `page_locked`. Where the system refuses, copies are slower and still right."""
        if array.nbytes:
            with self._device, suppress(self._runtime.CUDARuntimeError):
                self._runtime.hostRegister(array.ctypes.data, array.nbytes, 0)

    def unlock_pages(self, array: np.ndarray) -> None:
        """Undo `lock_pages`."""
        if array.nbytes:
            with self._device, suppress(self._runtime.CUDARuntimeError):
                self._runtime.hostUnregister(array.ctypes.data)

    def copy(self, to: Any, source: Any) -> None:
        """Begin to copy bytes on the current stream; each side is a device array or page-locked memory."""
        if to.nbytes:
            kind = self._runtime.memcpyDefault
            self._runtime.memcpyAsync(address_of(to), address_of(source), to.nbytes, kind, self._stream())

    def copy_out(self, to: np.ndarray, source: Any) -> Any:
        """Begin to copy to the host beside the current stream, after what was begun on it; the mark of its end."""
        self._runtime.streamWaitEvent(self._out.ptr, self.mark().ptr)
        with self._out:
            self.copy(to, source)
            return self.mark()

    def squares(self, x: Any, y: Any | None) -> float:
        """The sum of the squares of ``x``, or of ``x - y``, both (n,), in float64."""
        of_one, of_two = _squares_kernels()
        # CuPy's reductions do not know bfloat16 everywhere.
        given = [v if v.dtype.itemsize >= 4 else v.astype(np.float32) for v in (x, y) if v is not None]
        return float((of_one if y is None else of_two)(*given))

    def synchronize(self) -> None:
        """Wait until the current stream has done all that was begun on it."""
        self._cupy.cuda.get_current_stream().synchronize()

    def mark(self) -> Any:
        """A point in the current stream, for `after` and `wait_for`."""
        event = self._cupy.cuda.Event(disable_timing=True)
        event.record()
        return event

    def after(self, mark: Any) -> None:
        """What is begun on the current stream from now on begins after a mark, of whichever stream."""
        self._runtime.streamWaitEvent(self._stream(), mark.ptr)

    def wait_for(self, mark: Any) -> None:
        """Wait on the host until a mark is reached."""
        mark.synchronize()

    @contextmanager
    def exchanging(self, compute: int) -> Iterator[None]:
        """See `Gpu.exchanging`."""
        with self._device, self._exchange:
            self._order(compute, self._exchange.ptr, self._events[0])
            try:
                yield
            finally:
                self._order(self._exchange.ptr, compute, self._events[1])

    @contextmanager
    def computing(self, compute: int) -> Iterator[None]:
        """See `Gpu.computing`."""
        self._order(self._exchange.ptr, compute, self._events[1])
        try:
            yield
        finally:
            self._order(compute, self._exchange.ptr, self._events[0])

    @contextmanager
    def in_background(self) -> Iterator[None]:
        """See `Gpu.in_background`."""
        with self._device:
            stream = getattr(self._of_thread, "stream", None)
            if stream is None:
                stream = self._of_thread.stream = self._cupy.cuda.Stream(non_blocking=True)
            with stream:
                try:
                    yield
                finally:
                    stream.synchronize()

    def _stream(self) -> int:
        address: int = self._cupy.cuda.get_current_stream().ptr
        return address

    def _order(self, first: int, second: int, event: Any) -> None:
        """What stream ``second`` is given from now on comes after what ``first`` was given so far."""
        self._runtime.eventRecord(event.ptr, first)
        self._runtime.streamWaitEvent(second, event.ptr)


@functools.cache
def _squares_kernels() -> tuple[Any, Any]:
    from cupy import ReductionKernel

    difference = "((double)x - (double)y)"
    of_one = ReductionKernel("T x", "float64 s", "(double)x * (double)x", "a + b", "s = a", "0", "squares")
    of_two = ReductionKernel(
        "T x, T y", "float64 s", f"{difference} * {difference}", "a + b", "s = a", "0", "squared_distance"
    )
    return of_one, of_two


_current: Gpu | None = None


def use(index: int) -> Gpu:
    """Make a GPU this process's. It has one, from the first call on."""
    global _current
    if _current is None or _current.index != index:
        _current = CudaGpu(index)
    return _current


def current() -> Gpu:
    """This process's GPU: that of `use`, or the one that CuPy works on."""
    if _current is None:
        import cupy

        return use(cupy.cuda.Device().id)
    return _current


def is_device(array: Any) -> bool:
    """Whether an array lies in device memory."""
    # The type and not the array: to ask a CuPy array for the interface is to ask the driver.
    return type(array) is not np.ndarray and hasattr(type(array), "__cuda_array_interface__")


def address_of(array: Any) -> int:
    """Where an array begins, in host or device memory."""
    address: int = array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr
    return address


def assign(to: Any, values: Any) -> None:
    """``to[...] = values``, wherever each lies."""
    if is_device(to):
        if isinstance(values, np.ndarray):
            to.set(np.ascontiguousarray(np.broadcast_to(values, to.shape), to.dtype))
        else:
            to[...] = values
    else:
        to[...] = values.get() if is_device(values) else values


def to_host(array: Any) -> np.ndarray:
    """A vector as a NumPy array: itself, or a copy of what lies in device memory."""
    host: np.ndarray = array.get() if is_device(array) else array
    return host


def synchronize(array: Any) -> None:
    """Let MPI and other processes touch an array: wait for what the GPU has begun on the current stream. Local.

    Host memory needs nothing.
    """
    if is_device(array):
        current().synchronize()
