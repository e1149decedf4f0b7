"""The CUDA back-end: compiling and launching kernels on CuPy arrays.

The generated source (`cuda_source`) becomes a CuPy RawKernel for each kernel and combination of dtypes. A launch waits
for nothing: a guarded kernel returns a `NonfiniteCount`, which waits when it is read.

CuPy is imported with the first launch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn

import numpy as np

from mpitrain.kernels.compile.cuda_source import OPTIONS, THREADS, pack_length, packs_at_once, source
from mpitrain.kernels.compile.equations import Equations
from mpitrain.kernels.compile.nonfinite_count import NonfiniteCount, thread_counters
from mpitrain.kernels.compile.storage import Storage, compute_type, storage_of

BLOCKS_PER_MULTIPROCESSOR: Final = 64  # four times what a multiprocessor of the A100 or H200 holds at once

Launch = Callable[[Sequence[Any], Sequence[float], int, Any], None]
"""``launch(arrays, scalars, size, counter)``; the (1,) uint64 counter is None for a kernel without a guard."""


@functools.cache
def launcher(name: str, equations: Equations, storages: tuple[Storage, ...]) -> Launch:
    """Return a function that launches the kernel on CuPy's current stream.

    CuPy compiles the kernel at the first launch and caches it on disk.
    """
    import cupy

    kernel = cupy.RawKernel(source(name, equations, storages), name, options=OPTIONS, backend="nvrtc")
    device_in_use = cupy.cuda.runtime.getDevice
    real = np.float32 if compute_type(storages) == "float32" else np.float64
    elements_per_block = THREADS * pack_length(storages) * packs_at_once(equations, storages)
    block = (THREADS,)

    @functools.cache
    def most_blocks(device: int) -> int:
        return BLOCKS_PER_MULTIPROCESSOR * int(cupy.cuda.Device(device).attributes["MultiProcessorCount"])

    def launch(arrays: Sequence[Any], scalars: Sequence[float], size: int, counter: Any) -> None:
        # RawKernel passes bytes on unchecked: each argument must have the size of the parameter's type.
        arguments = (*arrays, *map(real, scalars), *(() if counter is None else (counter,)), np.int64(size))
        device = arrays[0].data.device_id
        if counter is not None and counter.data.device_id != device:
            raise ValueError(
                f"{name}: the arrays are on GPU {device}, but this process uses another GPU; move the arrays there"
            )
        grid = (min(max(-(-size // elements_per_block), 1), most_blocks(device)),)
        if device == device_in_use():
            kernel(grid, block, arguments)
            return
        # A kernel must run on the device of its arrays.
        with cupy.cuda.Device(device):
            kernel(grid, block, arguments)
            if counter is not None:
                # The mark made after a guarded launch belongs to the device in use, so wait here.
                cupy.cuda.get_current_stream().synchronize()

    return launch


def run(name: str, equations: Equations, arrays: Sequence[Any], scalars: Sequence[float]) -> int | NonfiniteCount:
    """Start the kernel on device arrays, on the current stream; see `Kernel.__call__`."""
    # Empty arrays are launched too: an empty first call of a guarded kernel compiles it.
    return _start(_launch_for(name, equations, arrays), equations, arrays, scalars, arrays[0].size)


def prepare(name: str, equations: Equations, like: Any) -> None:
    """Compile the kernel for device arrays of the dtype of ``like`` (n,), by a launch without elements."""
    arrays = [like[:0]] * len(equations.arrays)
    _start(_launch_for(name, equations, arrays), equations, arrays, [0.0] * len(equations.scalars), 0)


def _start(
    launch: Launch, equations: Equations, arrays: Sequence[Any], scalars: Sequence[float], size: int
) -> int | NonfiniteCount:
    if equations.guard is None:
        launch(arrays, scalars, size, None)
        return 0
    counters = thread_counters()
    launch(arrays, scalars, size, counters.next())
    return counters.launched()


# Launches by the arrays' dtypes: hashing equations and storages would take longer than everything else. The values hold
# the equations, so that an id in a key is never reused. The launcher is part of the key because tests replace it.
_launches: dict[tuple[Any, ...], tuple[Launch, Equations]] = {}


def _launch_for(name: str, equations: Equations, arrays: Sequence[Any]) -> Launch:
    """Check the arrays and return the launch for their dtypes."""
    shape, kind = arrays[0].shape, type(arrays[0])
    if len(shape) != 1 or not _is_cupy_type(kind):
        _refuse(name, equations, arrays)
    for array in arrays:
        is_cupy = type(array) is kind or _is_cupy_type(type(array))
        if not is_cupy or array.shape != shape or not array.flags.c_contiguous:
            _refuse(name, equations, arrays)
    key = (launcher, id(equations), *[array.dtype for array in arrays])
    found = _launches.get(key)
    if found is None:
        storages = _storages(name, equations, arrays)
        found = _launches[key] = (launcher(name, equations, storages), equations)
    return found[0]


def _storages(name: str, equations: Equations, arrays: Sequence[Any]) -> tuple[Storage, ...]:
    storages: list[Storage] = []
    for label, array in zip(equations.arrays, arrays, strict=True):
        try:
            storages.append(storage_of(array.dtype))
        except ValueError as error:
            raise ValueError(f"{name}: {label}: {error}") from None
    return tuple(storages)


def _is_cupy_type(kind: type) -> bool:
    # Torch tensors have the interface too, even those on the host, but no flags.
    return hasattr(kind, "__cuda_array_interface__") and hasattr(kind, "flags")


def _refuse(name: str, equations: Equations, arrays: Sequence[Any]) -> NoReturn:
    """Raise a ValueError that names the first array at fault."""
    for label, array in zip(equations.arrays, arrays, strict=True):
        if not _is_cupy_type(type(array)):
            raise ValueError(
                f"{name}: {label} is a {type(array).__name__}; pass NumPy arrays only or CuPy arrays only "
                "(cupy.from_dlpack shares the memory of a tensor)"
            )
        if array.ndim != 1 or array.shape != arrays[0].shape or not array.flags.c_contiguous:
            raise ValueError(
                f"{name}: {label} has shape {array.shape}; arrays must be 1-D, contiguous and of one length"
            )
    raise AssertionError(f"{name}: refused for no reason")
