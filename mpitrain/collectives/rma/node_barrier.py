"""Where the ranks of a node wait for each other, in memory that they share.

An MPI barrier spins, and takes a core from a rank that could work; it also costs two calls into MPI. Here a rank looks
at the words of the others for a moment, then lets others have its core, then sleeps for longer and longer; asleep, it
still gives MPI its turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from mpitrain.collectives.rma.window import Window
from mpitrain.collectives.world.background import Backoff
from mpitrain.collectives.world.statistics import Statistics
from mpitrain.kernels.native import node_barrier

if TYPE_CHECKING:
    from mpitrain.collectives.world.world import World

SPIN_LIMIT = 4000
"""Looks, of some nanoseconds each, before a core is offered to others: longer than it takes ranks that are on time."""

SPIN_LIMIT_WITHOUT_A_CORE = 20
"""The same where ranks outnumber cores: who is late may be waiting for this core."""

FIRST_BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS = 20e-6, 500e-6
"""Of a rank that has waited for long."""


class NodeBarrier:
    """Meetings of the ranks of a node. Collective over all ranks of the world to create and to free.

    Args:
        world: The ranks.
        statistics: Where waiting is counted, if it was for long.

    Attributes:
        words: (STRIDE*local_size,) int64: the number of the meeting that each rank has come to.
        number: Of the last meeting.
        patience: How often to look before the core is offered to others.
    """

    def __init__(self, world: World, statistics: Statistics) -> None:
        self._me, self._n, self._world, self._statistics = world.local_rank, world.local_size, world, statistics
        self._window = Window(world, node_barrier.STRIDE * self._n if self._me == 0 else 0, np.int64)
        words = self._window.of(world.node_ranks[0])
        assert words is not None
        self.words: np.ndarray = words
        self.number = 0
        self.spin_limit = SPIN_LIMIT if world.cores >= 1 else SPIN_LIMIT_WITHOUT_A_CORE
        self._wait_for_all = node_barrier.wait_for_all()

    def __call__(self) -> None:
        """Wait for every rank of the node; what each wrote before is then seen by all. Collective over the node."""
        self.number += 1
        words, me, n, number = self.words, self._me, self._n, self.number
        progress = self._wait_for_all(words, me, n, number, 0, self.spin_limit)
        if progress != n:
            self.wait(
                lambda first: self._wait_for_all(words, me, n, number, first, node_barrier.POLL_ONCE), n, progress
            )

    def wait(self, call: Callable[[int], int], end: int, progress: int) -> None:
        """Call with the progress made so far, and again with what that returns, until it is ``end``.

        Who is late may itself wait, in a one-sided operation of MPI, for this rank to call MPI.

        Raises:
            RankFailed: Somebody will not come any more.
        """
        began, backoff = time.perf_counter(), Backoff(FIRST_BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS)
        while progress != end:
            self._world.require_all()
            self._world.progress()
            backoff.rest()
            progress = call(progress)
        self._statistics.wait_seconds += time.perf_counter() - began

    def free(self) -> None:
        """Give the words back. Collective."""
        self._window.free()
