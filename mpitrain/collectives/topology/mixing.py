"""Mixing matrices of a topology, and their rates of convergence to consensus.

Sources: Lian et al., "Can Decentralized Algorithms Outperform Centralized Algorithms?", 2017,
https://arxiv.org/abs/1705.09056 (doubly stochastic W, the rate is its second singular value); Assran et al., 2019,
https://arxiv.org/abs/1811.10792 (column-stochastic push weights); Xiao, Boyd, "Fast linear iterations for distributed
averaging", 2004 (Metropolis-Hastings weights).

One convention everywhere: W[i, j] is the weight with which i uses j's vector, so that x <- W x, and W[i, j] > 0 for i
!= j only where there is an edge j -> i.

    weights      W[i, j], j -> i          W[i, i]               sums equal to 1    invariants of x <- W x
    uniform      1 / (1 + in(i))          1 / (1 + in(i))       rows               consensus and the convex hull
    metropolis   1 / (1 + max(d_i, d_j))  1 - sum of the row    rows and columns   consensus, hull and mean
    push         1 / (1 + out(j))         1 / (1 + out(i))      columns            the sum; consensus of x / w

Here in(i) and out(i) are the in-degree and the out-degree of i, and d_i is the degree of i in a symmetric graph.
Confusing the weights biases the result silently on graphs with unequal degrees. The matrices serve analysis and tests.
Only D-PSGD reads its weights from one, when it is set up; the other methods use neighbours and weights directly.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mpitrain.collectives.topology.graphs import Topology

Weights = Literal["uniform", "metropolis", "push"]
Matrix = NDArray[np.float64]


def mixing_matrix(topology: Topology, step: int = 0, weights: Weights = "uniform") -> Matrix:
    """Return the matrix W of one step, shape (size, size): W[i, j] is the weight with which i uses j's vector.

    Args:
        topology: The graph.
        step: The step, modulo the period.
        weights: With "uniform", W is row-stochastic: i averages its vector with those that it pulls. With "metropolis",
            W is doubly stochastic; the graph must be symmetric. With "push", W is column-stochastic: j splits its
            vector evenly between itself and its out-neighbours.

    Raises:
        ValueError: The weights are unknown, or they are "metropolis" and the graph is not symmetric at that step.
    """
    n = topology.size
    w = np.zeros((n, n))
    out_degree = [len(topology.out_neighbours(i, step)) for i in range(n)]
    for i in range(n):
        senders = topology.in_neighbours(i, step)
        if weights == "uniform":
            w[i, [i, *senders]] = 1 / (1 + len(senders))
        elif weights == "push":
            w[i, i] = 1 / (1 + out_degree[i])
            w[i, senders] = [1 / (1 + out_degree[j]) for j in senders]
        elif weights == "metropolis":
            if senders != topology.out_neighbours(i, step):
                raise ValueError(
                    f"Metropolis-Hastings weights need a symmetric graph, and rank {i} of {topology.name} sends to "
                    "other ranks than it receives from: use push weights"
                )
            w[i, senders] = [1 / (1 + max(out_degree[i], out_degree[j])) for j in senders]
            w[i, i] = 1 - w[i].sum()
        else:
            raise ValueError(f"unknown weights {weights!r}: they must be uniform, metropolis or push")
    return w


def period_matrix(topology: Topology, weights: Weights = "uniform") -> Matrix:
    """Return the product of the matrices of one period, with the last step on the left."""
    w = np.eye(topology.size)
    for step in range(topology.period):
        w = mixing_matrix(topology, step, weights) @ w
    return w


def spectral_gap(w: Matrix) -> float:
    """Return the spectral gap of a doubly stochastic W: 1 minus its second largest singular value.

    With a gap of 1, one step averages exactly; with a gap of 0, W may never average. For any doubly stochastic W,
    symmetric or not, a step satisfies |W x - mean| <= (1 - gap) |x - mean|.

    Raises:
        ValueError: W is not doubly stochastic; use `consensus_rate`.
    """
    if not is_doubly_stochastic(w):
        raise ValueError(
            "the spectral gap is defined here for doubly stochastic matrices; use consensus_rate for others"
        )
    return 1 - float(np.linalg.norm(w - 1 / len(w), ord=2))


def consensus_rate(topology: Topology, weights: Weights | None = None) -> float:
    """Return the factor by which one period shrinks the disagreement: 0 averages exactly, 1 does not average.

    If the product of the matrices is doubly stochastic, the factor is the product's second largest singular value, an
    upper bound for every period. Otherwise, the factor is the second largest modulus of the product's eigenvalues, the
    limit after many periods. With push weights, it describes the disagreement of x / w, where w is the push-sum weight.

    Args:
        topology: The graph.
        weights: As in `mixing_matrix`; by default "metropolis" for symmetric graphs and "push" for directed ones.
    """
    w = period_matrix(topology, weights or ("metropolis" if topology.is_symmetric else "push"))
    if is_doubly_stochastic(w):
        return 1 - spectral_gap(w)
    return _second(np.abs(np.linalg.eigvals(w)))


def is_doubly_stochastic(w: Matrix) -> bool:
    """Return whether W is non-negative and all its rows and columns sum to 1."""
    return bool((w >= -1e-12).all() and np.allclose(w.sum(axis=0), 1) and np.allclose(w.sum(axis=1), 1))


def _second(moduli: Iterable[float]) -> float:
    """Return the second largest of some numbers; 0 for a single one."""
    largest = sorted((float(modulus) for modulus in moduli), reverse=True)
    return largest[1] if len(largest) > 1 else 0.0
