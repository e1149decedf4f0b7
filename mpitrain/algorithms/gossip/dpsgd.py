"""D-PSGD: decentralized parallel SGD, in which every worker averages with its neighbours in a graph.

    x_i <- sum_j W_ij x_j - eta*g_i(x_i)            j: i itself and its neighbours

W is symmetric and doubly stochastic (Metropolis-Hastings weights, ``topology.mixing``), so that the mean of all
workers moves by -eta times the mean gradient, whatever the graph; the second singular value of W is the factor by which
one averaging shrinks their disagreement. Gradient and averages are both taken at the old x.

Source: Lian, Zhang, Zhang, Hsieh, Zhang, Liu, Can Decentralized Algorithms Outperform Centralized Algorithms?, 2017,
https://arxiv.org/abs/1705.09056, algorithm 1. Xiao, Boyd, Fast linear iterations for distributed averaging, 2004.

Deviations: the local update is any torch optimizer's, made after the averaging. Its weight decay is computed when it
runs, from the averaged parameters; the paper's would be from those before. Of a neighbour's parameters, elements that
are not finite are left out, and the weights of the others are scaled up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from mpitrain import kernels
from mpitrain.algorithms.base.evaluation import mean_of_workers
from mpitrain.algorithms.base.method import Method, Replica, Worker, setting
from mpitrain.algorithms.gossip.neighbours import Neighbours
from mpitrain.collectives.topology.graphs import Topology, topology
from mpitrain.collectives.topology.mixing import mixing_matrix

TOPOLOGIES = ("ring", "torus", "grid", "star", "complete", "bipartite_exponential")
"""Undirected graphs that there are for any number of workers."""


@dataclass(frozen=True)
class DPSGD(Method):
    """Decentralized parallel SGD: all walk in step, but each waits for its neighbours only.

    For clusters in which no network link should carry more than a few models a step, however many workers there are.

    Args:
        topology: Who averages with whom. Fewer neighbours: less to send, and workers that differ more.
    """

    topology: str = setting("ring", "the graph, with weights W", choices=TOPOLOGIES)

    name: ClassVar[str] = "dpsgd"
    summary: ClassVar[str] = "average with the neighbours in a graph, in step with them"
    source: ClassVar[str] = "Lian, Zhang, Zhang, Hsieh, Zhang, Liu 2017, arXiv 1705.09056"
    communication: ClassVar[str] = "the number of neighbours (ring: 2) received and as many sent"
    needs_gradient: ClassVar[bool] = False

    def graph(self, size: int) -> Topology:
        """The graph between ``size`` workers: symmetric at every step."""
        return topology(self.topology, size)

    def worker(self, replica: Replica) -> DPSGDWorker:
        """Collective."""
        return DPSGDWorker(self, replica)


class DPSGDWorker(Worker):
    """x_i is what the model holds; neighbours see copies of it."""

    def __init__(self, method: DPSGD, replica: Replica) -> None:
        super().__init__(replica)
        x, graph = self.x.local, method.graph(self.comm.size)
        self._neighbours = Neighbours(self.comm, graph, x)
        self._rows = [  # of W, one for each step of the graph's period
            mixing_matrix(graph, step, "metropolis")[self.comm.rank].tolist() for step in range(graph.period)
        ]
        kernels.weighted_average(x[:0], x[:0].copy(), 1.0)  # compiled before the first exchange

    def before_update(self) -> None:
        """x_i <- sum_j W_ij x_j, one neighbour after the other, a weighted mean all the time. Waits for them."""
        x, row = self.x.local, self._rows[self.t % len(self._rows)]
        met = row[self.comm.rank]

        def average(sender: int, z: Any, _: float) -> int:
            nonlocal met
            met += row[sender]
            return kernels.weighted_average(x, z, row[sender] / met)

        self._neighbours.post(x)
        self._neighbours.receive(average)

    def consensus(self, out: Any) -> None:
        """The mean of all workers as they are now. Local: exact while they rest, between their steps otherwise."""
        mean_of_workers(self.comm, self.x, out)

    def state(self) -> Iterator[tuple[str, Any]]:
        """The clock, and how far the neighbours are."""
        yield from super().state()
        yield from self._neighbours.state()

    def load(self, state: dict[str, Any]) -> None:
        """Collective."""
        super().load(state)
        self._neighbours.load(self.t, state)
