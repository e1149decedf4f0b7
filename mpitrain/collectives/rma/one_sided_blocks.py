"""Blocks that this rank's CPU cannot access, copied by MPI's one-sided operations under their locks.

This is the way between nodes without progress threads (MPI without MPI_THREAD_MULTIPLE, or
``MPITRAIN_BETWEEN_NODES=windows``), and between GPUs that do not map each other's memory.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mpitrain.collectives.rma.block_memory import BlockMemory
from mpitrain.collectives.rma.blocks import N_TAGS, Block
from mpitrain.collectives.rma.locks import LockTable
from mpitrain.collectives.world.statistics import Statistics


class OneSidedBlocks:
    """The blocks that this rank's CPU cannot access directly. Collective to create.

    The methods are those of ``RemoteBlocks``. Nothing is prefetched or encoded, and a release is complete on return.

    Args:
        memory: The memory of all blocks.
        locks: The locks of the blocks.
        statistics: The counters of bytes and waiting.
        n_staging_buffers: The number of blocks that this worker can hold at a time.
        before_wait: Called before this worker waits for a lock.

    Attributes:
        residuals: Empty.
    """

    def __init__(
        self,
        memory: BlockMemory,
        locks: LockTable,
        statistics: Statistics,
        *,
        n_staging_buffers: int,
        before_wait: Callable[[], object] | None = None,
    ) -> None:
        self._memory, self._locks, self._statistics = memory, locks, statistics
        self._before_wait = before_wait
        self.residuals: dict[int, np.ndarray] = {}
        self.staging = memory.staging_buffers(n_staging_buffers)
        self._staged_tags = np.zeros((n_staging_buffers, N_TAGS))
        self._current = 0

    def acquire(self, index: int, prefetch: int | None, encoded: bool) -> Block:
        """Lock a block and copy it to a staging buffer. Local."""
        memory = self._memory
        version, waited = self._locks.acquire(memory.homes[index], memory.slots[index], self._before_wait)
        self._statistics.add_lock_wait(waited)
        self._current = (self._current + 1) % len(self.staging)
        data = self.staging[self._current][: memory.lengths[index]]
        block = Block(index, data, self._staged_tags[self._current], version)
        self._statistics.wire_bytes += data.nbytes
        memory.get(block)
        return block

    def prefetch(self, index: int, encoded: bool) -> None:
        """Do nothing, because the lock is acquired later. Local."""

    def release(self, block: Block, *, updated: bool) -> None:
        """Copy an updated block to its home and unlock it. Local."""
        memory, index = self._memory, block.index
        if updated:
            self._statistics.wire_bytes += block.data.nbytes
            memory.put(block)
        elif not self._locks.orders_memory:
            memory.data.sync()
        self._locks.release(memory.homes[index], memory.slots[index], block.version, updated=updated)

    def wait(self) -> None:
        """Do nothing, because every release is complete. Local."""
