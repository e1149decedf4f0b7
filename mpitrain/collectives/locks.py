"""Owner-aware, versioned locks on one word each, for whoever can reach it by MPI.

A lock word holds a version and an owner::

    word = version << 24 | owner + 1        owner bits 0: free

so that one compare-and-swap takes the lock and tells how many updates it has seen, one more releases it and counts the
update, and one takes it over from a rank that is known to be dead. (An exclusive ``MPI_Win_lock`` held by a dead rank
is lost for ever, and nobody can tell by whom it was held.) The version read here was read in the critical section
itself: it is the true staleness of Hermans (CERN-THESIS-2017-103, chapter 4), not one read beside a race.
"""

from __future__ import annotations

import os
import time
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from mpi4py import MPI

if TYPE_CHECKING:
    from mpitrain.collectives.world import World

OWNER_BITS = 24
OWNER_MASK = (1 << OWNER_BITS) - 1

SPINS_BEFORE_SLEEP = 20
SLEEP_SECONDS = 50e-6
LONGEST_SLEEP_SECONDS = 1e-3


class LockTable:
    """Lock words spread over the ranks. Collective to create and to free.

    Args:
        world: The ranks.
        counts: How many words each rank is the home of.
    """

    def __init__(self, world: World, counts: Sequence[int]) -> None:
        self._comm = world.comm
        self._me = world.rank + 1
        self._window = MPI.Win.Allocate(8 * max(counts[world.rank], 1), 8, comm=world.comm)
        memory: Any = self._window.tomemory()
        words = np.frombuffer(memory, np.int64)
        words[:] = 0
        self._window.Lock_all()
        self._window.Sync()
        self._expected = [np.zeros(n, np.int64) for n in counts]  # the last version seen: the next guess
        self._compare, self._origin, self._result = (np.zeros(1, np.int64) for _ in range(3))
        world.comm.Barrier()

    def _compare_and_swap(self, home: int, index: int, expected: int, new: int) -> int:
        self._compare[0], self._origin[0] = expected, new
        self._window.Compare_and_swap(self._origin, self._compare, self._result, home, index)
        self._window.Flush(home)
        return int(self._result[0])

    def acquire(self, home: int, index: int, dead: Container[int] = ()) -> tuple[int, float]:
        """Take the lock, however long its owner holds it. Local.

        Args:
            home: The rank where the word lives.
            index: Which of its words.
            dead: Ranks known to be dead: their locks are taken over.

        Returns:
            The number of updates counted so far, and the seconds spent waiting for another owner (0 when it was free).
        """
        free = int(self._expected[home][index])
        found = self._compare_and_swap(home, index, free, free | self._me)
        if found == free:
            return free >> OWNER_BITS, 0.0
        began, spins = time.perf_counter(), 0
        while True:
            owner = (found & OWNER_MASK) - 1
            free = found & ~OWNER_MASK
            if owner < 0 or owner in dead:
                expected = found
            else:
                self._back_off(spins)
                spins += 1
                expected = free  # perhaps it was given back without an update
            found = self._compare_and_swap(home, index, expected, free | self._me)
            if found == expected:
                waited = time.perf_counter() - began if spins else 0.0
                return free >> OWNER_BITS, waited

    def _back_off(self, spins: int) -> None:
        """Let the owner work: it may need the very core that spins here, or this rank's attention to its messages."""
        self._comm.Iprobe(source=self._me - 1)
        if spins < SPINS_BEFORE_SLEEP:
            os.sched_yield()
        else:
            time.sleep(min(SLEEP_SECONDS * 2 ** min(spins - SPINS_BEFORE_SLEEP, 5), LONGEST_SLEEP_SECONDS))

    def release(self, home: int, index: int, version: int, *, updated: bool) -> None:
        """Give the lock back, counting an update when there was one. Local.

        Raises:
            RuntimeError: When another rank has taken the lock over in the meantime (it took this one for dead).
        """
        held = version << OWNER_BITS | self._me
        free = (version + updated) << OWNER_BITS
        found = self._compare_and_swap(home, index, held, free)
        if found != held:
            raise RuntimeError(
                f"the lock was taken over by rank {(found & OWNER_MASK) - 1}: this rank was taken for dead"
            )
        self._expected[home][index] = free

    def owner(self, home: int, index: int) -> int | None:
        """The rank that holds the lock now, None when it is free. Local."""
        found = self._compare_and_swap(home, index, 0, 0)
        return (found & OWNER_MASK) - 1 if found & OWNER_MASK else None

    def free(self) -> None:
        """Give the words back. Collective."""
        self._window.Unlock_all()
        self._window.Free()
