"""Gossip: the contraction of one round of averaging with random peers, and the variance it adds to the mean.

V = sum_i (x_i - mean)^2. In a round all p workers act at once, from the old values, and each draws its peer uniformly
from the others. Sources of the schemes: Jin, Yuan, Iandola, Keutzer, How to scale distributed deep learning?, 2016,
https://arxiv.org/abs/1611.04581 (pull and push); Assran et al. 2019, https://arxiv.org/abs/1811.10792 (one-peer
exponential graph). The expectations were derived for this project and are tested by enumerating all draws.
"""

from __future__ import annotations

from math import comb

import numpy as np

from mpitrain.collectives.topology.graphs import one_peer_exponential
from mpitrain.collectives.topology.mixing import period_matrix
from mpitrain.errors import UsageError


def _check(p: int) -> None:
    if p < 2:
        raise UsageError(f"gossip needs at least two workers, not {p}")


def pull_contraction(p: int) -> float:
    """Return E[V']/V = (p-2)(2p-3)/(4(p-1)^2) of a round of pulls.

    V = sum_i (x_i - mean)^2 is the spread before the round, V' the spread after it. In a round of pulls, each worker
    reads the vector of a random peer, and moves to the average of this vector and its own.
    """
    _check(p)
    return (p - 2) * (2 * p - 3) / (4 * (p - 1) ** 2)


def pull_mean_variance(p: int) -> float:
    """Return the variance that a round of pulls adds to the mean, divided by V: (p-2)/(4p(p-1)^2).

    The mean is conserved in expectation. For p = 2, it is conserved exactly.
    """
    _check(p)
    return (p - 2) / (4 * p * (p - 1) ** 2)


def push_contraction(p: int) -> float:
    """Return E[V']/V of a round of pushes, where V = sum_i (x_i - mean)^2.

    V' is the value of V after the round. In a round of pushes, each worker sends its vector to a random peer, then
    averages its own vector and the k vectors that it has received:

        x_i <- (x_i + sum of received) / (1 + k)
        E[V']/V = 1 - r - (1-r)^p - (E[w^2] - 1)/(p-1),   r = 1/(p-1)

    w = 1/(1+k_own) + 1/(1+k_target) is the weight of a worker's old vector in the new sum of all vectors. k_own and
    k_target are the numbers of vectors that the worker and its target have received. The result is exact for every p.
    Pushing contracts more slowly than pulling.
    """
    _check(p)
    r = 1 / (p - 1)
    return 1 - r - (1 - r) ** p - (_push_weight_square(p) - 1) / (p - 1)


def push_mean_variance(p: int) -> float:
    """Return the variance that a round of pushes adds to the mean, divided by V: (E[w^2] - 1)/(p(p-1)).

    w is that of ``push_contraction``.
    """
    _check(p)
    return (_push_weight_square(p) - 1) / (p * (p - 1))


def _push_weight_square(p: int) -> float:
    """Return E[w^2], over where the p-2 third workers send: to this worker, to its target or elsewhere."""
    r, total = 1 / (p - 1), 0.0
    for own, chance_own in _binomial(p - 2, r):
        for target, chance_target in _binomial(p - 2 - own, 1 / max(p - 2, 1)):  # of those not sending to this worker
            for back, chance_back in ((0, 1 - r), (1, r)):  # the target itself may send to this worker
                weight = 1 / (1 + own + back) + 1 / (2 + target)
                total += chance_own * chance_target * chance_back * weight**2
    return total


def _binomial(n: int, r: float) -> list[tuple[int, float]]:
    """Return counts and their probabilities. Here n*r <= 1, so counts above 40 have probability below 1e-47."""
    return [(k, comb(n, k) * r**k * (1 - r) ** (n - k)) for k in range(min(n, 40) + 1)]


def exponential_graph_error(p: int) -> float:
    """Return max |(W_K ... W_1)_ij - 1/p| for the one-peer exponential graph, whose period has K steps.

    W_k is the mixing matrix of step k. The result is the distance of a period's averaging from exact averaging. It is 0
    if p is a power of two.
    """
    return float(np.abs(period_matrix(one_peer_exponential(p)) - 1 / p).max())
