"""Owner-aware, versioned locks on one word each, for whoever can reach it.

A lock word holds a version and an owner::

    word = version << 24 | owner + 1        owner bits 0: free

so that one compare-and-swap takes the lock and tells how many updates it has seen, one more releases it and counts the
update, and one takes it over from a rank that is known to be dead. (An exclusive ``MPI_Win_lock`` held by a dead rank
is lost for ever, and nobody can tell by whom it was held.) The version read here was read in the critical section
itself: it is the true staleness of Hermans (CERN-THESIS-2017-103, chapter 4), not one read beside a race.

Where all ranks share one node the words lie in its memory and are swapped by the CPU, which costs a part of a call
into MPI and orders what is read and written under the lock. Between nodes either the CPU of the word's node swaps it
for everybody (``served``), or all ranks, those of its own node too, do it by MPI: its atomic operations and the CPU's
must not be mixed on one word (MPI 4.1, section 12.7).
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


class LockTable:
    """Lock words spread over the ranks. Collective to create and to free.

    Args:
        world: The ranks.
        counts: How many words each rank is the home of.

    Attributes:
        orders_memory: Whether what one rank writes under a lock to memory that it shares with the next owner is seen by
            that one without more ado (a ``Window.sync``).
    """

    def __init__(self, world: World, counts: Sequence[int]) -> None:
        self._world = world
        self._me = world.rank + 1
        self.orders_memory = world.n_nodes == 1
        self._words: Words = NodeWords(world, counts) if self.orders_memory else MPIWords(world, counts)

    def acquire(self, home: int, index: int, before_wait: Callable[[], object] | None = None) -> tuple[int, float]:
        """Take the lock, however long its owner holds it; that of a dead rank is taken over. Local.

        Args:
            home: The rank where the word lives.
            index: Which of its words.
            before_wait: Called when somebody has the lock, before this rank waits for it.

        Returns:
            The number of updates counted so far, and the seconds spent waiting for another owner (0 when it was free).
        """
        found = self._words.acquire(home, index)
        if not found & OWNER_MASK:
            return found >> OWNER_BITS, 0.0
        if before_wait is not None:
            before_wait()
        began, n_waits = time.perf_counter(), 0
        while found & OWNER_MASK:
            if (found & OWNER_MASK) - 1 not in self._world.dead:
                if n_waits:  # most owners have it for no longer than it takes to look again
                    self._back_off(n_waits)
                n_waits += 1
            elif self._words.swap(home, index, found, found & ~OWNER_MASK | self._me) == found:
                break
            found = self._words.acquire(home, index, patient=True)
        return found >> OWNER_BITS, time.perf_counter() - began if n_waits else 0.0

    def _back_off(self, n_waits: int) -> None:
        """Let the owner work: it may need the very core that spins here, or this rank's attention to its messages."""
        self._world.progress()
        if n_waits < YIELDS_BEFORE_SLEEP:
            os.sched_yield()
        else:
            time.sleep(min(SLEEP_SECONDS * 2 ** min(n_waits - YIELDS_BEFORE_SLEEP, 5), LONGEST_SLEEP_SECONDS))

    def release(self, home: int, index: int, version: int, *, updated: bool) -> None:
        """Give the lock back, counting an update when there was one. Local.

        Raises:
            RuntimeError: When another rank has taken the lock over in the meantime (it took this one for dead).
        """
        held = version << OWNER_BITS | self._me
        found = self._words.swap(home, index, held, (version + updated) << OWNER_BITS)
        if found != held:
            raise RuntimeError(
                f"the lock was taken over by rank {(found & OWNER_MASK) - 1}: this rank was taken for dead"
            )

    def owner(self, home: int, index: int) -> int | None:
        """The rank that holds the lock now, None when it is free. Local."""
        found = self._words.swap(home, index, 0, 0)
        return (found & OWNER_MASK) - 1 if found & OWNER_MASK else None

    def free(self) -> None:
        """Give the words back. Collective."""
        self._words.free()


class Words(Protocol):
    """Words at the ranks, by the rank where they live and their number there, that all ranks can swap."""

    def acquire(self, home: int, index: int, *, patient: bool = False) -> int:
        """Write this rank's owner bits into a word that has none. Local.

        Args:
            home, index: Which word.
            patient: Look for a moment, where looking costs nothing, instead of once.

        Returns:
            The word as it was: with owner bits when somebody has it, who keeps it.
        """

    def swap(self, home: int, index: int, expected: int, new: int) -> int:
        """Make a word ``new`` if it is what was expected. Returns what it was. Local."""

    def free(self) -> None:
        """Give the words back. Collective."""


class NodeWords:
    """Words in the memory of the one node where all ranks are, swapped by the CPU. Collective to create and to free."""

    def __init__(self, world: World, counts: Sequence[int]) -> None:
        self._mine = world.rank + 1
        self._spin_limit = SPIN_LIMIT if world.cores >= 1 else SPIN_LIMIT_WITHOUT_A_CORE
        self._window = Window(world, STRIDE * counts[world.rank], np.int64)
        self._words = [self._window.of(rank) for rank in range(world.size)]
        self._acquire, self._swap = lock_words.acquire(), lock_words.swap()

    def acquire(self, home: int, index: int, *, patient: bool = False) -> int:
        """Write this rank's owner bits into a word that has none; what it was is returned. Local."""
        return self._acquire(self._words[home], STRIDE * index, self._mine, self._spin_limit if patient else 0)

    def swap(self, home: int, index: int, expected: int, new: int) -> int:
        """Make a word ``new`` if it is what was expected. Returns what it was. Local."""
        return self._swap(self._words[home], STRIDE * index, expected, new)

    def free(self) -> None:
        """Give the words back. Collective."""
        self._words.clear()
        self._window.free()


class MPIWords:
    """Words that ranks of several nodes swap by MPI. Collective to create and to free."""

    def __init__(self, world: World, counts: Sequence[int]) -> None:
        self._mine = world.rank + 1
        self._window = MPI.Win.Allocate(8 * max(counts[world.rank], 1), 8, comm=world.comm)
        memory: Any = self._window.tomemory()
        words = np.frombuffer(memory, np.int64)
        words[:] = 0
        self._window.Lock_all()
        self._window.Sync()
        self._last_seen = [[0] * n for n in counts]  # without their owners: to look first would be a message more
        self._compare, self._origin, self._result = (np.zeros(1, np.int64) for _ in range(3))
        world.comm.Barrier()

    def acquire(self, home: int, index: int, *, patient: bool = False) -> int:
        """Write this rank's owner bits into a word that has none; what it was is returned. Local."""
        while True:
            free = self._last_seen[home][index]
            found = self.swap(home, index, free, free | self._mine)
            if found == free or found & OWNER_MASK:
                return found

    def swap(self, home: int, index: int, expected: int, new: int) -> int:
        """Make a word ``new`` if it is what was expected. Returns what it was. Local."""
        self._compare[0], self._origin[0] = expected, new
        self._window.Compare_and_swap(self._origin, self._compare, self._result, home, index)
        self._window.Flush(home)
        found = int(self._result[0])
        self._last_seen[home][index] = (new if found == expected else found) & ~OWNER_MASK
        return found

    def free(self) -> None:
        """Give the words back. Collective."""
        self._window.Unlock_all()
        self._window.Free()
