"""Blocks of memory that many workers change: what the center, the mailboxes and every other shared vector are made of.

A block has a home rank, a lock with a version (``collectives.locks``) and a few numbers, its tags, that are guarded by
the same lock. Whoever holds the lock has the block as an array: on the block's own node the shared memory itself, so
that a kernel works on it in place; on other nodes a staging buffer that is fetched on ``acquire`` and committed on
``release``, before the lock is free again. So a read-modify-write is atomic and ordered in both cases, and the pull
that follows a push sees that push.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mpitrain.collectives.statistics import Statistics

if TYPE_CHECKING:
    from mpitrain.collectives.world import World

N_TAGS = 4
"""Numbers that travel with a block: a count, a weight, a clock."""


@dataclass(slots=True)
class Block:
    """A block whose lock this worker holds.

    Attributes:
        index: Which block.
        data: (length,) its elements, to be changed in place.
        tags: (N_TAGS,) float64, to be changed in place.
        version: How many updates it had seen when the lock was taken.
    """

    index: int
    data: Any
    tags: np.ndarray
    version: int


class Blocks(Protocol):
    """What shared vectors need of the memory below them; of MPI's here, of one process in ``simulated``."""

    @property
    def homes(self) -> Sequence[int]:
        """The rank where each block lives."""

    @property
    def lengths(self) -> Sequence[int]:
        """The number of elements of each block."""

    def acquire(self, index: int) -> Block:
        """Lock a block and have it as an array. Local; waits for the present owner."""

    def release(self, block: Block, *, updated: bool) -> None:
        """Commit an updated block and free its lock. Local."""

    def peek_tags(self, index: int, out: np.ndarray) -> None:
        """Copy a block's tags without its lock: each number is whole, two of them may be of different times. Local."""

    def free(self) -> None:
        """Give the memory back. Collective."""


class MPIBlocks:
    """Blocks between the ranks of a world. Collective to create and to free.

    Args:
        world: The ranks.
        homes: The home rank of each block.
        lengths: The number of elements of each block.
        dtype: Of the elements.
        statistics: Where bytes and waiting are counted.
    """

    def __init__(
        self, world: World, homes: Sequence[int], lengths: Sequence[int], dtype: Any, statistics: Statistics
    ) -> None:
        # Not above: they start MPI, which a simulation or a list of the methods does without.
        from mpitrain.collectives.locks import LockTable
        from mpitrain.collectives.memory import Window

        self.homes, self.lengths = tuple(homes), tuple(lengths)
        self.dead: Container[int] = ()
        self._statistics = statistics
        self._itemsize = np.dtype(dtype).itemsize
        # Where a block lies in its home's window, and which of the home's locks is its own.
        self._starts: list[int] = []
        self._slots: list[int] = []
        used, counts = [0] * world.size, [0] * world.size
        for home, length in zip(self.homes, self.lengths, strict=True):
            self._starts.append(used[home])
            self._slots.append(counts[home])
            used[home] += length
            counts[home] += 1
        self._data = Window(world, used[world.rank], dtype)
        self._tags = Window(world, counts[world.rank] * N_TAGS, np.float64)
        self._locks = LockTable(world, counts)
        remote = [n for home, n in zip(self.homes, self.lengths, strict=True) if self._data.of(home) is None]
        self._staging = np.zeros(max(remote, default=0), dtype)
        self._staged_tags = np.zeros(N_TAGS)
        # A block of this node has one record, which belongs to whoever holds its lock.
        self._in_place = [self._record(index) for index in range(len(self.homes))]

    def acquire(self, index: int) -> Block:
        """Lock a block and have it as an array. Local; waits for the present owner."""
        home, slot, block = self.homes[index], self._slots[index], self._in_place[index]
        version, waited = self._locks.acquire(home, slot, self.dead)
        if waited:
            self._statistics.wait_seconds += waited
            self._statistics.lock_wait_seconds += waited
        if block is not None:
            if not self._locks.orders_memory:
                self._data.sync()
            block.version = version
            return block
        start, length = self._starts[index], self.lengths[index]
        staged = self._staging[:length]
        self._data.get(home, staged, start)
        self._tags.get(home, self._staged_tags, slot * N_TAGS)
        self._data.flush(home)
        self._tags.flush(home)
        self._statistics.wire_bytes += length * self._itemsize
        return Block(index, staged, self._staged_tags, version)

    def release(self, block: Block, *, updated: bool) -> None:
        """Commit an updated block and free its lock. Local."""
        index = block.index
        home, slot = self.homes[index], self._slots[index]
        if self._in_place[index] is not None:
            if not self._locks.orders_memory:
                self._data.sync()
        elif updated:
            start, length = self._starts[index], self.lengths[index]
            self._data.put(home, block.data, start)
            self._tags.put(home, block.tags, slot * N_TAGS)
            self._data.flush(home)
            self._tags.flush(home)
            self._statistics.wire_bytes += length * self._itemsize
        self._locks.release(home, slot, block.version, updated=updated)

    def peek_tags(self, index: int, out: np.ndarray) -> None:
        """Copy a block's tags without its lock: each number is whole, two of them may be of different times. Local."""
        home, slot, block = self.homes[index], self._slots[index], self._in_place[index]
        if block is not None:
            self._tags.sync()
            out[:] = block.tags
        else:
            self._tags.get(home, out, slot * N_TAGS)
            self._tags.flush(home)

    def lock_owner(self, index: int) -> int | None:
        """The rank that holds a block's lock now. Local."""
        return self._locks.owner(self.homes[index], self._slots[index])

    def free(self) -> None:
        """Give the memory back. Collective."""
        self._locks.free()
        self._tags.free()
        self._data.free()

    def _record(self, index: int) -> Block | None:
        """A block of this node as whoever holds its lock has it, None for one of another node."""
        home, start, length, slot = self.homes[index], self._starts[index], self.lengths[index], self._slots[index]
        memory, tags = self._data.of(home), self._tags.of(home)
        if memory is None or tags is None:
            return None
        return Block(index, memory[start : start + length], tags[slot * N_TAGS : (slot + 1) * N_TAGS], version=0)
