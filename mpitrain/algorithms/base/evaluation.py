"""The mean of several workers' vectors, for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mpitrain import kernels
from mpitrain.algorithms.base.peers import alive_ranks
from mpitrain.collectives.communicator import Communicator, Vector

Read = Callable[[int, Callable[[Any], object]], object]
"""``read(peer, fn)``: call ``fn`` with the vector (n,) of a peer."""


def mean_of_workers(comm: Communicator, vector: Vector, out: Any) -> None:
    """Write the mean of the present vectors of all living workers to ``out`` (n,). Local."""
    mean_of(alive_ranks(comm), lambda peer, fn: comm.read(vector, peer, fn), out)


def mean_of(peers: Sequence[int], read: Read, out: Any, weight_of: Callable[[int], float] = lambda peer: 1.0) -> None:
    """Write the weighted mean of the peers' finite vectors to ``out`` (n,), or NaN if none is finite. Local.

    Args:
        peers: The ranks to average over.
        read: A function ``read(peer, fn)`` that calls ``fn`` with the vector of a peer.
        out: (n,) the result, in any precision. The sum is computed at least in float32.
        weight_of: A function that returns the weight of a peer. It is called just before the peer's vector is read.
    """
    dtype = kernels.accumulator(out.dtype)
    total = out if out.dtype == dtype else np.zeros_like(out, dtype=dtype)
    total[...] = 0
    weight = 0.0

    def add(x: Any) -> None:
        nonlocal weight
        kernels.scaled_add(total, x, share)
        weight += share

    for peer in peers:
        share = weight_of(peer)
        read(peer, add)  # which a lost peer does not call
    if kernels.keep_finite(total):  # rare: vector by vector
        weight = _sum_of_finite(peers, read, total, weight_of)
    kernels.scale(total, 1.0 / weight if weight else float("nan"))
    if total is not out:
        kernels.copy(out, total)


def _sum_of_finite(peers: Sequence[int], read: Read, total: Any, weight_of: Callable[[int], float]) -> float:
    """Add up the vectors whose elements are all finite; return the sum of their weights."""
    total[...] = 0
    one, weight = np.empty_like(total), 0.0
    for peer in peers:
        share = weight_of(peer)
        one[...] = np.nan
        read(peer, lambda x: kernels.copy(one, x))
        if not kernels.keep_finite(one):
            kernels.scaled_add(total, one, share)
            weight += share
    return weight
