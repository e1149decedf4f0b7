"""Workers that follow leaders: the ranking by loss, the pulls, and the synchronous exchange."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mpitrain import kernels
from mpitrain.algorithms.base.evaluation import mean_of_workers
from mpitrain.algorithms.base.replica import Replica
from mpitrain.algorithms.base.state import Located
from mpitrain.algorithms.base.worker import Worker

NO_LEADER = -1
"""The leader if no loss is finite, and before the first exchange."""


@dataclass(eq=False)
class Following:
    """A pull of a worker towards a leader. Each worker has two, one for its group and one for all workers.

    Attributes:
        members: The ranks among which the leader is chosen, ascending.
        rate: The pull lambda or lambda_G.
        period: The period tau or tau_G.
        leader_parameters: (n,) the leader's parameters z at the last exchange; (0,) if they are not needed.
        leader: The rank of the leader at the last exchange.
        round: The number of complete periods, by the mean number of steps of all workers when this worker last read
            their clocks (asynchronous only).
        pending: Whether the pull of this round is still to come (asynchronous only).
    """

    persistent: ClassVar[tuple[str, ...]] = ("leader", Located("leader_parameters"), "round", "pending")

    members: np.ndarray
    rate: float
    period: int
    leader_parameters: Any
    leader: int = NO_LEADER
    round: int = 0
    pending: bool = False

    def choose(self, losses: np.ndarray) -> None:
        """Choose the member with the lowest of the losses (p,) as the leader; among equal losses, the first member."""
        best = int(self.members[np.argmin(losses[self.members])])
        self.leader = best if np.isfinite(losses[best]) else NO_LEADER


class LSGDWorker(Worker):
    """A worker that is ranked by its loss and pulled towards leaders; the model holds x_i."""

    persistent: ClassVar[tuple[str, ...]] = ("_losses", "_leads", "_followings")

    def __init__(self, method: Any, replica: Replica) -> None:
        super().__init__(replica)
        self._method = method
        x = self.x.local
        n_pulled = x.size if method.continuous_pull else 0
        all_ranks = np.arange(self.comm.size)
        self._group = Following(method.group_of(self.comm), method.pull, method.tau, x[:n_pulled].copy())
        self._all = Following(all_ranks, method.global_pull, method.tau_global, x[:n_pulled].copy())
        self._followings = {"group": self._group, "all": self._all}
        self._losses = np.zeros(method.tau)
        self._leads = 0
        kernels.weighted_average(x[:0], x[:0].copy(), 0.0)  # compiled before the first exchange
        kernels.copy(x[:0].copy(), x[:0])

    def before_update(self) -> None:
        """Store the loss, and exchange if grad_point = pre."""
        self._losses[self.t % self._losses.size] = self.loss
        if self._method.grad_point == "pre":
            self.exchange(self.t)

    def after_update(self) -> None:
        """Make the small pulls of every step if ``continuous_pull`` is set, and exchange if grad_point = post."""
        if self._method.continuous_pull:
            for following in (self._group, self._all):
                if following.leader not in (NO_LEADER, self.comm.rank):
                    self.comm.statistics.n_nonfinite += kernels.weighted_average(
                        self.x.local, following.leader_parameters, following.rate / following.period
                    )
        if self._method.grad_point == "post":
            self.exchange(self.t + 1)

    @abstractmethod
    def exchange(self, clock: int) -> None:
        """Make the pulls that are due; ``clock`` is the number of local steps before this exchange."""

    def mean_loss(self) -> float:
        """Return the mean loss of the last tau mini-batches, or of all if there were fewer; inf if it is not finite."""
        mean = float(self._losses[: self.t + 1].mean())
        return mean if math.isfinite(mean) else math.inf

    def pulls(self, due: Sequence[Following]) -> list[tuple[int, float]]:
        """Return the leader and the rate of each pull that is due.

        If both pulls are towards the same worker, the first has the effect of both, and the rate of the second is 0.
        The rate of a pull is also 0 if there is no leader, or if this worker is the leader.
        """
        planned = [(f.leader, 0.0 if f.leader in (NO_LEADER, self.comm.rank) else f.rate) for f in due]
        if len(planned) == 2 and planned[0][0] == planned[1][0]:
            (leader, rate), (_, global_rate) = planned
            planned = [(leader, 1 - (1 - rate) * (1 - global_rate)), (leader, 0.0)]
        self._leads += self._group in due and self._group.leader == self.comm.rank
        return planned

    def follow(self, leader: int, rate: float, z: Any) -> int:
        """Compute x <- x - rate*(x - z), and store the leader's parameters z for the small pulls of every step."""
        for following in (self._group, self._all):
            if following.leader == leader and following.leader_parameters.size:
                kernels.copy(following.leader_parameters, z)
        return kernels.weighted_average(self.x.local, z, rate)

    def consensus(self, out: Any) -> None:
        """Write the mean of all workers' present parameters. Local; exact while no worker makes a step."""
        mean_of_workers(self.comm, self.x, out)

    def metrics(self) -> dict[str, float]:
        """Return the group's leader at the last exchange (-1 without one), and how often this worker led. Local."""
        return {"leader": float(self._group.leader), "leads": float(self._leads)}


class SynchronousLSGDWorker(LSGDWorker):
    """A worker that reads the leader's parameters in place, while no worker changes them."""

    def exchange(self, clock: int) -> None:
        """Gather all losses, then make the pulls. Collective."""
        due = [following for following in (self._group, self._all) if clock % following.period == 0]
        if not due:
            return
        self.comm.publish(self.x)
        losses = self.comm.gather([self.mean_loss()])[:, 0]
        for following in due:
            following.choose(losses)
        for leader, rate in self.pulls(due):
            if rate:
                self._pull(leader, rate)
            # The leader of a group must be read before the second pull moves it, and every leader before its next step.
            self.comm.barrier()

    def _pull(self, leader: int, rate: float) -> None:
        statistics = self.comm.statistics
        statistics.n_exchanges += 1
        statistics.bytes_sent += self.x.local.nbytes

        def follow(z: Any) -> None:
            statistics.n_nonfinite += self.follow(leader, rate, z)

        self.comm.read(self.x, leader, follow)
