"""Vectors in GPU memory that other ranks can reach, and blocks of them that many ranks change.

`DeviceWindow` is to GPUs what ``memory.Window`` is to hosts: ``of(peer)`` is the peer's array itself where CUDA IPC
maps it, so that one kernel reads and writes both. Where nothing maps it, a *mirror* in page-locked host memory, an
ordinary window, stands for it: what peers see there is the vector as it was when its owner last came to a collective.

`DeviceBlocks` gives kernels the blocks of a shared vector in device memory. They live there (``in place``), or in
page-locked host memory, from which each visit copies its block and to which it copies it back.

A lock must not be given back before the GPU has written what it guards. So as not to wait for the GPU once for every
block, a block that is done with is given back while the next one is worked on:

    lock 0   [copy in | kernel | copy out]
    lock 1                     [copy in | kernel | copy out]         copy out 0 and copy in 1 go on at once

but at once when this worker would have to wait for a lock, so that no two workers wait for each other.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
from mpi4py import MPI

from mpitrain.collectives.rma.blocks import Block, MPIBlocks
from mpitrain.collectives.rma.window import Window, pieces_of

if TYPE_CHECKING:
    from mpitrain.collectives.world.world import World

N_STAGING_BUFFERS = 3
"""Of blocks that live in host memory: one that is worked on, one on its way back, one for a visit inside a visit."""


class DeviceWindow:
    """An array in device memory on every rank. Collective to create and to free.

    Args:
        world: The ranks; each has a GPU.
        n: Elements on this rank; ranks may differ.
        dtype: The same on all ranks.
        mirrored: Whether peers that cannot map it may read it, as it was when its owner last came to ``publish``.

    Attributes:
        local: (n,) zeros at first; this rank's array.
        mirror: What stands for it in host memory; None if nobody needs one.
        plan: As of ``memory.Window``: None.
    """

    plan = None

    def __init__(self, world: World, n: int, dtype: Any, *, mirrored: bool = False) -> None:
        assert world.gpu is not None
        assert world.transport is not None
        self.world, self.dtype, self._gpu = world, np.dtype(dtype), world.gpu
        self.local = self._gpu.zeros(n, dtype)
        self._direct: dict[int, Any] = {world.rank: self.local}
        if world.transport.maps:
            shown = world.node_comm.allgather((self._gpu.handle(self.local), n))
            for rank, (handle, length) in zip(world.node_ranks, shown, strict=True):
                if rank != world.rank:
                    self._direct[rank] = self._gpu.mapped(handle, length, dtype)
        everybody_maps = world.transport.maps and world.n_nodes == 1
        self.mirror = Window(world, n, dtype) if mirrored and not everybody_maps else None
        if self.mirror is not None:
            self._gpu.lock_pages(self.mirror.local)
        self._remote: MPI.Win | None = None
        if world.transport.windows:
            self._remote = MPI.Win.Create(self.local.view(np.uint8), 1, comm=world.comm)
            self._remote.Lock_all(MPI.MODE_NOCHECK)
        world.comm.Barrier()

    def of(self, rank: int) -> Any:
        """The array of ``rank`` itself where it is mapped, else None. Local."""
        return self._direct.get(rank)

    def get(self, rank: int, out: Any, start: int = 0) -> None:
        """Begin to copy ``out.size`` elements from ``start`` of ``rank`` to device memory; ``flush`` ends it. Local."""
        assert self._remote is not None
        self._gpu.synchronize()
        for at, piece in pieces_of(out, start * self.dtype.itemsize):
            self._remote.Get([piece, MPI.BYTE], rank, at)

    def put(self, rank: int, values: Any, start: int = 0) -> None:
        """Begin to copy ``values`` from device memory to ``start`` of ``rank``; ``flush`` ends it. Local."""
        assert self._remote is not None
        self._gpu.synchronize()
        for at, piece in pieces_of(values, start * self.dtype.itemsize):
            self._remote.Put([piece, MPI.BYTE], rank, at)

    def flush(self, rank: int) -> None:
        """Wait until what was begun towards ``rank`` is done on both sides. Local."""
        assert self._remote is not None
        self._remote.Flush(rank)

    def sync(self) -> None:
        """What this rank's GPU has begun on the current stream is done, and others may look at it. Local."""
        self._gpu.synchronize()

    def publish(self) -> None:
        """Bring the mirror, if there is one, up to date. Local."""
        if self.mirror is not None:
            self._gpu.copy(self.mirror.local, self.local)
            self._gpu.synchronize()
            self.mirror.sync()

    def free(self) -> None:
        """Give the memory back. Collective; arrays taken from it must not be used any more."""
        self._gpu.synchronize()
        if self._remote is not None:
            self._remote.Unlock_all()
            self._remote.Free()
        for rank, array in self._direct.items():
            if rank != self.world.rank:
                self._gpu.unmap(array)
        self._direct.clear()
        if self.mirror is not None:
            self._gpu.unlock_pages(self.mirror.local)
            self.mirror.free()
        self.world.comm.Barrier()  # the owner frees what nobody has mapped any more


