"""Gossip: how fast one round of averaging with random peers brings p workers together, and what it does to the mean.

V = sum_i (x_i - mean)^2. A round lets all workers act at once, from the old values; every peer is drawn uniformly from
the others. Sources of the schemes: Jin, Yuan, Iandola, Keutzer, How to scale distributed deep learning?, 2016,
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
    """E[V']/V of a round in which each worker averages itself with one that it reads: (p-2)(2p-3)/(4(p-1)^2)."""
    _check(p)
    return (p - 2) * (2 * p - 3) / (4 * (p - 1) ** 2)


def pull_mean_variance(p: int) -> float:
    """Var(mean')/V of a round of pulls: (p-2)/(4p(p-1)^2). The mean is kept in expectation, and exactly for p = 2."""
    _check(p)
    return (p - 2) / (4 * p * (p - 1) ** 2)


def push_contraction(p: int) -> float:
    """E[V']/V of a round in which each sends to one other, and averages itself with all k that it received.

        x_i <- (x_i + sum of received) / (1 + k)
        E[V']/V = 1 - r - (1-r)^p - (E[w^2] - 1)/(p-1),   r = 1/(p-1)

    w = 1/(1+k_own) + 1/(1+k_target) is the weight that a worker's old vector gets in the new sum. Exact for every p;
    slower than pulling.
    """
    _check(p)
    r = 1 / (p - 1)
    return 1 - r - (1 - r) ** p - (_push_weight_square(p) - 1) / (p - 1)


def push_mean_variance(p: int) -> float:
    """Var(mean')/V of a round of pushes: (E[w^2] - 1)/(p(p-1)), with w of ``push_contraction``."""
    _check(p)
    return (_push_weight_square(p) - 1) / (p * (p - 1))


def _push_weight_square(p: int) -> float:
    """E[w^2]: over the p-2 third workers, each of which sends to this one, to its target or elsewhere."""
    r, total = 1 / (p - 1), 0.0
    for own, chance_own in _binomial(p - 2, r):
        for target, chance_target in _binomial(p - 2 - own, 1 / max(p - 2, 1)):  # of those who do not send to this one
            for back, chance_back in ((0, 1 - r), (1, r)):  # the target itself may send to this one
                weight = 1 / (1 + own + back) + 1 / (2 + target)
                total += chance_own * chance_target * chance_back * weight**2
    return total


def _binomial(n: int, r: float) -> list[tuple[int, float]]:
    """The counts and their probabilities; here n*r <= 1, so that more than 40 is rarer than 1e-47."""
    return [(k, comb(n, k) * r**k * (1 - r) ** (n - k)) for k in range(min(n, 40) + 1)]


def exponential_graph_error(p: int) -> float:
    """How far one period of the one-peer exponential graph is from averaging: the largest |(W_K ... W_1)_ij - 1/p|.

    Exactly 0 where p is a power of two.
    """
    return float(np.abs(period_matrix(one_peer_exponential(p)) - 1 / p).max())
