"""The asynchronous exchange of LSGD: workers publish their parameters and losses, and read those of the leader."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np

from mpitrain.algorithms.base.mailbox_state import Published
from mpitrain.algorithms.base.replica import Replica
from mpitrain.algorithms.base.state import Located
from mpitrain.algorithms.leader.worker import Following, LSGDWorker

CLOCK, STAMP, LOSS = range(3)
"""The numbers that a worker shows: its steps; the total of all steps when it last published; its loss then."""


def copy_loss(to: np.ndarray, shown: np.ndarray) -> None:
    """Copy the loss from the numbers that a worker publishes."""
    to[LOSS] = shown[LOSS]


class AsynchronousLSGDWorker(LSGDWorker):
    """A worker that publishes its parameters and loss, and reads the parameters that the leader has published.

    A new round begins whenever the mean number of all workers' steps passes a multiple of the period.
    """

    persistent: ClassVar[tuple[str, ...]] = (Located("_published_parameters"), "_shown")

    def __init__(self, method: Any, replica: Replica) -> None:
        super().__init__(method, replica)
        x = self.x.local
        self._boxes = self.comm.mailboxes(x.size, x.dtype, slots=2)
        self._published_parameters = Published(self.comm, self._boxes, x)
        self._shown = self.comm.numbers(3)
        self._scoreboard = np.zeros((self.comm.size, 3))
        if method.grad_point == "pre":
            self._group.round = self._all.round = -1  # the first exchange is before the first step
        self._boxes.publish(x)
        self._shown.local[:] = 0, -1, math.inf
        self.comm.barrier()

    def exchange(self, clock: int) -> None:
        """Publish when a round begins, and make its pull once the other workers have published, too. Local."""
        self._shown.local[CLOCK] = clock
        self._poll()
        total = int(self._scoreboard[:, CLOCK].sum())
        begun = [f for f in (self._group, self._all) if total // (self.comm.size * f.period) > f.round]
        if begun:
            self._pull([following for following in begun if following.pending])  # some worker was slower than a round
            for following in begun:
                following.round, following.pending = total // (self.comm.size * following.period), True
            self._publish(total)
        self._pull([f for f in (self._group, self._all) if f.pending and self._published(f)[f.members].all()])

    def _poll(self) -> None:
        """Read the numbers published by all workers. Dead workers are not waited for and cannot lead."""
        for peer in range(self.comm.size):
            seen, stamp = self._scoreboard[peer], self._scoreboard[peer, STAMP]
            self.comm.read(self._shown, peer, partial(np.copyto, seen))
            if seen[STAMP] != stamp:  # the loss may have been read before the stamp, and be an older one
                self.comm.read(self._shown, peer, partial(copy_loss, seen))
        dead = list(self.comm.dead)
        self._scoreboard[dead, STAMP] = self._scoreboard[dead, LOSS] = math.inf

    def _publish(self, total: int) -> None:
        self._boxes.publish(self.x.local)
        self._shown.local[LOSS] = self.mean_loss()
        self.comm.publish(self._shown)
        self._shown.local[STAMP] = total  # last: a peer that sees it sees the loss, too
        self._scoreboard[self.comm.rank] = self._shown.local

    def _published(self, following: Following) -> np.ndarray:
        """Return (p,) whether each worker has published since the round began."""
        since: np.ndarray = self._scoreboard[:, STAMP] >= following.round * following.period * self.comm.size
        return since

    def _pull(self, due: Sequence[Following]) -> None:
        if not due:
            return
        for following in due:
            following.pending = False
            following.choose(np.where(self._published(following), self._scoreboard[:, LOSS], math.inf))
        for leader, rate in self.pulls(due):
            if rate:
                self._boxes.latest(leader, partial(self.follow, leader, rate))
