"""The boundary between what torch does in a step and what the method's worker does.

    torch      forward, backward | ........................................... | forward, backward
                                 v exchanging                                  ^
    worker                       | before_update |  ............  | after_update |
                                                 v computing      ^
    torch                                        | local update   |

Each crossing has to bring the vectors across, keep the streams of a GPU in order, and start or stop the clock.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from mpitrain.algorithms.base.worker import Worker
from mpitrain.kernels.gpu import Gpu
from mpitrain.optimizer.flat import FlatParameters


@dataclass
class Stopwatch:
    """A number of seconds that several measurements add to."""

    seconds: float = 0.0


class ExchangeBoundary:
    """Surrounds all that a worker does, and the local update inside it.

    Args:
        flat: The parameters and gradients.
        device: The GPU that the worker's vectors are on; None where they are in host memory.

    Attributes:
        clock: The time of exchanges that count.
    """

    def __init__(self, flat: FlatParameters, device: Gpu | None) -> None:
        self._flat, self._device = flat, device
        self.clock = Stopwatch()

    @contextmanager
    def exchanging(self, *, copies: bool = False, counts: bool = False) -> Iterator[None]:
        """Run the block as the worker's.

        Args:
            copies: The block reads gradients or changes parameters. Where the model is on a GPU and the worker's
                vectors in host memory, they are copied there before the block and back after it.
            counts: Add the block's time to the clock, without that of ``computing`` inside it.
        """
        began = time.perf_counter()
        try:
            if copies:
                self._flat.to_host()
            with nullcontext() if self._device is None else self._device.exchanging(self._flat.compute_stream):
                yield
            if copies:
                self._flat.to_device()
        finally:
            if counts:
                self.clock.seconds += time.perf_counter() - began

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Inside ``exchanging``, run the block as torch's, on the parameters so far; the clock stands still."""
        began = time.perf_counter()
        try:
            self._flat.to_device()
            with nullcontext() if self._device is None else self._device.computing(self._flat.compute_stream):
                yield
            self._flat.to_host()
        finally:
            self.clock.seconds -= time.perf_counter() - began


class EarlyGradients:
    """Tells a worker during the backward pass which gradients are in the vector.

    Args:
        worker: Of a method that ``takes_gradients_early``.
        boundary: Around what the worker does with them.
    """

    def __init__(self, worker: Worker, boundary: ExchangeBoundary) -> None:
        self._worker, self._boundary = worker, boundary

    def ready(self, layer: int) -> None:
        """Report that a layer's gradient is in the vector."""
        if self._worker.gradient_ready(layer):
            with self._boundary.exchanging():
                self._worker.begin_ready()

    def complete(self) -> None:
        """Report that the backward pass has ended."""
        with self._boundary.exchanging(counts=True):
            self._worker.gradient_complete()
