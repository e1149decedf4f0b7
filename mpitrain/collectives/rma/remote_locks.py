"""Locks of ranks on several nodes: swapped by the CPU on the node where they live, by that rank's service elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mpitrain.collectives.rma.locks import LockTable
from mpitrain.collectives.rma.window import Window
from mpitrain.collectives.world.progress import ProgressThread
from mpitrain.collectives.world.transfers import Arrays, Transfer
from mpitrain.kernels.native import lock_words
from mpitrain.kernels.native.lock_words import OWNER_BITS, OWNER_MASK, STRIDE
from mpitrain.kernels.native.wire import PLAIN, Encoded

if TYPE_CHECKING:
    from mpitrain.collectives.world.world import World


class RemoteLocks(LockTable):
    """A table of locks between nodes that have a service. Collective to create and to free.

    Args:
        world: The ranks.
        counts: How many words each rank is the home of.
        progress: The service of the ranks of ``world``.
    """

    def __init__(self, world: World, counts: Sequence[int], progress: ProgressThread) -> None:
        self._world = world
        self._me = world.rank + 1
        self.orders_memory = True  # every swap is one of the CPU that owns the memory
        self._progress = progress
        self._words: RemoteWords = RemoteWords(world, counts, progress)

    def fetch(
        self, home: int, index: int, addresses: tuple[int, int], arrays: Arrays, encoded: Encoded = PLAIN
    ) -> Transfer:
        """Begin to take a lock of another node and then to copy what lies at addresses there. Local.

        ``wait`` of what is returned gives the lock word as it was, with the version.
        """
        return self._progress.fetch(home, addresses, arrays, (self._words.address(home, index), self._me), encoded)

    def store(
        self,
        home: int,
        index: int,
        addresses: tuple[int, int],
        arrays: Arrays,
        version: int,
        updated: bool,
        encoded: Encoded = PLAIN,
    ) -> Transfer:
        """Begin to copy arrays to addresses of another node and then to give its lock back, as ``release`` does. Local.

        ``wait`` of what is returned raises what ``release`` does.
        """
        held = version << OWNER_BITS | self._me
        swap = self._words.address(home, index), held, (version + updated) << OWNER_BITS
        return self._progress.store(home, addresses, arrays, swap, encoded)


class RemoteWords:
    """Words that ranks of one node swap themselves and others let swap. Collective to create and to free."""

    def __init__(self, world: World, counts: Sequence[int], progress: ProgressThread) -> None:
        self._mine, self._progress = world.rank + 1, progress
        self._window = Window(world, STRIDE * counts[world.rank], np.int64)
        self._bases: list[int] = world.comm.allgather(self._window.local.ctypes.data)
        self._acquire, self._swap = lock_words.acquire(), lock_words.swap()

    def address(self, home: int, index: int) -> int:
        """Of a word, in the process that is its home."""
        return self._bases[home] + 8 * STRIDE * index

    def acquire(self, home: int, index: int, *, patient: bool = False) -> int:
        """Write this rank's owner bits into a word that has none; what it was is returned. Local."""
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
        """Make a word ``new`` if it is what was expected. Returns what it was. Local."""
        words = self._window.of(home)
        if words is not None:
            return self._swap(words, STRIDE * index, expected, new)
        return self._progress.swap(home, self.address(home, index), expected, new)

    def free(self) -> None:
        """Give the words back. Collective."""
        self._window.free()
