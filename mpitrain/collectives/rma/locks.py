"""Versioned locks that know their owner, each in one word that all ranks can swap.

A lock word holds a version and an owner::

    word = version << 24 | owner + 1        owner bits 0: free

The owner is a rank of the run, also in the words of a part of its ranks: compiled code compares it with the dead.

One compare-and-swap acquires the lock and returns its version. A second one releases the lock and counts the update.
One compare-and-swap also takes the lock over from a rank that is known to be dead, whereas an exclusive
``MPI_Win_lock`` of a dead rank is lost for ever and does not tell its owner. The version is read while the lock
is held. No update can come between the reading and the visit, so the staleness that follows from the version is the
true one (Hermans, CERN-THESIS-2017-103, chapter 4).

If all ranks share one node, the words lie in its memory and the CPU swaps them. That costs a fraction of an MPI call,
and it orders the reads and writes under the lock. Between nodes, either the CPU of the word's node swaps it for all
ranks (``remote_locks``), or all ranks, including those of its own node, swap it through MPI: atomic operations of MPI
and of the CPU must not be mixed on one word (MPI 4.1, section 12.7).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from mpi4py import MPI

from mpitrain.collectives.rma.node_barrier import SPIN_LIMIT, SPIN_LIMIT_WITHOUT_A_CORE
from mpitrain.collectives.rma.window import Window
from mpitrain.kernels.native import lock_words
from mpitrain.kernels.native.lock_words import OWNER_BITS, OWNER_MASK, STRIDE

if TYPE_CHECKING:
    from mpitrain.collectives.world.world import World

YIELDS_BEFORE_SLEEP = 20
SLEEP_SECONDS = 50e-6
LONGEST_SLEEP_SECONDS = 1e-3


def owner_bits(world: World) -> int:
    """Return the owner bits of this rank in the lock words of a world, which may be a part of the run. Local."""
    return world.members[world.rank] + 1


class LockTable:
    """A table of locks whose words are distributed over the ranks. Collective to create and to free.

    Args:
        world: The ranks.
        counts: (ranks,) the number of words that each rank stores. The home of a word is the rank that stores it.
        words: The words, if they are neither in the memory of the only node nor in an MPI window.

    Attributes:
        orders_memory: Whether the lock makes writes to shared memory visible to the next owner. If not, a
            ``Window.sync`` is needed.
    """

    def __init__(self, world: World, counts: Sequence[int], words: Words | None = None) -> None:
        if words is None:
            words = NodeWords(world, counts) if world.n_nodes == 1 else MPIWords(world, counts)
        self._world, self._words = world, words
        self._me = owner_bits(world)
        self._rank_of = {member: rank for rank, member in enumerate(world.members)}
        self.orders_memory = not isinstance(words, MPIWords)

    def acquire(self, home: int, index: int, before_wait: Callable[[], object] | None = None) -> tuple[int, float]:
        """Wait for a lock and acquire it; take it over if its owner is dead. Local.

        Args:
            home: The home rank of the word.
            index: The number of the word at its home.
            before_wait: Called before this rank waits for a lock that is taken.

        Returns:
            The number of updates so far, and the seconds of waiting for another owner (0 if the lock was free).
        """
        found = self._words.acquire(home, index)
        if not found & OWNER_MASK:
            return found >> OWNER_BITS, 0.0
        if before_wait is not None:
            before_wait()
        began, n_waits = time.perf_counter(), 0
        with self._world.waiting("a lock", lambda: [self._owner(found)]) as wait:
            while found & OWNER_MASK:
                if self._owner(found) not in self._world.dead:
                    if n_waits:  # most owners release the lock before the next poll
                        self._back_off(n_waits)
                    n_waits += 1
                elif self._words.swap(home, index, found, found & ~OWNER_MASK | self._me) == found:
                    break
                before, found = found, self._words.acquire(home, index, spin=True)
                if found != before:
                    wait.restart()  # others get the lock: nobody keeps it
        return found >> OWNER_BITS, time.perf_counter() - began if n_waits else 0.0

    def _back_off(self, n_waits: int) -> None:
        """Let the owner continue, which may need this core, or this rank to make progress on its messages."""
        self._world.progress()
        if n_waits < YIELDS_BEFORE_SLEEP:
            os.sched_yield()
        else:
            time.sleep(min(SLEEP_SECONDS * 2 ** min(n_waits - YIELDS_BEFORE_SLEEP, 5), LONGEST_SLEEP_SECONDS))

    def release(self, home: int, index: int, version: int, *, updated: bool) -> None:
        """Release a lock, and count an update if there was one. Local.

        Raises:
            RuntimeError: Another rank has taken the lock over, because it considered this rank dead.
        """
        held = version << OWNER_BITS | self._me
        found = self._words.swap(home, index, held, (version + updated) << OWNER_BITS)
        if found != held:
            raise RuntimeError(
                f"the lock was taken over by rank {(found & OWNER_MASK) - 1}: this rank was considered dead"
            )

    def word(self, home: int, index: int) -> LockWord:
        """Return the word of a lock, which ``orders_memory``. Local."""
        assert isinstance(self._words, NodeWords)
        return self._words.word(home, index)

    def owner(self, home: int, index: int) -> int | None:
        """Return the rank that holds a lock; None if it is free. Local."""
        found = self._words.swap(home, index, 0, 0)
        return self._owner(found) if found & OWNER_MASK else None

    def _owner(self, word: int) -> int:
        """Return the owner in a lock word, as a rank of this world. Local."""
        return self._rank_of[(word & OWNER_MASK) - 1]

    def free(self) -> None:
        """Free the words. Collective."""
        self._words.free()


class LockWord:
    """A lock word in the memory of this node, for a rank that acquires and releases it in few calls.

    Attributes:
        words: The array that contains the word.
        place: The position of the word in the array.
        mine: The owner bits of this rank.
    """

    __slots__ = ("mine", "place", "words")

    def __init__(self, words: np.ndarray, place: int, mine: int) -> None:
        self.words, self.place, self.mine = words, place, mine


class Words(Protocol):
    """Lock words. Each is identified by its home rank and its number there."""

    def acquire(self, home: int, index: int, *, spin: bool = False) -> int:
        """Write this rank's owner bits to a word if the word is free. Local.

        Args:
            home, index: The word.
            spin: Whether to poll for a moment instead of once, if polling is cheap.

        Returns:
            The former word. If it has owner bits, another owner still holds the lock.
        """

    def swap(self, home: int, index: int, expected: int, new: int) -> int:
        """Set a word to ``new`` if it is ``expected``, and return the former word. Local."""

    def free(self) -> None:
        """Free the words. Collective."""


class NodeWords:
    """Lock words in the memory of the only node, swapped by the CPU. Collective to create and to free."""

    def __init__(self, world: World, counts: Sequence[int]) -> None:
        self._mine = owner_bits(world)
        self._spin_limit = SPIN_LIMIT if world.cores >= 1 else SPIN_LIMIT_WITHOUT_A_CORE
        self._window = Window(world, STRIDE * counts[world.rank], np.int64)
        self._words = [self._window.of(rank) for rank in range(world.size)]
        self._acquire, self._swap = lock_words.acquire(), lock_words.swap()

    def word(self, home: int, index: int) -> LockWord:
        """Return a word. Local."""
        words = self._words[home]
        assert words is not None
        return LockWord(words, STRIDE * index, self._mine)

    def acquire(self, home: int, index: int, *, spin: bool = False) -> int:
        """Write this rank's owner bits to a word if it is free, and return the former word. Local."""
        return self._acquire(self._words[home], STRIDE * index, self._mine, self._spin_limit if spin else 0)

    def swap(self, home: int, index: int, expected: int, new: int) -> int:
        """Set a word to ``new`` if it is ``expected``, and return the former word. Local."""
        return self._swap(self._words[home], STRIDE * index, expected, new)

    def free(self) -> None:
        """Free the words. Collective."""
        self._words.clear()
        self._window.free()


