"""D-PSGD: decentralized parallel SGD, in which every worker averages with its neighbours in a graph.

    x_i <- sum_j W_ij x_j - eta*g_i(x_i)            j: i itself and its neighbours

W is symmetric and doubly stochastic (Metropolis-Hastings weights, ``topology.mixing``), so that the mean of all workers
moves by -eta times the mean gradient, whatever the graph. One averaging shrinks the workers' disagreement by the second
singular value of W. Gradient and averages are both taken at the old x.

Source: Lian, Zhang, Zhang, Hsieh, Zhang, Liu, Can Decentralized Algorithms Outperform Centralized Algorithms?, 2017,
https://arxiv.org/abs/1705.09056, algorithm 1. Xiao, Boyd, Fast linear iterations for distributed averaging, 2004.

Deviations: the local update is any torch optimizer's, made after the averaging. It computes weight decay from the
averaged parameters; the paper would use those before. Non-finite elements of a neighbour's parameters are left out, and
the weights of the others are scaled up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from mpitrain.algorithms.base.evaluation import mean_of_workers
from mpitrain.algorithms.base.replica import Replica
from mpitrain.algorithms.base.state import State
from mpitrain.algorithms.base.worker import Worker
from mpitrain.algorithms.gossip.graph_method import GraphMethod, graph
from mpitrain.algorithms.gossip.neighbours import Neighbours, no_messages
from mpitrain.collectives.topology.mixing import mixing_matrix


@dataclass(frozen=True)
class DPSGD(GraphMethod):
    """Decentralized parallel SGD, in which each worker waits for its neighbours only.

    A network link carries only a few models per step, independent of the number of workers.

    Args:
        topology: The graph of neighbours, which must be undirected: a name, a file or a networkx graph. With fewer
            neighbours there is less to send, and workers differ more.
    """

    topology: Any = graph("ring", "the graph, with weights W; undirected")

    name: ClassVar[str] = "dpsgd"
    summary: ClassVar[str] = "average with the neighbours in a graph, in step with them"
    source: ClassVar[str] = "Lian, Zhang, Zhang, Hsieh, Zhang, Liu 2017, arXiv 1705.09056"
    communication: ClassVar[str] = "the number of neighbours (ring: 2) received and as many sent"
    needs_gradient: ClassVar[bool] = False
    is_undirected: ClassVar[bool] = True

    def exchanges_before(self, worker: Any) -> bool:
        """Return True: the workers average before every local update. Local."""
        return True

    def exchanges_after(self, worker: Any) -> bool:
        """Return False. Local."""
        return False

    def entries_after_death(self, state: State, worker: Any, survivors: Sequence[int]) -> State:
        """Return the entries without messages, all of which have been received. Local."""
        return {**state, **no_messages(state, overlap=0)}

    def worker(self, replica: Replica) -> DPSGDWorker:
        """Make a worker. Collective."""
        return DPSGDWorker(self, replica)


class DPSGDWorker(Worker):
    """A worker that sends copies of x_i to its neighbours; the model holds x_i."""

    persistent: ClassVar[tuple[str, ...]] = ("_neighbours",)

    def __init__(self, method: DPSGD, replica: Replica) -> None:
        super().__init__(replica)
        x, graph = self.x.local, method.graph(self.comm.size)
        self._neighbours = Neighbours(self.comm, graph, x)
        self._rows = [  # of W, one for each step of the graph's period
            mixing_matrix(graph, step, "metropolis")[self.comm.rank].tolist() for step in range(graph.period)
        ]

    def before_update(self) -> None:
        """Compute x_i <- sum_j W_ij x_j, as a running weighted mean over the neighbours. Waits for the neighbours."""
        x, row = self.x.local, self._rows[self.t % len(self._rows)]
        self._neighbours.post(x)
        self._neighbours.average(x, row[self.comm.rank], row)

    def consensus(self, out: Any) -> None:
        """Write the mean of all workers' present parameters. Local; exact while no worker makes a step."""
        mean_of_workers(self.comm, self.x, out)
