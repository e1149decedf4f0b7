"""A barrier between the ranks of a node, in memory that they share.

An MPI barrier spins and takes a core from a rank that could work; it also costs two calls into MPI. Here a rank polls
the words of the others for a moment, then yields its core, then sleeps for longer and longer. Between two sleeps it
lets MPI make progress.
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
"""Polls, of some nanoseconds each, before a rank yields its core: longer than punctual ranks take."""

SPIN_LIMIT_WITHOUT_A_CORE = 20
"""The same where ranks outnumber cores: a late rank may be waiting for this core."""

FIRST_BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS = 20e-6, 500e-6
"""The first and the longest sleep of a rank that has waited for long."""


class NodeBarrier:
    """A barrier between the ranks of a node. Collective over all ranks of the world to create and to free.

    Args:
        world: The ranks.
        statistics: The counters of waiting.
        what: The name of what a rank waits for, with an article.

    Attributes:
        words: (STRIDE*local_size,) int64, the number of the barrier that each rank has reached.
        number: The number of the last barrier.
        spin_limit: The number of polls before the rank yields its core.
    """

    def __init__(
        self, world: World, statistics: Statistics, what: str = "a barrier or a sum of the ranks of the node"
    ) -> None:
        self._what = what
        self._me, self._n, self._world, self._statistics = world.local_rank, world.local_size, world, statistics
        self._window = Window(world, node_barrier.STRIDE * self._n if self._me == 0 else 0, np.int64)
        words = self._window.of(world.node_ranks[0])
        assert words is not None
        self.words: np.ndarray = words
        self.number = 0
        self.spin_limit = SPIN_LIMIT if world.cores >= 1 else SPIN_LIMIT_WITHOUT_A_CORE
        self._wait_for_all = node_barrier.wait_for_all()

    def wait(self) -> None:
        """Wait for all ranks of the node; they then see each other's earlier writes. Collective over the node."""
        self.number += 1
        words, me, n, number = self.words, self._me, self._n, self.number
        progress = self._wait_for_all(words, me, n, number, 0, self.spin_limit)
        if progress != n:
            self.poll_until(
                n, lambda first: self._wait_for_all(words, me, n, number, first, node_barrier.POLL_ONCE), progress
            )

    def poll_until(self, end: int, poll: Callable[[int], int], progress: int) -> None:
        """Call ``progress = poll(progress)`` with a backoff until ``progress`` is ``end``. Collective over the node.

        Between two polls, this rank calls MPI, because a one-sided operation of a late rank may need it.

        Raises:
            RankFailed: A rank has died.
        """
        began, backoff = time.perf_counter(), Backoff(FIRST_BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS)
        with self._world.waiting(self._what, self._missing):
            while progress != end:
                self._world.require_all()
                self._world.progress()
                backoff.rest()
                progress = poll(progress)
        self._statistics.add_wait(began)

    def _missing(self) -> list[int]:
        """Return the ranks that have not reached the barrier at which this rank waits. Local."""
        reached = self.words[:: node_barrier.STRIDE]
        return [rank for k, rank in enumerate(self._world.node_ranks) if reached[k] < reached[self._me]]

    def free(self) -> None:
        """Free the words. Collective."""
        self._window.free()
