"""LSGD: every worker is pulled towards the best worker of its group and towards the best of all.

    x_i <- x_i - eta*g_i(x_i)
    every n*l*tau   steps of all workers together:  x_i <- x_i - lambda*(x_i - xl)      xl: the leader of i's group
    every n*l*tau_G steps of all workers together:  x_i <- x_i - lambda_G*(x_i - xg)    xg: the leader of all

There are n groups of l workers. The leader is the worker with the lowest training loss, a mean over its last tau
mini-batches; of equal ones the lowest rank, and never one whose loss is not finite. lambda and lambda_G are applied
directly, not times eta. Where both pulls are due the group's is first. A leader does not move in its own pull, so that
its steps are those of plain SGD, and with them the stationary points: where the workers are at rest the leader's
gradient is zero, which an average of workers in different valleys does not have. Only leaders' parameters travel: half
of the bytes of elastic averaging. The average of all workers is evaluated.

Synchronous: all workers at their tau-th step; the losses are gathered, and the others read the leader's parameters
where they are.

Asynchronous: nobody waits. Each worker shows the others how many steps it has made, and reads theirs at every step (p-1
times three numbers, no lock). At the first step at which it sees the total pass a multiple of n*l*tau it publishes its
parameters, its loss, and the total; it is pulled at its first step at which all of its group have published since that
multiple, or, if somebody is slower than that, when the next multiple is passed: then towards the best of those that
have. So an absent worker stops nobody, and does not lead.

Source: Teng, Gao, Chalus, Choromanska, Goldfarb, Weller, Leader stochastic gradient descent for distributed training of
deep learning models, 2019, https://arxiv.org/abs/1905.10395, Algorithm 1.

Deviations: the paper's exchange is a barrier among workers that have made different numbers of steps; here it is one
with equal numbers (synchronous), or none at all (asynchronous), and then what pulls is where the leader was when it
published, at most a period ago. Where one worker is the leader of the group and of all, both pulls are one, with
1 - (1-lambda)*(1-lambda_G). ``grad_point="pre"`` is the order of the paper's theory, x - eta*(g(x) + (lambda/eta)*(x -
xl)) with both terms at the same x; the algorithm's is ``post``. ``continuous_pull`` is in the authors' code and not in
the paper.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

from mpitrain import kernels
from mpitrain.algorithms.base.evaluation import mean_of_workers
from mpitrain.algorithms.base.method import Method, Replica, Worker, setting
from mpitrain.collectives.communicator import Communicator
from mpitrain.errors import UsageError

PERIOD = 4
"""tau of the authors' experiments with tau_G = 16."""

PERIODS_OF_ALL = 4
"""tau_G/tau in the authors' experiments."""

NOBODY = -1
"""The leader, where no loss is finite and before the first exchange."""

CLOCK, STAMP, LOSS = range(3)
"""What an asynchronous worker shows: its steps; the total of all steps when it published last; its loss then."""


