"""SGP: stochastic gradient push. Workers push shares of their parameters along a directed graph, with weights.

    x_i <- x_i - eta*g_i(z_i)                      the gradient is taken at z_i = x_i/w_i, which the model holds
    send (P_ji x_i, P_ji w_i) to each out-neighbour j, keep (P_ii x_i, P_ii w_i)
    x_i <- sum of what was kept and received,  w_i likewise,  z_i = x_i/w_i;   at the start w_i = 1

with P_ji = 1/(1 + number of out-neighbours): columns sum to 1, so that sum_i w_i = p and sum_i x_i (with the messages
under way) moves by -eta*sum_i g_i only. On a directed graph the x_i alone do not agree; the z_i converge to the mean of
all.

``overlap`` > 0 is OSGP: a worker continues without late messages and receives them up to ``overlap`` steps later.

Source: Assran, Loizou, Ballas, Rabbat, Stochastic Gradient Push for Distributed Deep Learning, 2019,
https://arxiv.org/abs/1811.10792, algorithms 1 and 2. Kempe, Dobra, Gehrke, Gossip-based computation of aggregate
information, 2003.

Here a message is the pair (z_i, P_ji w_i), and z_j becomes the weighted mean of its own value and those received. The
numbers are those above (w_j z_j is the sum of the P_ji x_i); but nothing is divided afterwards, z stays in the range of
the averaged values, and a non-finite element can be left out without pulling z towards 0. If the graph is regular and
overlap is 0, all w_i stay 1.

Deviations: the local update is any torch optimizer's. It acts on the numerator x_i (momentum acts on x_i, as in the
authors' code), and so does its weight decay: x_i shrinks, and z_i by the same factor. The paper fixes the lateness of
OSGP; here it is bounded: a message is received as soon as it is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import numpy as np

from mpitrain import kernels
from mpitrain.algorithms.base.evaluation import mean_of
from mpitrain.algorithms.base.replica import Replica
from mpitrain.algorithms.base.rescaling import PARAMETERS, Parts, mean_of_parts
from mpitrain.algorithms.base.settings import integer
from mpitrain.algorithms.base.state import State
from mpitrain.algorithms.base.worker import Worker
from mpitrain.algorithms.gossip.graph_method import GraphMethod, graph
from mpitrain.algorithms.gossip.neighbours import Neighbours, no_messages, under_way
from mpitrain.collectives.topology.graphs import Topology


@dataclass(frozen=True)
class StochasticGradientPush(GraphMethod):
    """Synchronous push-sum gossip, in which each worker sends to one worker per step and waits for one (SGP).

    It suits slow networks, because the cost of a step does not grow with the number of workers.

    Args:
        topology: The directed graph: a name, a file or a networkx graph. With more peers per step there is more to
            send, and workers differ less.
        overlap: The number of steps by which a message may be late (OSGP). With 0, workers wait for the messages of
            this step. Every step of overlap takes one more vector of memory.
    """

    topology: Any = graph("one_peer_exponential", "the directed graph along which workers push")
    overlap: int = integer(0, "tau, how many steps late a message may be taken", low=0)

    name: ClassVar[str] = "sgp"
    summary: ClassVar[str] = "push-sum: send a share to the next peer in turn, de-bias by weights"
    source: ClassVar[str] = "Assran, Loizou, Ballas, Rabbat 2019, arXiv 1811.10792"
    communication: ClassVar[str] = "the number of peers a step (default: 1) sent and as many received"
    needs_gradient: ClassVar[bool] = False
    metrics: ClassVar[tuple[str, ...]] = ("push_weight",)
    lost: ClassVar[str] = "the push weights, which start at 1 again; with overlap, the messages under way"
    goes_on: ClassVar[str] = "mean sum_i x_i / sum_i w_i, with the messages under way; mean of the optimizer states"

    def common_start(self, parts: Parts) -> Any:
        """Return (sum_i x_i)/(sum_i w_i), including the messages under way."""
        own = ((part[PARAMETERS], float(part["push_weight"])) for part in parts)
        return mean_of_parts(chain(own, under_way(parts, self.overlap)))

    def entries_after_death(self, state: State, worker: Any, survivors: Sequence[int]) -> State:
        """Return the entries with w = 1 and without messages under way. Local."""
        weights = {"push_weight": 1.0, "shown": np.ones(1)}
        return {**state, **weights, **no_messages(state, overlap=self.overlap)}

    def worker(self, replica: Replica) -> SGPWorker:
        """Make a worker. Collective."""
        return SGPWorker(self, replica)


class SGPWorker(Worker):
    """A worker with a push weight w. The model holds z; during the local update, it holds x = w*z."""

    persistent: ClassVar[tuple[str, ...]] = ("_push_weight", "_shown", "_neighbours")

    def __init__(self, method: StochasticGradientPush, replica: Replica) -> None:
        super().__init__(replica)
        z, graph = self.x.local, method.graph(self.comm.size)
        self._push_weight = 1.0
        self._shown = self.comm.numbers(1)  # w, for the consensus of peers
        # All w_i stay 1; without this they would stay so up to rounding only.
        self._stays_one = method.overlap == 0 and is_regular(graph)
        self._neighbours = Neighbours(self.comm, graph, z, method.overlap)
        kernels.scale(z[:0], 1.0)  # compiled before the first step
        kernels.debias(z[:0], z[:0], 1.0)
        self._shown.local[0] = self._push_weight
        self.comm.barrier()

    def before_update(self) -> None:
        """Compute x_i = w_i z_i. Local."""
        if self._push_weight != 1.0:
            kernels.scale(self.x.local, self._push_weight)

    def after_update(self) -> None:
        """Push z_i = x_i/w_i with a share of w_i, then average with received messages. Waits for the in-neighbours."""
        z = self.x.local
        if self._push_weight != 1.0:
            kernels.debias(z, z, self._push_weight)
        self._push_weight /= 1 + self._neighbours.out_degree(self.t)
        self._neighbours.post(z, self._push_weight)
        self._push_weight = self._neighbours.average(z, self._push_weight)
        if self._stays_one:
            self._push_weight = 1.0
        else:
            self._shown.local[0] = self._push_weight

    def exchange_remaining(self) -> None:
        """Receive the messages that are still under way. Waits for the in-neighbours."""
        self._push_weight = self._neighbours.average(self.x.local, self._push_weight, overlap=0)
        self._shown.local[0] = self._push_weight

    def consensus(self, out: Any) -> None:
        """Write the present value of (sum_i x_i)/(sum_i w_i). Local; exact while no worker is in a step."""
        weights: list[float] = []

        def weight_of(peer: int) -> float:
            weights.clear()
            self.comm.read(self._shown, peer, lambda w: weights.append(float(w[0])))
            return weights[0] if weights else 0.0  # a lost peer has no vector either

        mean_of(range(self.comm.size), lambda peer, fn: self.comm.read(self.x, peer, fn), out, weight_of)

    def metrics(self) -> dict[str, float]:
        """Return the push weight w_i. Local."""
        return {"push_weight": self._push_weight}


def is_regular(graph: Topology) -> bool:
    """Return whether, at each step, all workers send and receive the same number of messages."""
    ranks = range(graph.size)
    return all(
        len({len(peers(rank, step)) for rank in ranks for peers in (graph.out_neighbours, graph.in_neighbours)}) == 1
        for step in range(graph.period)
    )
