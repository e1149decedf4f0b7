"""The interface of mpitrain to a GPU. `CudaGpu` implements it; the tests implement it without a GPU.

Calls documented as "Start ..." are asynchronous, on CuPy's current stream of the calling thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np


class DeviceMemory(Protocol):
    """The memory of one GPU, and the host memory with which it exchanges data."""

    index: int

    @property
    def identity(self) -> str:
        """A name of this GPU that is the same in all processes of the machine."""

    def zeros(self, n: int, dtype: Any) -> Any:
        """Return (n,) zeros in a separate allocation of device memory, which `handle` can export.

        Raises:
            UsageError: Memory is insufficient.
        """

    def handle(self, array: Any) -> bytes:
        """Return the handle with which another process maps an array made by `zeros`."""

    def mapped(self, handle: bytes, n: int, dtype: Any) -> Any:
        """Return another process's array (n,), mapped in place. A process cannot map its own arrays."""

    def unmap(self, array: Any) -> None:
        """Undo `mapped`. The owner must not free its array before this call."""

    def page_locked(self, n: int, dtype: Any) -> np.ndarray:
        """Return (n,) zeros in page-locked host memory, which the GPU can access directly."""

    def lock_pages(self, array: np.ndarray) -> None:
        """Page-lock existing host memory. If the system refuses, copies are slower, but correct."""

    def unlock_pages(self, array: np.ndarray) -> None:
        """Undo `lock_pages`."""


class Gpu(DeviceMemory, Protocol):
    """A GPU: its memory, its streams, and the order of work on them."""

    def copy(self, to: Any, source: Any) -> None:
        """Start copying bytes on the current stream; each side is a device array or page-locked memory."""

    def copy_out(self, to: np.ndarray, source: Any) -> Any:
        """Start copying to the host on a separate stream, after the work so far on the current stream.

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
        """Run this thread's work inside the block on the exchange stream.

        It runs after the work so far on the stream ``compute``, and before later work on that stream.

        Args:
            compute: The address of torch's stream.
        """
        yield

    @contextmanager
    def computing(self, compute: int) -> Iterator[None]:
        """Let work on the stream ``compute`` run inside the block, between two parts of an exchange.

        The work starts after the exchange so far, and the exchange continues after the work. Call it inside
        `exchanging`.

        Args:
            compute: The address of torch's stream.
        """
        yield

    @contextmanager
    def in_background(self) -> Iterator[None]:
        """Run this thread's work inside the block on a separate stream, and wait for it at the end."""
        yield