class DeviceBlocks:
    """Blocks in device memory, whose homes are there or in host memory. Collective to free.

    Args:
        world: The ranks.
        homes: Blocks at home, on all ranks of the world.
        dtype: Of the elements.
    """

    def __init__(self, world: World, homes: MPIBlocks, dtype: Any) -> None:
        assert world.gpu is not None
        assert world.transport is not None
        self.homes, self.lengths = homes.homes, homes.lengths
        self._blocks, self._gpu = homes, world.gpu
        self._in_place = world.transport.in_place
        homes.before_wait = self._give_back
        self._staging_buffers: list[Any] = []
        if not self._in_place:
            self._staging_buffers = [
                self._gpu.zeros(max(self.lengths, default=0), dtype) for _ in range(N_STAGING_BUFFERS)
            ]
            for memory in homes.memory():
                self._gpu.lock_pages(memory)
        self._n_visits = self._n_held = 0
        self._visits: dict[int, Block] = {}  # as their homes have them
        self._leaving: deque[tuple[Any, Block, bool]] = deque()
        self._more = False

    def acquire(self, index: int, prefetch: int | None = None, *, encoded: bool = False) -> Block:
        """Lock a block and have it in device memory. Local; waits for the present owner."""
        if self._n_held == 0 and not self._leaving:
            # What the exchange comes after may take its time, a whole backward pass: nobody should wait for it.
            self._gpu.synchronize()
        self._n_held += 1
        block = self._blocks.acquire(index, prefetch, encoded=encoded)
        self._more = prefetch is not None
        if self._in_place:
            return block
        self._n_visits += 1
        buffer = self._staging_buffers[self._n_visits % N_STAGING_BUFFERS][: self.lengths[index]]
        self._gpu.copy(buffer, block.data)
        self._visits[index] = block
        return Block(index, buffer, block.tags, block.version)

    def release(self, block: Block, *, updated: bool) -> None:
        """Commit an updated block and free its lock: now, or while the next one is worked on. Local."""
        self._n_held -= 1
        if not self._in_place:
            home = self._visits.pop(block.index)
            mark = self._gpu.copy_out(home.data, block.data) if updated else self._gpu.mark()
            self._leaving.append((mark, home, updated))
        else:
            self._leaving.append((self._gpu.mark(), block, updated))
        self._give_back(all_but=1 if self._more else 0)

    def drop_residuals(self) -> None:
        """As ``MPIBlocks`` does. Local."""
        self._blocks.drop_residuals()

    def _give_back(self, all_but: int = 0) -> None:
        while len(self._leaving) > all_but:
            mark, block, updated = self._leaving.popleft()
            self._gpu.wait_for(mark)
            self._blocks.release(block, updated=updated)

    def peek_tags(self, index: int, out: np.ndarray) -> None:
        """Copy a block's tags without its lock. Local."""
        self._blocks.peek_tags(index, out)

    def lock_owner(self, index: int) -> int | None:
        """The rank that holds a block's lock now. Local."""
        return self._blocks.lock_owner(index)

    def free(self) -> None:
        """Give the memory back. Collective."""
        self._give_back()
        self._gpu.synchronize()
        if not self._in_place:
            for memory in self._blocks.memory():
                self._gpu.unlock_pages(memory)
        self._staging_buffers.clear()
        self._blocks.free()
