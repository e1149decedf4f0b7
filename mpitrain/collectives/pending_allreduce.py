"""A non-blocking all-reduce, which MPI performs in the background."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
from mpi4py import MPI

from mpitrain import kernels
from mpitrain.collectives.rma.device_window import AnyWindow
from mpitrain.collectives.world.statistics import Statistics
from mpitrain.kernels import gpu

if TYPE_CHECKING:
    from mpitrain.collectives.world.world import World

LARGEST_COUNT = 1 << 30
"""Elements of one MPI_Iallreduce: counts are 32-bit before MPI 4."""


class PendingAllReduce:
    """An all-reduce in progress. Collective to create.

    Args:
        world: The ranks.
        window: The window to sum over all ranks, in place. It must not be used until ``wait`` returns.
        scale: The factor by which the sum is multiplied.
        statistics: The counters of bytes and waiting.
    """

    def __init__(self, world: World, window: AnyWindow, scale: float, statistics: Statistics) -> None:
        n_bytes = window.local.nbytes
        statistics.n_exchanges += 1
        statistics.bytes_sent += 2 * (world.size - 1) * n_bytes // world.size
        self._world, self._window, self._scale, self._statistics = world, window, scale, statistics
        # Not every MPI adds 16-bit types, and MPI might use device memory from any thread: sum float32 on the host.
        self._sum = gpu.to_host(window.local)
        if window.dtype.itemsize < 4:
            self._sum = self._sum.astype(np.float32)
        self._requests = [
            world.comm.Iallreduce(MPI.IN_PLACE, self._sum[at : at + LARGEST_COUNT])
            for at in range(0, self._sum.size, LARGEST_COUNT)
        ]

    def wait(self) -> None:
        """Wait for the sum. Collective; calling it again has no effect."""
        if not self._requests:
            return
        began = time.perf_counter()
        with self._world.polling(), self._world.waiting("an all-reduce in the background"):
            MPI.Request.Waitall(self._requests)
        self._requests.clear()
        self._statistics.add_wait(began)
        if self._scale != 1.0:
            kernels.scale(self._sum, self._scale)
        if self._sum is not self._window.local:
            gpu.assign(self._window.local, self._sum)
