"""Vectors in GPU memory that other ranks can reach.

``DeviceWindow`` is to GPUs what ``rma.window.Window`` is to hosts. Where CUDA IPC maps the memory of a peer,
``of(peer)`` is the peer's array itself, so that one kernel reads and writes both. Elsewhere a *mirror*, an ordinary
window in page-locked host memory, stands for the vector: peers read there the values that its owner published last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from mpi4py import MPI

from mpitrain.collectives.rma.remote_copies import pieces_of
from mpitrain.collectives.rma.window import Window

if TYPE_CHECKING:
    from mpitrain.collectives.world.world import World


class DeviceWindow:
    """An array in device memory on every rank. Collective to create and to free.

    Args:
        world: The ranks; each has a GPU.
        n: The number of elements on this rank; ranks may differ.
        dtype: The type of the elements, the same on all ranks.
        mirrored: Whether to keep a mirror in host memory for peers that cannot map the array. They read there the
            values that the owner published last.

    Attributes:
        local: (n,) this rank's array, initially zeros.
        mirror: The mirror in host memory; None if no peer needs it.
        plan: Always None; see ``Window.plan``.
    """

    plan = None

    def __init__(self, world: World, n: int, dtype: Any, *, mirrored: bool = False) -> None:
        assert world.gpu is not None
        assert world.transport is not None
        self.world, self.dtype, self._gpu = world, np.dtype(dtype), world.gpu
        self.local = self._gpu.zeros(n, dtype)
        self._direct: dict[int, Any] = {world.rank: self.local}
        if world.transport.maps:
            with world.waiting("the allocation of device memory"):
                handles = world.node_comm.allgather((self._gpu.handle(self.local), n))
            for rank, (handle, length) in zip(world.node_ranks, handles, strict=True):
                if rank != world.rank:
                    self._direct[rank] = self._gpu.mapped(handle, length, dtype)
        all_mapped = world.transport.maps and world.n_nodes == 1
        self.mirror = Window(world, n, dtype) if mirrored and not all_mapped else None
        if self.mirror is not None:
            self._gpu.lock_pages(self.mirror.local)
        self._remote: MPI.Win | None = None
        if world.transport.windows:
            with world.waiting("the allocation of device memory"):
                self._remote = MPI.Win.Create(self.local.view(np.uint8), 1, comm=world.comm)
                self._remote.Lock_all(MPI.MODE_NOCHECK)
        world.barrier()

    def of(self, rank: int) -> Any:
        """Return the array of ``rank`` in place if it is mapped, else None. Local."""
        return self._direct.get(rank)

    def get(self, rank: int, out: Any, start: int = 0) -> None:
        """Start to fill ``out``, on the device, from ``rank``'s array at ``start``; ``flush`` completes it. Local."""
        assert self._remote is not None
        self._gpu.synchronize()
        for at, piece in pieces_of(out, start * self.dtype.itemsize):
            self._remote.Get([piece, MPI.BYTE], rank, at)

    def put(self, rank: int, values: Any, start: int = 0) -> None:
        """Start to copy ``values``, on the device, to ``rank``'s array at ``start``; ``flush`` completes it. Local."""
        assert self._remote is not None
        self._gpu.synchronize()
        for at, piece in pieces_of(values, start * self.dtype.itemsize):
            self._remote.Put([piece, MPI.BYTE], rank, at)

    def flush(self, rank: int) -> None:
        """Complete all copies from and to ``rank``. Local."""
        assert self._remote is not None
        with self.world.waiting("memory of another rank", lambda: [rank]):
            self._remote.Flush(rank)

    def sync(self) -> None:
        """Wait for the current stream, so that others may read this rank's array. Local."""
        self._gpu.synchronize()

    def publish(self) -> None:
        """Update the mirror, if there is one. Local."""
        if self.mirror is not None:
            self._gpu.copy(self.mirror.local, self.local)
            self._gpu.synchronize()
            self.mirror.sync()

    def free(self) -> None:
        """Free the memory. Collective; do not use its arrays afterwards."""
        self._gpu.synchronize()
        if self._remote is not None:
            with self.world.waiting("the release of device memory"):
                self._remote.Unlock_all()
                self._remote.Free()
        for rank, array in self._direct.items():
            if rank != self.world.rank:
                self._gpu.unmap(array)
        self._direct.clear()
        if self.mirror is not None:
            self._gpu.unlock_pages(self.mirror.local)
            self.mirror.free()
        self.world.barrier()  # no rank frees memory that another one has mapped


AnyWindow = Window | DeviceWindow
