"""AD-PSGD: asynchronous decentralized SGD. A worker averages with a random neighbour, and both get the mean.

    g = g_i(y_i)                       at a copy y_i of x_i
    x_i, x_j <- (x_i + x_j)/2          atomic; j is drawn from i's neighbours, which may do the same with i meanwhile
    x_i <- x_i - eta*g

An averaging keeps the sum of all x, so that their mean moves by -eta*g/p with each gradient, and by nothing else.

x_i lies in a mailbox of worker i, where its neighbours change it under its lock; the model holds the copy y_i. The
local update moves the copy; then, in one pass, the displacement is added to x_i and the copy is renewed. So a gradient
does not see the averagings that are made while it is computed (the metric ``staleness`` counts those by others), but it
sees all earlier ones.

Source: Lian, Zhang, Zhang, Liu, Asynchronous Decentralized Parallel Stochastic Gradient Descent, 2018,
https://arxiv.org/abs/1710.06952, algorithm 1.

Deviations: the paper needs a bipartite graph against deadlock: active workers ask, passive ones answer. Here no worker
has to answer. An averaging holds two locks and acquires that of the lower rank first, so that no cycle of waiting
workers can form, on any graph. The local update is any torch optimizer's, and its weight decay is taken at y_i, like
the gradient. Non-finite elements are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mpitrain import kernels
from mpitrain.algorithms.base.evaluation import mean_of
from mpitrain.algorithms.base.mailbox_state import Inbox
from mpitrain.algorithms.base.peers import alive_ranks
from mpitrain.algorithms.base.replica import Replica
from mpitrain.algorithms.base.rescaling import Parts, mean_of_parts
from mpitrain.algorithms.base.state import Located
from mpitrain.algorithms.base.worker import Worker
from mpitrain.algorithms.gossip.graph_method import GraphMethod, graph
from mpitrain.collectives.topology.graphs import Topology

AVERAGED = 1
"""The tag that counts the averagings of others with a mailbox since its owner renewed its copy."""


@dataclass(frozen=True)
class ADPSGD(GraphMethod):
    """Asynchronous decentralized SGD, in which a slow worker does not delay the others.

    Args:
        topology: The graph of neighbours, from which peers are drawn: a name, a file or a networkx graph. The direction
            of an edge makes no difference.
    """

    topology: Any = graph("bipartite_exponential", "the graph of neighbours")

    name: ClassVar[str] = "adpsgd"
    summary: ClassVar[str] = "average with one random neighbour, which gets the mean too; nobody waits"
    source: ClassVar[str] = "Lian, Zhang, Zhang, Liu 2018, arXiv 1710.06952"
    communication: ClassVar[str] = "1 sent and 1 received, and on average as much by neighbours"
    needs_gradient: ClassVar[bool] = False
    metrics: ClassVar[tuple[str, ...]] = ("staleness",)

    @property
    def is_synchronous(self) -> bool:
        """False: no worker waits for another."""
        return False

    def _is_connected(self, found: Topology) -> bool:
        return found.is_weakly_connected

    def common_start(self, parts: Parts) -> Any:
        """Return the mean of all x_i, which may differ from the copies y_i in the models."""
        return mean_of_parts((part["position"], 1.0) for part in parts)

    def worker(self, replica: Replica) -> ADPSGDWorker:
        """Make a worker. Collective."""
        return ADPSGDWorker(self, replica)


class ADPSGDWorker(Worker):
    """A worker whose x_i lies in a mailbox. The model holds the copy y_i."""

    persistent: ClassVar[tuple[str, ...]] = ("_rng", Located("_box"))

    def __init__(self, method: ADPSGD, replica: Replica) -> None:
        super().__init__(replica)
        y, graph = self.x.local, method.graph(self.comm.size).union
        rank = self.comm.rank
        self._neighbours = sorted({*graph.out_neighbours(rank), *graph.in_neighbours(rank)})
        self._rng = np.random.default_rng([replica.seed, rank])
        self._y = y.copy()  # as it was when the gradient was taken
        self._staleness = 0.0
        self._boxes = self.comm.mailboxes(y.size, y.dtype)
        self._box = Inbox(self.comm, self._boxes, y, AVERAGED, ("position", "averaged"))
        kernels.symmetric_average(y[:0], y[:0].copy())  # compiled before the first exchange
        kernels.commit_and_pull(y[:0], y[:0].copy(), y[:0].copy(), 1.0)
        self._box.fill(y, 0.0)
        self.comm.barrier()

    def before_update(self) -> None:
        """Average with a neighbour that is drawn uniformly from the living neighbours. Local."""
        dead = self.comm.dead
        neighbours = [peer for peer in self._neighbours if peer not in dead]
        if neighbours:
            self.average_with(neighbours[int(self._rng.integers(len(neighbours)))])

    def average_with(self, peer: int) -> None:
        """Compute x_i, x_j <- (x_i + x_j)/2, under the locks of both. Local."""
        me = self.comm.rank
        first, second = min(me, peer), max(me, peer)

        def with_one(x: Any, tags: np.ndarray) -> None:
            def with_both(z: Any, other_tags: np.ndarray) -> int:
                (tags if first == peer else other_tags)[AVERAGED] += 1
                return kernels.symmetric_average(x, z)

            self._boxes.update(second, with_both, pulls=True)

        self._boxes.update(first, with_one, pulls=True)

    def after_update(self) -> None:
        """Add the local update of y_i to x_i, then copy y_i <- x_i. Local."""

        def move(x: Any, tags: np.ndarray) -> int:
            self._staleness, tags[AVERAGED] = float(tags[AVERAGED]), 0.0
            return kernels.commit_and_pull(self.x.local, self._y, x, 1.0)

        self._boxes.update(self.comm.rank, move)

    def consensus(self, out: Any) -> None:
        """Write the mean of the living workers' x. Local; exact while no worker changes its x."""
        mean_of(alive_ranks(self.comm), lambda peer, fn: self._boxes.read(peer, lambda x, _: fn(x)), out)

    def metrics(self) -> dict[str, float]:
        """Return how often others averaged with x_i while the last gradient was computed. Local."""
        return {"staleness": self._staleness}

    def after_load(self) -> None:
        """Store the loaded parameters as the y_i from which the next local update is measured. Local."""
        self._y[...] = self.x.local
