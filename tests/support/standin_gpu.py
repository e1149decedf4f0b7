"""A stand-in GPU in host memory, for tests without a GPU: code above `kernels.gpu` and `compile.cuda` runs unchanged.

It is faithful in the things that cause errors:

- Work is queued on streams and executed only when something waits for it. Code that forgets to wait before another
  process reads, or to order two streams, sees the old bytes in every run.
- Arrays have ``__cuda_array_interface__`` (with an address that MPI can read, so the path of a CUDA-aware MPI runs) and
  refuse what CuPy refuses: implicit conversion to NumPy arrays, and assignment of NumPy arrays.
- Other processes map memory through a handle, as with CUDA IPC.

It is not faithful in speed, nor for torch. Torch sees the memory as host tensors and computes at once, so ordering
torch after an exchange waits for the exchange.
"""

from __future__ import annotations

import itertools
import mmap
import os
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mpitrain.kernels import gpu
from mpitrain.kernels.compile import cuda, reference

FOLDER = Path("/dev/shm") if os.path.isdir("/dev/shm") else Path(tempfile.gettempdir())


class Stream:
    """A queue of work that is executed in order when something waits for it."""

    def __init__(self) -> None:
        self._queue: deque[Callable[[], object]] = deque()
        self._lock = threading.RLock()
        self.n_begun = 0
        self.n_done = 0

    def begin(self, work: Callable[[], object]) -> None:
        with self._lock:
            self._queue.append(work)
            self.n_begun += 1

    def reach(self, position: int) -> None:
        """Execute the work up to a position."""
        with self._lock:
            while self.n_done < position:
                self._queue.popleft()()
                self.n_done += 1


Mark = tuple[Stream, int]

_threads = threading.local()
_numbers = itertools.count()  # of allocations: names are not reused


def current_stream() -> Stream:
    """Return the current stream of this thread."""
    if not hasattr(_threads, "stream"):
        _threads.stream = Stream()
    stream: Stream = _threads.stream
    return stream


@contextmanager
def on(stream: Stream) -> Iterator[None]:
    """Make ``stream`` the current stream of this thread inside the block."""
    before = current_stream()
    _threads.stream = stream
    try:
        yield
    finally:
        _threads.stream = before


