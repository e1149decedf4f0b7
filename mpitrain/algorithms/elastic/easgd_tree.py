"""EASGD Tree: elastic averaging over a tree of centers, where a single center would be a bottleneck.

             root                 evaluated
            /    \\
        node      node            inner nodes only average
        / | \\     / | \\
       x  x  x   x  x  x          leaves: the workers, which do SGD

Every edge carries messages up and down, each direction with its own period. A node that receives y moves towards it,

    x <- x + alpha*(y - x)

and when both directions are due, both messages are sent before either arrives. An edge between a leaf and its parent
then makes EASGD's exchange. The two published schemes:

    multi-scale    period tau_1 between leaves and their parents, tau_2 > tau_1 between inner nodes
    up-down        period tau_1 upwards and tau_2 > tau_1 downwards, everywhere

With up-down the root hears of everything soon, and the leaves hear of the root late: the more levels there are, the
longer the branches take to agree.

An inner node is not a process: it is a vector in the memory of the workers below it, which serve it by one-sided
operations. Inner nodes count local steps, as leaves do, and the workers below a node take turns: of m workers, the k-th
carries a message between the node and its parent at its local step t if tau | t and t/tau = k (mod m). So the workers
below a node send on average one message per tau local steps of a worker. A slow worker delays its own turns only, and
the turns of the others stay as they are when a worker has made its last step. There are no queues, and a message is no
older than the visit that carries it. Other workers may change the sending node meanwhile: the message is still a value
that the node had.

At the end of a run every worker carries one more message over each edge from its leaf to the root (``finalize``).

With alpha in [0, 1] and without gradients all nodes stay in the range of the initial values and converge to a common
value. An exchange between a leaf and its parent keeps the sum of all nodes; a message in one direction alone, and an
exchange between inner nodes that others change meanwhile, do not.

Source: Zhang's thesis, Distributed stochastic optimization for deep learning, 2016, https://arxiv.org/abs/1605.02216,
chapter 6 (from memory; the moving rate 0.9/(d+1) and the periods are by analogy).

Deviations: the thesis' inner nodes are processes that send on clocks of their own and keep the last message of each
neighbour. One worker alone, or a tree of one level with equal periods, is asynchronous EASGD.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from mpitrain import kernels
from mpitrain.algorithms.base.method import Interval, Method
from mpitrain.algorithms.base.replica import Replica
from mpitrain.algorithms.base.rescaling import Parts
from mpitrain.algorithms.base.settings import choice, integer, number
from mpitrain.algorithms.base.state import Located, State
from mpitrain.algorithms.base.worker import Worker
from mpitrain.algorithms.elastic.center import AsynchronousCenter, compile_halves
from mpitrain.algorithms.elastic.method import BETA
from mpitrain.collectives.communicator import Communicator

Members = tuple[int, ...]
"""The ranks of the workers below a node, which identify it."""


@dataclass(frozen=True)
class EASGDTree(Method):
    """Asynchronous elastic averaging over a tree of centers, for many workers.

    Each worker exchanges with a nearby center, and each center with its parent. No node of the tree has more than d+1
    neighbours, and most messages stay within a machine.

    Args:
        degree: The largest number d of children of an inner node. By default, the tree follows the machines: there is
            one inner node for each machine with several workers, and a root above them.
        scheme: Which edges use ``slow_period``. With ``multi-scale``, these are the edges between inner nodes; with
            ``up-down``, all edges in the downward direction.
        period: The number tau_1 of local steps between two messages over a fast edge.
        slow_period: The number tau_2 of local steps between two messages over a slow edge.
        moving_rate: The moving rate alpha; by default 0.9/(d+1), where d is the largest number of children in the tree.
        grad_point: Whether the gradient of a step with an exchange is computed before (``pre``) or after (``post``) the
            exchange.
    """

    degree: int | None = integer(None, "d, children of an inner node; by machine when not given", low=2, optional=True)
    scheme: str = choice("multi-scale", "what has the slow period", ("multi-scale", "up-down"))
    period: int = integer(10, "tau_1, local steps between messages of a leaf, or of all nodes upwards", low=1)
    slow_period: int = integer(100, "tau_2, local steps between messages of inner nodes, or of all downwards", low=1)
    moving_rate: float | None = number(None, "alpha; 0.9/(d+1) when not given", low=0, high=1, optional=True)
    grad_point: str = choice("pre", "gradient before or after the exchange", ("pre", "post"))

    name: ClassVar[str] = "easgd-tree"
    summary: ClassVar[str] = "elastic averaging over a tree of centers, fast nearby and slow far away"
    source: ClassVar[str] = "Zhang 2016, arXiv 1605.02216, chapter 6"
    averages_optimizer: ClassVar[bool] = False
    goes_on: ClassVar[str] = "root"
    begins_anew: ClassVar[str] = "the distances of the other nodes of the tree from the root; optimizer states"
    short_run: ClassVar[Mapping[str, Any]] = MappingProxyType({"degree": 2, "period": 4, "slow_period": 16})
    communication: ClassVar[str] = "1/tau_up + 1/tau_down, and a share of what the nodes above exchange"
    needs_gradient: ClassVar[bool] = False

    @property
    def is_synchronous(self) -> bool:
        """False: no worker waits for another."""
        return False

    def periods(self, *, of_leaf: bool) -> tuple[int, int]:
        """Return the numbers of local steps between messages (up, down) on the edge between a node and its parent."""
        if self.scheme == "up-down":
            return self.period, self.slow_period
        tau = self.period if of_leaf else self.slow_period
        return tau, tau

    def interval(self, size: int) -> Interval:
        """Return the number of local steps between two messages towards the root, over the slowest edge."""
        has_inner_edges = self.degree is not None and size > self.degree
        if self.scheme == "multi-scale" and has_inner_edges and self.slow_period > self.period:
            return Interval(self.slow_period, "slow_period")
        return Interval(self.period)

    def alpha(self, branches: Sequence[Sequence[Members]]) -> float:
        """Return the moving rate for a tree, given by the branches of all its leaves."""
        return BETA / (most_children(branches) + 1) if self.moving_rate is None else self.moving_rate

    def common_start(self, parts: Parts) -> Any:
        """Return the root, which is the last node above worker 0."""
        numbers = [int(name.removeprefix("center_")) for name in parts[0] if name.startswith("center_")]
        return parts[0][f"center_{max(numbers)}"]

    def worker(self, replica: Replica) -> EASGDTreeWorker:
        """Make a worker. Collective."""
        return EASGDTreeWorker(self, replica)


def levels(size: int, degree: int | None, nodes: Sequence[int]) -> list[list[int]]:
    """Return the group of each worker at each level of the tree, from the parents of the leaves up to the root.

    Args:
        size: The number of workers.
        degree: The number of groups that form a group of the next level. With None, the first level groups the workers
            of a machine, and the second is the root.
        nodes: (size,) the machine of each worker.
    """
    if degree is None:
        return [list(nodes), [0] * size] if len(set(nodes)) > 1 else [[0] * size]
    widths = [degree]
    while widths[-1] < size:
        widths.append(widths[-1] * degree)
    return [[rank // width for rank in range(size)] for width in widths]


def branch(rank: int, groups: Sequence[Sequence[int]]) -> list[Members]:
    """Return the nodes from a leaf to the root, including both, without nodes that have a single child.

    Args:
        rank: The rank of the leaf.
        groups: The groups of each level, from ``levels``.
    """
    above: list[Members] = [(rank,)]
    for group in groups:
        members = tuple(other for other, its in enumerate(group) if its == group[rank])
        if len(members) > len(above[-1]):
            above.append(members)
    return above if len(above) > 1 else above * 2  # a worker alone has a root too


def most_children(branches: Sequence[Sequence[Members]]) -> int:
    """Return the largest number of children of an inner node, given the branches of all leaves."""
    edges = {edge for one in branches for edge in pairwise(one)}
    return max(Counter(parent for _, parent in edges).values())


class InnerNode(AsynchronousCenter):
    """An inner node of the tree: a vector that the workers below it share. Collective to create.

    Args:
        comm: The communicator of these workers.
        start: (n,) the first values; those of the first worker are used.
    """

    def __init__(self, comm: Communicator, start: Any) -> None:
        super().__init__(comm, start)
        self._start = start
        x, c = start[:0].copy(), self.empty_shard(start)
        compile_halves(x, c, x)
        kernels.elastic_exchange(c, c.copy(), 0.0, 0.0)  # messages of other inner nodes
        compile_halves(c, c.copy(), c.copy())

    def answer(self, message: Any, alpha: float) -> None:
        """Move this node towards a message (n,), and overwrite the message with the values before the move. Local."""
        self.vector.update(lambda part, x: kernels.elastic_exchange(message[part], x, 1.0, alpha), pulls=False)

    def load(self, state: State) -> None:
        """Set the node from the first worker's part of a checkpoint. Collective.

        If that part lacks this node, the node is set to the first worker's parameters. A worker that was dead when the
        checkpoint was saved loads the part of another worker, which may have fewer nodes above it.
        """
        super().load({"center": self._start} if "center" not in state else state)


@dataclass(frozen=True)
class Edge:
    """The connection between a node and its parent, as seen by one of the workers that serve it in turn.

    Attributes:
        lower: The node; None if it is the leaf.
        upper: The parent of the node.
        turn: The index k of this worker among those below the node.
        n_turns: The number m of workers below the node.
        periods: The periods upwards and downwards.
    """

    lower: InnerNode | None
    upper: InnerNode
    turn: int
    n_turns: int
    periods: tuple[int, int]

    def due(self, t: int) -> tuple[bool, bool]:
        """Return whether this worker carries messages (up, down) at its local step t."""
        up, down = (t % tau == 0 and t // tau % self.n_turns == self.turn for tau in self.periods)
        return up, down


class EASGDTreeWorker(Worker):
    """A worker at a leaf, which also carries messages over the edges between the leaf and the root."""

    persistent: ClassVar[tuple[str, ...]] = (Located("_nodes"),)

    def __init__(self, method: EASGDTree, replica: Replica) -> None:
        super().__init__(replica)
        self._method = method
        groups = levels(self.comm.size, method.degree, self.comm.nodes)
        branches = [branch(rank, groups) for rank in range(self.comm.size)]
        self._alpha = method.alpha(branches)
        self._nodes = self._make_nodes(groups, branches[self.comm.rank])
        below: list[InnerNode | None] = [None, *self._nodes[:-1]]
        self._edges = [
            Edge(lower, upper, members.index(self.comm.rank), len(members), method.periods(of_leaf=lower is None))
            for lower, upper, members in zip(below, self._nodes, branches[self.comm.rank], strict=False)
        ]
        # The message that this worker carries between inner nodes.
        n = self.x.local.size if len(self._nodes) > 1 else 0
        self._message = np.zeros_like(self.x.local[:n], dtype=kernels.accumulator(self.x.local.dtype))

    def _make_nodes(self, groups: Sequence[Sequence[int]], own: Sequence[Members]) -> list[InnerNode]:
        """Make the inner nodes above this worker, each with the workers below it. Collective."""
        nodes: list[InnerNode] = []
        for group in groups:
            part = self.comm.split(group[self.comm.rank])
            if part.size == len(own[len(nodes) + 1]):
                nodes.append(InnerNode(part, self.x.local))
        return nodes

    def before_update(self) -> None:
        """Carry the messages that are due if grad_point = pre, which means that the gradient precedes them."""
        if self._method.grad_point == "pre":
            self._serve(self.t)

    def after_update(self) -> None:
        """Carry the messages that are due if grad_point = post, which means that they precede the next gradient."""
        if self._method.grad_point == "post":
            self._serve(self.t + 1)

    def exchange_remaining(self) -> None:
        """Carry a message over each edge from the leaf up to the root, so that the root includes all leaves. Local."""
        for edge in self._edges:
            if edge.lower is None:
                self._exchange(edge.upper, up=True, down=False)
            else:
                self._pass_on(edge.lower, edge.upper, up=True, down=False)

    def consensus(self, out: Any) -> None:
        """Write the root. Local."""
        self._nodes[-1].read(out)

    def _serve(self, t: int) -> None:
        """Carry the messages that are due at this worker's local step t, from the leaf to the root. Local."""
        for edge in self._edges:
            up, down = edge.due(t)
            if not (up or down):
                continue
            if edge.lower is None:
                self._exchange(edge.upper, up=up, down=down)
            else:
                self._pass_on(edge.lower, edge.upper, up=up, down=down)

    def _exchange(self, parent: InnerNode, *, up: bool, down: bool) -> None:
        """Carry messages between the leaf and its parent, in place."""
        if up and down:
            parent.exchange(self.x.local, self._alpha, self._alpha)
        elif up:
            parent.push(self.x.local, self._alpha)
        else:
            parent.pull(self.x.local, self._alpha)

    def _pass_on(self, node: InnerNode, parent: InnerNode, *, up: bool, down: bool) -> None:
        """Carry messages between two inner nodes. A message is counted where it is delivered."""
        if up:
            node.read(self._message)
            (parent.answer if down else parent.push)(self._message, self._alpha)
        else:
            parent.read(self._message)
        if down:
            node.push(self._message, self._alpha)
