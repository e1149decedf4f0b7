"""Blocks whose node is lost continue at another rank, their heir, from values of the survivors.

Each rank has room for all blocks of a vector, in its own memory. The room takes no memory until it is used. The heir of
a block is the first living rank in cyclic order after the block's home. Deaths are never undone, so all ranks find the
same heir, even if they learn of several deaths in different orders: a rank that still asks a former heir gets no
answer, and asks the next one. The heir's progress thread serves the block to all ranks, to its own rank, too.

A block begins at its heir with version 0, free, and with zeros. Whoever locks it first replaces the zeros
(``RemoteBlocks.on_restart``) and counts this as an update, even if it only reads the block. There is no recovery step
in which ranks would wait for each other, and a run without deaths sends nothing for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpitrain.collectives.rma.block_memory import BlockMemory
from mpitrain.collectives.rma.blocks import N_TAGS
from mpitrain.collectives.rma.remote_locks import RemoteLocks
from mpitrain.errors import RankFailed
from mpitrain.kernels.native.lock_words import STRIDE


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a block, for requests.

    Attributes:
        server: The rank that serves the block.
        data, tags, word: The addresses of the elements, the tags and the lock word in the process of that rank.
        is_heir: Whether the block continues there with other values.
    """

    server: int
    data: int
    tags: int
    word: int
    is_heir: bool = False


class Heirs:
    """The room for blocks whose nodes are lost. Collective to create.

    Args:
        memory: The blocks.
    """

    def __init__(self, memory: BlockMemory) -> None:
        self._world, self._itemsize = memory.world, memory.data.dtype.itemsize
        self._homes, n = memory.homes, len(memory.homes)
        self._starts = np.concatenate([[0], np.cumsum(memory.lengths)]).tolist()
        self._room = np.zeros(self._starts[-1], memory.data.dtype), np.zeros(n * N_TAGS), np.zeros(n * STRIDE, np.int64)
        self._bases: list[tuple[int, int, int]] = self._world.allgather(tuple(a.ctypes.data for a in self._room))

    def place(self, index: int) -> Place:
        """Return the place at which a block continues. Local.

        Raises:
            RankFailed: No other rank is alive.
        """
        heir = heir_of(self._homes[index], self._world.size, self._world.dead)
        if heir is None:
            raise RankFailed("no rank is alive")
        data, tags, words = self._bases[heir]
        return Place(
            heir,
            data + self._starts[index] * self._itemsize,
            tags + index * N_TAGS * 8,
            words + index * STRIDE * 8,
            is_heir=True,
        )


def heir_of(home: int, n_ranks: int, dead: frozenset[int]) -> int | None:
    """Return the first living rank in cyclic order after ``home``; None if there is none. Local."""
    order = ((home + k) % n_ranks for k in range(1, n_ranks))
    return next((rank for rank in order if rank not in dead), None)


class Places:
    """The places of all blocks, from the deaths known to this rank. Collective to create.

    Args:
        memory: The blocks.
        locks: Their locks.
        continues: Whether blocks continue if their node is lost.
    """

    def __init__(self, memory: BlockMemory, locks: RemoteLocks, *, continues: bool) -> None:
        self._world, self._memory, self._locks = memory.world, memory, locks
        self._heirs = Heirs(memory) if continues and memory.world.survives_failures else None
        self._at_home = [self._served_by(home, index) for index, home in enumerate(memory.homes)]

    def place(self, index: int) -> Place:
        """Return the place of a block. Local.

        Raises:
            RankFailed: Its node is lost, and the block does not continue.
        """
        home = self._memory.homes[index]
        if home not in self._world.dead:
            return self._at_home[index]
        server = self._world.server_of(home)
        if server is not None:
            return self._served_by(server, index)
        if self._heirs is None:
            raise RankFailed(f"rank {home} died with its node")
        return self._heirs.place(index)

    def _served_by(self, server: int, index: int) -> Place:
        """Return the place of a block that a rank of its node serves."""
        memory = self._memory
        home, slot = memory.homes[index], memory.slots[index]
        return Place(
            server,
            memory.data.book.address(home, server) + memory.starts[index] * memory.data.dtype.itemsize,
            memory.tags.book.address(home, server) + slot * N_TAGS * 8,
            self._locks.address(home, slot, server),
        )