class DeviceArray:
    """The attributes of a ``cupy.ndarray`` that mpitrain uses, around a NumPy array that only this module may read."""

    def __init__(self, host: np.ndarray) -> None:
        self.host = host

    dtype = property(lambda self: self.host.dtype)
    shape = property(lambda self: self.host.shape)
    ndim = property(lambda self: self.host.ndim)
    size = property(lambda self: self.host.size)
    nbytes = property(lambda self: self.host.nbytes)
    itemsize = property(lambda self: self.host.itemsize)
    flags = property(lambda self: _Flags(self.host.flags.c_contiguous))
    data = property(lambda self: _Pointer(self.host.ctypes.data))
    device = property(lambda self: _Device())

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        interface = self.host.__array_interface__
        return {key: interface[key] for key in ("shape", "typestr", "data", "strides")} | {"version": 3}

    def __dlpack__(self, **options: Any) -> Any:
        options.pop("stream", None)
        return self.host.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.host.__dlpack_device__()

    def __len__(self) -> int:
        return len(self.host)

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed: use .get()")

    def __array_ufunc__(self, ufunc: Any, *_: Any, **__: Any) -> Any:
        raise TypeError(f"numpy.{ufunc.__name__} of device arrays: use a kernel")

    def __array_function__(self, function: Any, _: Any, args: Any, options: Any) -> Any:
        if function not in (np.zeros_like, np.empty_like):
            raise TypeError(f"numpy.{function.__name__} of device arrays: use a kernel")
        like, *rest = args
        # Like CuPy, treat the shape 0 as not given.
        made = DeviceArray(np.zeros(options.get("shape") or like.shape, options.get("dtype", like.dtype)))
        assert not rest
        if function is np.empty_like:
            made.host.view(np.uint8).reshape(-1)[...] = 0xA5  # makes reads of unwritten memory visible
        return made

    def __getitem__(self, index: Any) -> DeviceArray:
        return DeviceArray(self.host[index])

    def __setitem__(self, index: Any, value: Any) -> None:
        to = self.host[index]
        if isinstance(value, DeviceArray):
            source = value.host
            current_stream().begin(lambda: np.copyto(to, source, casting="unsafe"))
        elif np.isscalar(value):
            current_stream().begin(lambda: to.fill(value))
        else:
            raise TypeError(f"a device array cannot be assigned a {type(value).__name__}: use .set()")

    def __iadd__(self, other: DeviceArray) -> DeviceArray:
        raise TypeError("device arrays are not added: use a kernel")

    def view(self, dtype: Any) -> DeviceArray:
        return DeviceArray(self.host.view(dtype))

    def reshape(self, *shape: int) -> DeviceArray:
        return DeviceArray(self.host.reshape(*shape))

    def astype(self, dtype: Any) -> DeviceArray:
        made = DeviceArray(np.empty(self.shape, dtype))
        made[...] = self
        return made

    def copy(self) -> DeviceArray:
        made = DeviceArray(np.empty_like(self.host))
        made[...] = self
        return made

    def fill(self, value: float) -> None:
        self[...] = value

    def get(self) -> np.ndarray:
        stream = current_stream()
        stream.reach(stream.n_begun)
        return self.host.copy()

    def set(self, values: np.ndarray) -> None:
        if type(values) is not np.ndarray or values.shape != self.shape or values.dtype != self.dtype:
            raise TypeError(f"set needs a NumPy array of {self.shape} {self.dtype}")
        taken, to = values.copy(), self.host
        current_stream().begin(lambda: np.copyto(to, taken))

    def __float__(self) -> float:
        return float(self.get())


class _Flags:
    def __init__(self, c_contiguous: bool) -> None:
        self.c_contiguous = c_contiguous


class _Pointer:
    def __init__(self, ptr: int) -> None:
        self.ptr = ptr


class _Device:
    id = 0

    def __enter__(self) -> _Device:
        return self

    def __exit__(self, *_: Any) -> None:
        return None