class MPIWords:
    """Lock words that ranks of several nodes swap through MPI. Collective to create and to free."""

    def __init__(self, world: World, counts: Sequence[int]) -> None:
        self._world, self._mine = world, owner_bits(world)
        self._window = MPI.Win.Allocate(8 * max(counts[world.rank], 1), 8, comm=world.comm)
        memory: Any = self._window.tomemory()
        words = np.frombuffer(memory, np.int64)
        words[:] = 0
        self._window.Lock_all()
        self._window.Sync()
        self._last_seen = [[0] * n for n in counts]  # without owner bits; reading a word first would cost a message
        self._compare, self._origin, self._result = (np.zeros(1, np.int64) for _ in range(3))
        world.allgather(None)

    def acquire(self, home: int, index: int, *, spin: bool = False) -> int:
        """Write this rank's owner bits to a word if it is free, and return the former word. Local."""
        while True:
            free = self._last_seen[home][index]
            found = self.swap(home, index, free, free | self._mine)
            if found == free or found & OWNER_MASK:
                return found

    def swap(self, home: int, index: int, expected: int, new: int) -> int:
        """Set a word to ``new`` if it is ``expected``, and return the former word. Local."""
        self._compare[0], self._origin[0] = expected, new
        self._window.Compare_and_swap(self._origin, self._compare, self._result, home, index)
        with self._world.waiting("a lock word", lambda: [home]):
            self._window.Flush(home)
        found = int(self._result[0])
        self._last_seen[home][index] = (new if found == expected else found) & ~OWNER_MASK
        return found

    def free(self) -> None:
        """Free the words. Collective."""
        self._window.Unlock_all()
        self._window.Free()
