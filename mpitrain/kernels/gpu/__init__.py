"""The GPU runtime: memory that other processes can map, page-locked host memory, streams and their order.

A GPU executes streams, and the host runs ahead of it. Two streams of a process matter here::

    compute     backward | ............................ | local step, forward      torch's current stream
                         v                              ^
    exchange             | the method's kernels, copies |                          created by this package

`Gpu.exchanging` draws the two arrows with events: the exchange sees the finished gradient, the next forward pass sees
the exchanged parameters, and the host waits for neither. The third arrow, from the GPU to other processes, is
`synchronize`. It is needed before MPI or another process may touch device memory, and before a lock on such memory is
released. It waits for the current stream only, never for the whole device. Nothing is needed in the other direction:
MPI's blocking calls and the locks return on the host, and work launched later runs later.

CuPy is imported with the first GPU. `current` returns the GPU of this process.
"""

from __future__ import annotations

from typing import Any

from mpitrain.kernels.gpu.arrays import address_of, assign, is_device, to_host
from mpitrain.kernels.gpu.cuda_gpu import CudaGpu
from mpitrain.kernels.gpu.interface import DeviceMemory, Gpu

__all__ = [
    "DeviceMemory",
    "Gpu",
    "address_of",
    "assign",
    "current",
    "is_device",
    "synchronize",
    "to_host",
    "use",
]

_current: Gpu | None = None


def use(index: int) -> Gpu:
    """Select the GPU of this process, and return it."""
    global _current
    if _current is None or _current.index != index:
        _current = CudaGpu(index)
    return _current


def current() -> Gpu:
    """Return the GPU of this process: the one selected by `use`, else CuPy's current device."""
    if _current is None:
        import cupy

        return use(cupy.cuda.Device().id)
    return _current


def synchronize(array: Any) -> None:
    """Wait for the current stream, so that MPI and other processes may use `array`. Local.

    It does nothing for an array in host memory.
    """
    if is_device(array):
        current().synchronize()