class StandInGpu:
    """A GPU in host memory. Implements ``kernels.gpu.Gpu``.

    Args:
        maps: Whether processes can map each other's memory.
    """

    index = 0
    identity = "0000:00:00.0"

    def __init__(self, *, maps: bool = True) -> None:
        self.maps = maps
        self.compute, self.exchange, self._out = Stream(), Stream(), Stream()
        self._names: dict[int, str] = {}
        self.page_locked_memory: list[np.ndarray] = []

    def zeros(self, n: int, dtype: Any) -> DeviceArray:
        path = FOLDER / f"mpitrain-test-{os.getpid()}-{next(_numbers)}"
        n_bytes = max(n * np.dtype(dtype).itemsize, 1)
        path.write_bytes(bytes(n_bytes))
        array = _open(path, n, dtype)
        self._names[array.data.ptr] = str(path)
        weakref.finalize(array.host, path.unlink, missing_ok=True)
        return array

    def handle(self, array: DeviceArray) -> bytes:
        if not self.maps:
            raise RuntimeError("cudaErrorNotSupported: operation not supported")
        return self._names[array.data.ptr].encode()

    def mapped(self, handle: bytes, n: int, dtype: Any) -> DeviceArray:
        return _open(Path(handle.decode()), n, dtype)

    def unmap(self, array: DeviceArray) -> None:
        array.host = np.zeros(0)

    def page_locked(self, n: int, dtype: Any) -> np.ndarray:
        array = np.zeros(n, dtype)
        self.lock_pages(array)
        return array

    def lock_pages(self, array: np.ndarray) -> None:
        self.page_locked_memory.append(array)

    def unlock_pages(self, array: np.ndarray) -> None:
        self.page_locked_memory = [a for a in self.page_locked_memory if a is not array]

    def copy(self, to: Any, source: Any) -> None:
        raws = [self._bytes(array) for array in (to, source)]
        assert raws[0].size == raws[1].size
        current_stream().begin(lambda: np.copyto(*raws))

    def copy_out(self, to: np.ndarray, source: DeviceArray) -> Mark:
        mark = self.mark()
        with on(self._out):
            self.after(mark)
            self.copy(to, source)
            return self.mark()

    def _bytes(self, array: Any) -> np.ndarray:
        """Return the bytes of one side of a copy; host memory must be page-locked."""
        if isinstance(array, DeviceArray):
            return array.host.view(np.uint8)
        assert array.flags.c_contiguous
        start, end = array.ctypes.data, array.ctypes.data + array.nbytes
        assert any(
            locked.ctypes.data <= start and end <= locked.ctypes.data + locked.nbytes
            for locked in self.page_locked_memory
        ), "the GPU copies to or from pageable memory"
        return np.asarray(array.view(np.uint8))

    def squares(self, x: DeviceArray, y: DeviceArray | None) -> float:
        self.synchronize()
        difference = x.host.astype(np.float64)
        if y is not None:
            difference -= y.host
        return float(difference @ difference)

    def synchronize(self) -> None:
        self.wait_for(self.mark())

    def mark(self) -> Mark:
        return current_stream(), current_stream().n_begun

    def after(self, mark: Mark) -> None:
        stream, position = mark
        if stream is not current_stream():
            current_stream().begin(lambda: stream.reach(position))

    def wait_for(self, mark: Mark) -> None:
        stream, position = mark
        stream.reach(position)

    @contextmanager
    def exchanging(self, compute: int) -> Iterator[None]:
        with on(self.exchange):
            self.after((self.compute, self.compute.n_begun))
            try:
                yield
            finally:
                self.synchronize()  # torch computes on the host next and would not wait

    @contextmanager
    def computing(self, compute: int) -> Iterator[None]:
        self.synchronize()
        try:
            yield
        finally:
            self.after((self.compute, self.compute.n_begun))

    @contextmanager
    def in_background(self) -> Iterator[None]:
        with on(Stream()):
            try:
                yield
            finally:
                self.synchronize()


def _open(path: Path, n: int, dtype: Any) -> DeviceArray:
    with path.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), 0)
    return DeviceArray(np.frombuffer(memory, np.uint8)[: n * np.dtype(dtype).itemsize].view(dtype))


def launcher(name: str, equations: Any, storages: Sequence[Any]) -> Callable[..., None]:
    """Replace ``kernels.compile.cuda.launcher`` by deferred calls of the reference."""
    dtypes = [ml_dtypes.bfloat16 if s.name == "bfloat16" else s.name for s in storages]

    def launch(arrays: Sequence[DeviceArray], scalars: Sequence[float], size: int, counter: DeviceArray | None) -> None:
        assert all(isinstance(array, DeviceArray) and array.size == size for array in arrays)
        hosts = [array.host.view(dtype) for array, dtype in zip(arrays, dtypes, strict=True)]

        def work() -> None:
            with np.errstate(all="ignore"):
                n_nonfinite = reference.evaluate(equations, hosts, list(scalars))
            if counter is not None:
                counter.host[0] += n_nonfinite

        current_stream().begin(work)

    return launch


@pytest.fixture
def standin_gpu(monkeypatch: pytest.MonkeyPatch) -> StandInGpu:
    """Make a stand-in the GPU of this process, `kernels.gpu.current()`, and return it."""
    return install(monkeypatch, StandInGpu())


def install(monkeypatch: pytest.MonkeyPatch, device: StandInGpu) -> StandInGpu:
    """Make a stand-in the GPU of this process."""
    monkeypatch.setattr(gpu, "_current", device)
    monkeypatch.setattr(cuda, "launcher", launcher)
    return device