@dataclass(frozen=True)
class LSGD(Method):
    """Workers follow whoever is ahead: nobody is drawn to an average that is worse than all of them.

    Args:
        pull: lambda, towards the leader of the group.
        global_pull: lambda_G, towards the leader of all.
        period: tau; a quarter of tau_G, or 4, when it is not given.
        global_period: tau_G, not below tau; four times tau when it is not given.
        group_size: l, workers of a group, by rank (the last group has what is left); 0: a group is a node, as the
            paper's servers are.
        continuous_pull: After every local step also a pull of lambda/tau and lambda_G/tau_G towards where the leaders
            were at the last exchange.
        synchronous: All workers exchange at once, and wait for each other.
        grad_point: ``post``: the exchange follows the local step; ``pre``: it is between the gradient and the step.
    """

    pull: float = setting(0.1, "lambda, the pull towards the leader of the group", low=0, high=1)
    global_pull: float = setting(0.1, "lambda_G, the pull towards the leader of all", low=0, high=1)
    period: int | None = setting(None, "tau, local steps between pulls in a group; 4, or tau_G/4, if not given", low=1)
    global_period: int | None = setting(None, "tau_G, local steps between global pulls; 4*tau if not given", low=1)
    group_size: int = setting(0, "l, workers of a group; 0: those of a node", low=0)
    continuous_pull: bool = setting(False, "a small pull towards the last known leaders after every step")
    synchronous: bool = setting(False, "all workers exchange at once")
    grad_point: str = setting("post", "gradient before or after the exchange", choices=("pre", "post"))

    name: ClassVar[str] = "lsgd"
    summary: ClassVar[str] = "pulled towards the best worker of the group and the best of all"
    source: ClassVar[str] = "Teng et al. 2019, arXiv 1905.10395"
    communication: ClassVar[str] = "1/tau + 1/tau_G (leaders read); nothing by leaders"
    needs_gradient: ClassVar[bool] = False
    needs_loss: ClassVar[bool] = True
    metrics: ClassVar[tuple[str, ...]] = ("leader", "leads")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau_global < self.tau:
            raise UsageError(
                f"{self.name}: global_period must be at least period ({self.tau}), not {self.tau_global}: "
                "the leader of all is asked for less often than that of a group"
            )

    @property
    def is_synchronous(self) -> bool:
        """Whether workers wait for each other."""
        return self.synchronous

    @property
    def tau(self) -> int:
        """Local steps between two pulls towards the leader of the group."""
        if self.period is not None:
            return self.period
        return PERIOD if self.global_period is None else max(self.global_period // PERIODS_OF_ALL, 1)

    @property
    def tau_global(self) -> int:
        """Local steps between two pulls towards the leader of all."""
        return PERIODS_OF_ALL * self.tau if self.global_period is None else self.global_period

    def group_of(self, comm: Communicator) -> np.ndarray:
        """The ranks of this worker's group, ascending."""
        groups = np.arange(comm.size) // self.group_size if self.group_size else np.array(comm.nodes)
        return np.flatnonzero(groups == groups[comm.rank])

    def worker(self, replica: Replica) -> LSGDWorker:
        """Collective."""
        return (SynchronousLSGDWorker if self.synchronous else AsynchronousLSGDWorker)(self, replica)


@dataclass(eq=False)
class Following:
    """One of a worker's two pulls: who may lead, and who does.

    Attributes:
        members: Those among whom the leader is chosen, ascending.
        rate: lambda, or lambda_G.
        period: tau, or tau_G.
        z: (n,) where the leader was at the last exchange, if that is kept; else (0,).
        leader: Of the last exchange.
        round: Asynchronous: how often the total of all steps has passed the period, as this worker has seen it.
        pending: Asynchronous: whether the pull of this round is still to come.
    """

    members: np.ndarray
    rate: float
    period: int
    z: Any
    leader: int = NOBODY
    round: int = 0
    pending: bool = False

    def choose(self, losses: np.ndarray) -> None:
        """The leader becomes the member with the lowest of the losses (p,), of equal ones the first."""
        best = int(self.members[np.argmin(losses[self.members])])
        self.leader = best if np.isfinite(losses[best]) else NOBODY


class LSGDWorker(Worker):
    """What synchronous and asynchronous workers share: the loss they are ranked by, and the pulls."""

    def __init__(self, method: LSGD, replica: Replica) -> None:
        super().__init__(replica)
        self._method = method
        x = self.x.local
        n_pulled = x.size if method.continuous_pull else 0
        everybody = np.arange(self.comm.size)
        self._group = Following(method.group_of(self.comm), method.pull, method.tau, x[:n_pulled].copy())
        self._all = Following(everybody, method.global_pull, method.tau_global, x[:n_pulled].copy())
        self._losses = np.zeros(method.tau)
        self._leads = 0
        kernels.weighted_average(x[:0], x[:0].copy(), 0.0)  # compiled before the first exchange
        kernels.copy(x[:0].copy(), x[:0])

    def before_update(self) -> None:
        """Remember the loss. grad_point = pre: the gradient was taken before this exchange."""
        self._losses[self.t % self._losses.size] = self.loss
        if self._method.grad_point == "pre":
            self.exchange(self.t)

    def after_update(self) -> None:
        """The small pulls of every step. grad_point = post: the next gradient is taken after this exchange."""
        if self._method.continuous_pull:
            for following in (self._group, self._all):
                if following.leader not in (NOBODY, self.comm.rank):
                    self.comm.statistics.n_nonfinite += kernels.weighted_average(
                        self.x.local, following.z, following.rate / following.period
                    )
        if self._method.grad_point == "post":
            self.exchange(self.t + 1)

    @abstractmethod
    def exchange(self, clock: int) -> None:
        """Follow the leaders, if it is time; ``clock``: how many local steps lie before the exchange."""

    def mean_loss(self) -> float:
        """Over the last tau mini-batches, or as many as there were; infinite if one of them was not finite."""
        mean = float(self._losses[: self.t + 1].mean())
        return mean if math.isfinite(mean) else math.inf

    def pulls(self, due: Sequence[Following]) -> list[tuple[int, float]]:
        """To whom and how far, for each following; 0 where there is nothing to do. Two pulls to one worker are one."""
        planned = [(f.leader, 0.0 if f.leader in (NOBODY, self.comm.rank) else f.rate) for f in due]
        if len(planned) == 2 and planned[0][0] == planned[1][0]:
            (leader, rate), (_, global_rate) = planned
            planned = [(leader, 1 - (1 - rate) * (1 - global_rate)), (leader, 0.0)]
        self._leads += self._group in due and self._group.leader == self.comm.rank
        return planned

    def follow(self, leader: int, rate: float, z: Any) -> int:
        """x <- x - rate*(x - z), in one pass over both; z is where the leader is."""
        for following in (self._group, self._all):
            if following.leader == leader and following.z.size:
                kernels.copy(following.z, z)
        return kernels.weighted_average(self.x.local, z, rate)

    def consensus(self, out: Any) -> None:
        """The mean of all workers as they are now. Local: exact while they rest, between their steps otherwise."""
        mean_of_workers(self.comm, self.x, out)

    def metrics(self) -> dict[str, float]:
        """The leader of the group at the last exchange (-1: nobody), and how often that was this worker. Local."""
        return {"leader": float(self._group.leader), "leads": float(self._leads)}

    def state(self) -> Iterator[tuple[str, Any]]:
        """The clock, the last losses, who leads."""
        yield from super().state()
        yield "losses", self._losses
        yield "leads", self._leads
        for name, following in (("group", self._group), ("all", self._all)):
            yield f"{name}_leader", following.leader
            if following.z.size:
                yield f"{name}_leader_parameters", following.z

    def load(self, state: dict[str, Any]) -> None:
        """Local."""
        super().load(state)
        self._losses[...] = state["losses"]
        self._leads = int(state["leads"])
        for name, following in (("group", self._group), ("all", self._all)):
            following.leader = int(state[f"{name}_leader"])
            if following.z.size:
                kernels.assign(following.z, state[f"{name}_leader_parameters"])


class SynchronousLSGDWorker(LSGDWorker):
    """Reads the leader's parameters in place, while nobody changes them."""

    def exchange(self, clock: int) -> None:
        """The losses of all are gathered, then the pulls. Collective."""
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
            # The leader of a group has been read by the others before the second pull moves it, and whoever was read
            # before the next step does.
            self.comm.barrier()

    def _pull(self, leader: int, rate: float) -> None:
        statistics = self.comm.statistics
        statistics.n_exchanges += 1
        statistics.bytes_sent += self.x.local.nbytes

        def follow(z: Any) -> None:
            statistics.n_nonfinite += self.follow(leader, rate, z)

        self.comm.read(self.x, leader, follow)


def copy_loss(to: np.ndarray, shown: np.ndarray) -> None:
    """Of what a worker shows, nothing but its loss."""
    to[LOSS] = shown[LOSS]


class AsynchronousLSGDWorker(LSGDWorker):
    """Publishes its parameters with its loss, and reads what the leader has published."""

    def __init__(self, method: LSGD, replica: Replica) -> None:
        super().__init__(method, replica)
        x = self.x.local
        self._boxes = self.comm.mailboxes(x.size, x.dtype, slots=2)
        self._shown = self.comm.numbers(3)
        self._scoreboard = np.zeros((self.comm.size, 3))
        if method.grad_point == "pre":
            self._group.round = self._all.round = -1  # the first exchange is before the first step
        self._boxes.publish(x)
        self._shown.local[:] = 0, -1, math.inf
        self.comm.barrier()

    def exchange(self, clock: int) -> None:
        """Publish when a new round begins; be pulled when the others have. Local."""
        self._shown.local[CLOCK] = clock
        self._poll()
        total = int(self._scoreboard[:, CLOCK].sum())
        begun = [f for f in (self._group, self._all) if total // (self.comm.size * f.period) > f.round]
        if begun:
            self._pull([following for following in begun if following.pending])  # somebody was slower than a round
            for following in begun:
                following.round, following.pending = total // (self.comm.size * following.period), True
            self._publish(total)
        self._pull([f for f in (self._group, self._all) if f.pending and self._published(f)[f.members].all()])

    def _poll(self) -> None:
        """What all workers show now; of the dead nobody waits for anything, and nobody follows them."""
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
        self._shown.local[STAMP] = total  # last: who sees it sees the loss
        self._scoreboard[self.comm.rank] = self._shown.local

    def _published(self, following: Following) -> np.ndarray:
        """(p,) whether each worker has published since the round began."""
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

    def state(self) -> Iterator[tuple[str, Any]]:
        """What others can read of this worker, and which pulls are still to come, besides what all workers have."""
        yield from super().state()
        published = np.empty_like(self.x.local)

        def copy(box: Any) -> None:
            published[...] = box

        self._boxes.latest(self.comm.rank, copy)
        yield "published", published
        yield "shown", self._shown.local
        for name, following in (("group", self._group), ("all", self._all)):
            yield f"{name}_round", following.round
            yield f"{name}_pending", following.pending

    def load(self, state: dict[str, Any]) -> None:
        """Collective."""
        super().load(state)
        self._boxes.publish(state["published"])
        self._shown.local[...] = state["shown"]
        for name, following in (("group", self._group), ("all", self._all)):
            following.round, following.pending = int(state[f"{name}_round"]), bool(state[f"{name}_pending"])
        self.comm.barrier()
