"""LSGD: every worker is pulled towards the best worker of its group and towards the best of all.

    x_i <- x_i - eta*g_i(x_i)
    every n*l*tau   steps of all workers together:  x_i <- x_i - lambda*(x_i - xl)      xl: the leader of i's group
    every n*l*tau_G steps of all workers together:  x_i <- x_i - lambda_G*(x_i - xg)    xg: the leader of all

There are n groups of l workers. The leader is the worker with the lowest training loss, a mean over its last tau
mini-batches; among equals the lowest rank, and never one whose loss is not finite. lambda and lambda_G are applied
directly, not times eta. If both pulls are due the group's comes first. A leader does not move in its own pull, so that
its steps are those of plain SGD, and so are the stationary points: where the workers are at rest the leader's gradient
is zero, which does not hold for an average of workers in different valleys. Only leaders' parameters are sent: half of
the bytes of elastic averaging. The average of all workers is evaluated.

Synchronous: all workers exchange at their tau-th step; the losses are gathered, and the others read the leader's
parameters in place.

Asynchronous: no worker waits. Each worker publishes its number of steps and reads those of the others at every step
(p-1 reads of three numbers, no lock). At the first step at which it sees the total pass a multiple of n*l*tau it
publishes its parameters, its loss and the total. It is pulled at its first step at which all of its group have
published since that multiple. If some worker has not published when the next multiple is passed, the pull is made then,
towards the best of those that have. So an absent worker stops no other, and does not lead.

Source: Teng, Gao, Chalus, Choromanska, Goldfarb, Weller, Leader stochastic gradient descent for distributed training of
deep learning models, 2019, https://arxiv.org/abs/1905.10395, Algorithm 1.

Deviations: the paper's exchange is a barrier among workers with different numbers of steps; here it is one among
workers with equal numbers (synchronous), or there is none (asynchronous), and then the pull is towards the parameters
that the leader published, at most a period ago. If one worker is the leader of the group and of all, both pulls are
one, with 1 - (1-lambda)*(1-lambda_G). ``grad_point="pre"`` is the order of the paper's theory, x - eta*(g(x) +
(lambda/eta)*(x - xl)) with both terms at the same x; the algorithm's is ``post``. ``continuous_pull`` is in the
authors' code and not in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpitrain.algorithms.base.method import Interval, Method
from mpitrain.algorithms.base.replica import Replica
from mpitrain.algorithms.base.settings import boolean, choice, integer, number
from mpitrain.algorithms.leader.asynchronous import AsynchronousLSGDWorker
from mpitrain.algorithms.leader.worker import LSGDWorker, SynchronousLSGDWorker
from mpitrain.collectives.communicator import Communicator
from mpitrain.errors import UsageError

PERIOD = 4
"""tau of the authors' experiments, with tau_G = 16."""

PERIODS_OF_ALL = 4
"""tau_G/tau in the authors' experiments."""


@dataclass(frozen=True)
class LSGD(Method):
    """Leader SGD: each worker is pulled towards the best worker instead of an average.

    An average can be worse than every worker that is part of it. The leader is never worse than the others.

    Args:
        pull: The pull lambda towards the leader of the group.
        global_pull: The pull lambda_G towards the leader of all workers.
        period: The number tau of steps between pulls towards the leader of the group. The default is a quarter of
            tau_G, or 4 if tau_G is not given either.
        global_period: The number tau_G >= tau of steps between pulls towards the leader of all workers. The default is
            four times tau.
        group_size: The number l of consecutive workers in a group; the last group may be smaller. With 0, a group is a
            node, as in the paper.
        continuous_pull: Whether workers are also pulled after every local step, by lambda/tau and lambda_G/tau_G,
            towards the parameters that the leaders had at the last exchange.
        synchronous: Whether all workers exchange at once and wait for each other.
        grad_point: Whether the exchange follows the local update (``post``), or lies between the gradient and the
            update (``pre``).
    """

    pull: float = number(0.1, "lambda, the pull towards the leader of the group", low=0, high=1)
    global_pull: float = number(0.1, "lambda_G, the pull towards the leader of all", low=0, high=1)
    period: int | None = integer(
        None, "tau, local steps between pulls in a group; 4, or tau_G/4, if not given", low=1, optional=True
    )
    global_period: int | None = integer(
        None, "tau_G, local steps between global pulls; 4*tau if not given", low=1, optional=True
    )
    group_size: int = integer(0, "l, workers of a group; 0: those of a node", low=0)
    continuous_pull: bool = boolean(False, "a small pull towards the last known leaders after every step")
    synchronous: bool = boolean(False, "all workers exchange at once")
    grad_point: str = choice("post", "gradient before or after the exchange", ("pre", "post"))

    name: ClassVar[str] = "lsgd"
    summary: ClassVar[str] = "pulled towards the best worker of the group and the best of all"
    source: ClassVar[str] = "Teng et al. 2019, arXiv 1905.10395"
    can_join: ClassVar[bool] = False
    can_lose_workers: ClassVar[bool] = False
    communication: ClassVar[str] = "1/tau + 1/tau_G (leaders read); nothing by leaders"
    needs_gradient: ClassVar[bool] = False
    needs_loss: ClassVar[bool] = True
    metrics: ClassVar[tuple[str, ...]] = ("leader", "leads")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau_global < self.tau:
            raise UsageError(
                f"{self.name}: global_period must be at least period ({self.tau}), not {self.tau_global}: "
                "the pull towards the leader of all is the rarer one"
            )

    @property
    def is_synchronous(self) -> bool:
        """Whether workers wait for each other."""
        return self.synchronous

    @property
    def tau(self) -> int:
        """The number of local steps between two pulls towards the leader of the group."""
        if self.period is not None:
            return self.period
        return PERIOD if self.global_period is None else max(self.global_period // PERIODS_OF_ALL, 1)

    @property
    def tau_global(self) -> int:
        """The number of local steps between two pulls towards the leader of all workers."""
        return PERIODS_OF_ALL * self.tau if self.global_period is None else self.global_period

    def interval(self, size: int) -> Interval:
        """Return tau_G, the number of local steps between two pulls towards the leader of all workers."""
        return Interval(self.tau_global, "global_period")

    def group_of(self, comm: Communicator) -> np.ndarray:
        """Return the ranks of this worker's group, ascending."""
        groups = np.arange(comm.size) // self.group_size if self.group_size else np.array(comm.nodes)
        return np.flatnonzero(groups == groups[comm.rank])

    def worker(self, replica: Replica) -> LSGDWorker:
        """Make a worker. Collective."""
        kind = SynchronousLSGDWorker if self.synchronous else AsynchronousLSGDWorker
        return kind(self, replica)
