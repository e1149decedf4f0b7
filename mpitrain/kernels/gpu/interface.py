"""The interface of mpitrain to a GPU. `CudaGpu` implements it; the tests implement it without a GPU.

Calls documented as "Start ..." are asynchronous, on CuPy's current stream of the calling thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np


class DeviceMemory(Protocol):
    """Memory of one GPU, and host memory that it can copy from and to."""

    index: int

    @property
    def identity(self) -> str:
        """The machine-wide name of this GPU, whatever index a process gives it."""

    def zeros(self, n: int, dtype: Any) -> Any:
        """Return (n,) zeros in an allocation of their own in device memory, which `handle` can export.

        Raises:
            UsageError: There is not enough memory.
        """

    def handle(self, array: Any) -> bytes:
        """Return the handle with which another process maps an array made by `zeros`."""

    def mapped(self, handle: bytes, n: int, dtype: Any) -> Any:
        """Return another process's array (n,), mapped in place. A process cannot map its own arrays."""

    def unmap(self, array: Any) -> None:
        """Undo `mapped`. The owner must not free its array before."""

    def page_locked(self, n: int, dtype: Any) -> np.ndarray:
        """Return (n,) zeros in page-locked host memory, which the GPU copies from and to directly."""

    def lock_pages(self, array: np.ndarray) -> None:
        """Page-lock existing host memory. Where the system refuses, copies are slower but correct."""

    def unlock_pages(self, array: np.ndarray) -> None:
        """Undo `lock_pages`."""


class Gpu(DeviceMemory, Protocol):
    """A GPU: its memory, its streams, and the order of work on them."""

    def copy(self, to: Any, source: Any) -> None:
        """Start copying bytes on the current stream; each side is a device array or page-locked memory."""

    def copy_out(self, to: np.ndarray, source: Any) -> Any:
        """Start copying to the host on a stream of its own, after the work so far on the current stream.

        Returns:
            The mark of the end of the copy.
        """

    def squares(self, x: Any, y: Any | None) -> float:
        """Return the sum of squares of ``x``, or of ``x - y``, both (n,), in float64. Waits for the result."""

    def synchronize(self) -> None:
        """Wait until all work started on the current stream is done."""

    def mark(self) -> Any:
        """Return a mark: a point in the current stream, for `after` and `wait_for`."""

    def after(self, mark: Any) -> None:
        """Make later work on the current stream start after a mark on any stream."""

    def wait_for(self, mark: Any) -> None:
        """Wait on the host until a mark is reached."""

    @contextmanager
    def exchanging(self, compute: int) -> Iterator[None]:
        """Put this thread's work on the exchange stream, after the work so far on the ``compute`` stream.

        Later work on ``compute`` runs after the exchange.

        Args:
            compute: The address of torch's stream.
        """
        yield

    @contextmanager
    def computing(self, compute: int) -> Iterator[None]:
        """Within `exchanging`, order work that others put on ``compute`` between the exchange before and after it.

        Args:
            compute: The address of torch's stream.
        """
        yield

    @contextmanager
    def in_background(self) -> Iterator[None]:
        """Put this thread's work on a stream of its own, and wait for it at the end."""
        yield
