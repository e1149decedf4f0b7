"""Device memory and page-locked host memory, by CuPy and the CUDA runtime."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Final

import numpy as np

from mpitrain.errors import UsageError

ALLOCATION_BYTES: Final = 2 << 20
"""Allocations are whole blocks of the driver. Smaller ones may share a block, and a handle maps all of its block."""


class CudaMemory:
    """The memory of an NVIDIA GPU. Implements `DeviceMemory`, which documents the methods.

    Args:
        index: The index of the GPU among the visible GPUs.
    """

    def __init__(self, index: int) -> None:
        import cupy

        self.index = index
        self._cupy, self._runtime = cupy, cupy.cuda.runtime
        self._device = cupy.cuda.Device(index)

    @property
    def identity(self) -> str:
        """The address of the GPU on the PCI bus."""
        return str(self._runtime.deviceGetPCIBusId(self.index))

    def zeros(self, n: int, dtype: Any) -> Any:
        """Return (n,) zeros in a separate allocation. Raises UsageError if memory is insufficient."""
        n_bytes = n * np.dtype(dtype).itemsize
        with self._device:
            # CuPy's pool would return parts of larger allocations.
            size = -(-max(n_bytes, 1) // ALLOCATION_BYTES) * ALLOCATION_BYTES
            try:
                memory = self._cupy.cuda.Memory(size)
            except self._runtime.CUDARuntimeError as error:
                free, total = self._runtime.memGetInfo()
                raise UsageError(
                    f"cannot allocate {size >> 20} MiB on GPU {self.index} ({free >> 20} of {total >> 20} MiB are "
                    f"free; {error}): use a smaller model or batch, or fewer ranks per GPU; torch keeps the memory "
                    "that it has freed (torch.cuda.empty_cache() returns it)"
                ) from error
            array = self._cupy.ndarray((n,), dtype, self._cupy.cuda.MemoryPointer(memory, 0))
            stream = self._cupy.cuda.get_current_stream()
            if n:
                self._runtime.memsetAsync(array.data.ptr, 0, n_bytes, stream.ptr)
            stream.synchronize()
        return array

    def handle(self, array: Any) -> bytes:
        """Return the CUDA IPC handle of an array made by `zeros`."""
        with self._device:
            return bytes(self._runtime.ipcGetMemHandle(array.data.ptr))

    def mapped(self, handle: bytes, n: int, dtype: Any) -> Any:
        """Return another process's array (n,), mapped by CUDA IPC."""
        with self._device:
            address = self._runtime.ipcOpenMemHandle(handle)
            memory = self._cupy.cuda.UnownedMemory(address, n * np.dtype(dtype).itemsize, self, self.index)
            return self._cupy.ndarray((n,), dtype, self._cupy.cuda.MemoryPointer(memory, 0))

    def unmap(self, array: Any) -> None:
        """Undo `mapped`."""
        with self._device:
            self._runtime.ipcCloseMemHandle(array.data.ptr)

    def page_locked(self, n: int, dtype: Any) -> np.ndarray:
        """Return (n,) zeros in page-locked host memory."""
        with self._device:
            memory = self._cupy.cuda.alloc_pinned_memory(max(n * np.dtype(dtype).itemsize, 1))
        array = np.frombuffer(memory, np.uint8)[: n * np.dtype(dtype).itemsize].view(dtype)
        array[...] = 0
        return array

    def lock_pages(self, array: np.ndarray) -> None:
        """Page-lock existing host memory, if the system allows it."""
        if array.nbytes:
            with self._device, suppress(self._runtime.CUDARuntimeError):
                self._runtime.hostRegister(array.ctypes.data, array.nbytes, 0)

    def unlock_pages(self, array: np.ndarray) -> None:
        """Undo `lock_pages`."""
        if array.nbytes:
            with self._device, suppress(self._runtime.CUDARuntimeError):
                self._runtime.hostUnregister(array.ctypes.data)
