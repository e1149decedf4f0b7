"""The memory of a simulated world: vectors and blocks that all workers see, because they share the process.

A block is a shard of a shared vector, or a mailbox.
"""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from mpitrain.collectives.rma.blocks import N_TAGS, Block, Blocks
from mpitrain.simulation.scheduler import Scheduler


class SimulatedVector:
    """One array for each worker. Implements ``Vector``.

    Attributes:
        arrays: The arrays of all workers by rank; workers that share a vector have the same array.
        local: The array of the worker that holds this object.
    """

    def __init__(self, arrays: list[np.ndarray], rank: int) -> None:
        self.arrays, self.local = arrays, arrays[rank]


@dataclass(frozen=True, eq=False)
class BlockMemory:
    """The blocks of a shared vector or of mailboxes, the same for all workers.

    Args:
        homes: The rank that owns each block.
        lengths: The number of elements of each block.
        dtype: The type of the elements.

    Attributes:
        data: The arrays of the blocks, zero at first.
        tags: (blocks, N_TAGS) the numbers that are stored with each block.
        versions: The number of updates of each block.
    """

    homes: tuple[int, ...]
    lengths: tuple[int, ...]
    dtype: InitVar[Any]
    data: list[np.ndarray] = field(init=False)
    tags: np.ndarray = field(init=False)
    versions: list[int] = field(init=False)

    def __post_init__(self, dtype: Any) -> None:
        ends = np.cumsum((0, *self.lengths)).tolist()
        whole = np.zeros(ends[-1], dtype)
        object.__setattr__(self, "data", [whole[start:stop] for start, stop in pairwise(ends)])
        object.__setattr__(self, "tags", np.zeros((len(self.lengths), N_TAGS)))
        object.__setattr__(self, "versions", [0] * len(self.lengths))


class SimulatedBlocks(Blocks):
    """The blocks of a shared vector or of mailboxes, as one worker sees them.

    Args:
        memory: The blocks.
        scheduler: The scheduler, which is notified of reads and changes, and of the beginning and the end of visits.
        ranks: The world ranks (ranks in the simulated world) of the workers that share the blocks.
        rank: The world rank of this worker.
        interleave: Whether to let other workers run before each lock is acquired.
    """

    def __init__(
        self, memory: BlockMemory, scheduler: Scheduler, ranks: tuple[int, ...], rank: int, *, interleave: bool
    ) -> None:
        self.homes, self.lengths = memory.homes, memory.lengths
        self._memory, self._scheduler, self._interleave = memory, scheduler, interleave
        self._ranks, self._rank, self._number = ranks, rank, id(memory)

    def acquire(self, index: int, prefetch: int | None = None, *, encoded: bool = False) -> Block:
        """Lock and return a block. No other worker runs until it is released."""
        memory, scheduler = self._memory, self._scheduler
        home = self._ranks[self.homes[index]]
        if self._interleave:
            scheduler.give_way()
        while not scheduler.n_locked and scheduler.schedule.asking(self._rank, (self._number, index), home):
            scheduler.give_way()
        scheduler.n_locked += 1
        data = memory.data[index]
        following = None if prefetch is None else (self._number, prefetch)
        scheduler.schedule.visit_begun(self._rank, (self._number, index), home, data.nbytes, following)
        return Block(index, data, memory.tags[index], memory.versions[index])

    def release(self, block: Block, *, updated: bool) -> None:
        """Release a block. If it was updated, increase its version."""
        index, scheduler = block.index, self._scheduler
        if updated:
            self._memory.versions[index] += 1
            scheduler.changed((self._number, index))
        home = self._ranks[self.homes[index]]
        scheduler.schedule.visit_ended(
            self._rank, (self._number, index), home, self._memory.data[index].nbytes, updated=updated
        )
        scheduler.n_locked -= 1

    def peek_tags(self, index: int) -> np.ndarray:
        """Return the tags of a block without a lock."""
        self._scheduler.read((self._number, index))
        tags: np.ndarray = self._memory.tags[index]
        return tags

    def free(self) -> None:
        """Do nothing, because there are no windows to free."""
