"""Locks between nodes: a CPU swaps the words of its own node, and progress threads swap them for other nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mpitrain.collectives.rma.locks import LockTable, owner_bits
from mpitrain.collectives.rma.window import Window
from mpitrain.collectives.world.service import Service
from mpitrain.errors import RankFailed
from mpitrain.kernels.native import lock_words
from mpitrain.kernels.native.lock_words import OWNER_BITS, OWNER_MASK, STRIDE

if TYPE_CHECKING:
    from mpitrain.collectives.world.world import World


class RemoteLocks(LockTable):
    """A lock table between nodes whose ranks have progress threads. Collective to create and to free.

    Args:
        world: The ranks.
        counts: (ranks,) the number of words that each rank stores.
        progress: The requests of this rank to other progress threads.
    """

    def __init__(self, world: World, counts: Sequence[int], progress: Service) -> None:
        self._remote_words = RemoteWords(world, counts, progress)
        super().__init__(world, counts, self._remote_words)

    @property
    def mine(self) -> int:
        """The owner bits of this rank. Local."""
        return self._me

    def address(self, home: int, index: int, server: int) -> int:
        """Return the address of a lock word in the process of a rank of its node. Local."""
        return self._remote_words.address(home, index, server)

    def release_swap(self, version: int, *, updated: bool) -> tuple[int, int]:
        """Return the present value of a lock word that this rank holds, and its value after the release. Local."""
        return version << OWNER_BITS | self._me, (version + updated) << OWNER_BITS


class RemoteWords:
    """Lock words that ranks of the same node swap directly, and other ranks by request. Collective to create and free.

    Args:
        world: The ranks.
        counts: (ranks,) the number of words that each rank stores.
        progress: The requests of this rank to other progress threads.
    """

    def __init__(self, world: World, counts: Sequence[int], progress: Service) -> None:
        self._mine, self._progress, self._world = owner_bits(world), progress, world
        self._window = Window(world, STRIDE * counts[world.rank], np.int64)
        self._acquire, self._swap = lock_words.acquire(), lock_words.swap()

    def address(self, home: int, index: int, server: int) -> int:
        """Return the address of a word in the process of a rank of its node. Local."""
        return self._window.book.address(home, server) + 8 * STRIDE * index

    def acquire(self, home: int, index: int, *, spin: bool = False) -> int:
        """Write this rank's owner bits to a word if it is free, and return the former word. Local."""
        words = self._window.of(home)
        if words is not None:
            return self._acquire(words, STRIDE * index, self._mine, 0)
        found = self.swap(home, index, 0, 0)
        while not found & OWNER_MASK:
            expected, found = found, self.swap(home, index, found, found | self._mine)
            if found == expected:
                break
        return found

    def swap(self, home: int, index: int, expected: int, new: int) -> int:
        """Set a word to ``new`` if it is ``expected``, and return the former word. Local."""
        words = self._window.of(home)
        if words is not None:
            return self._swap(words, STRIDE * index, expected, new)
        server = self._world.server_of(home)
        if server is None:
            raise RankFailed(f"rank {home} died with its node")
        return self._progress.swap(server, self.address(home, index, server), expected, new)

    def free(self) -> None:
        """Free the words. Collective."""
        self._window.free()
