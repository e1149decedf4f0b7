"""The memory of a simulated world: vectors and blocks that all workers see, because they share the process."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mpitrain.collectives.rma.blocks import Block, Blocks


class SimulatedVector:
    """One array for each worker. Implements ``Vector``.

    Attributes:
        arrays: The vectors of all workers by rank; workers that share one have the same array.
        local: The array of the worker that holds this object.
    """

    def __init__(self, arrays: list[np.ndarray], rank: int) -> None:
        self.arrays, self.local = arrays, arrays[rank]


class SimulatedBlocks(Blocks):
    """The blocks of a shared vector or of mailboxes, as one worker sees them.

    Args:
        homes: The rank that owns each block.
        data: The blocks, the same arrays for all workers.
        tags: (blocks, N_TAGS) the numbers stored with each block.
        versions: How often each block has been updated.
        before_lock: Called before each lock is acquired.
    """

    def __init__(
        self,
        homes: Sequence[int],
        data: list[np.ndarray],
        tags: np.ndarray,
        versions: list[int],
        before_lock: Callable[[], object],
    ) -> None:
        self.homes, self.lengths = tuple(homes), tuple(block.size for block in data)
        self._data, self._tags, self._versions, self._before_lock = data, tags, versions, before_lock

    def acquire(self, index: int, prefetch: int | None = None, *, encoded: bool = False) -> Block:
        """Return a block; no other worker runs until it is released."""
        self._before_lock()
        return Block(index, self._data[index], self._tags[index], self._versions[index])

    def release(self, block: Block, *, updated: bool) -> None:
        """Release a block and count the update, if there was one."""
        self._versions[block.index] += updated

    def peek_tags(self, index: int, out: np.ndarray) -> None:
        """Copy the tags of a block without a lock."""
        out[:] = self._tags[index]

    def free(self) -> None:
        """Do nothing: there are no windows to free."""
