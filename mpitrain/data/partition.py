"""Partitions of the training set in which the shares of the classes differ between workers.

Source: Hsu, Qi, Brown, Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification,
2019 (arXiv 1909.06335), section 3. Worker r draws the shares of its classes from a Dirichlet distribution around those
of the whole set:

    q_r ~ Dirichlet(alpha * p),   p: the shares of the classes in the training set

With a large alpha, all workers have the classes of the whole set; with a small one, each has few classes. As in the
paper, all workers get equally many samples (in proportion to their batches, where these differ), and every sample
belongs to one worker. Workers take turns in drawing, so that none gets only what the others have left. When a class is
used up, its share falls to the other classes of the worker.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

TURNS = 32
"""The turns in which a worker draws its samples."""


def dirichlet_partition(
    labels: NDArray[np.int64], sizes: Sequence[int], alpha: float, seed: int
) -> list[NDArray[np.int64]]:
    """Return the samples of each worker: disjoint, and together all. Pure.

    Args:
        labels: (n,) the class of each sample, from 0.
        sizes: The share of each worker, in any unit, such as its batch size.
        alpha: The concentration, above 0.
        seed: The seed; equal arguments give equal parts.

    Returns:
        Sorted indices for each worker.
    """
    rng = np.random.default_rng([seed, 0xD1])
    n, counts = len(labels), np.bincount(labels)
    present = np.flatnonzero(counts)
    left = counts[present]
    shares = rng.dirichlet(np.maximum(alpha * left / n, np.finfo(float).tiny), size=len(sizes))
    shares = np.where(np.isfinite(shares), shares, 0)
    bounds = np.round(np.cumsum([0, *sizes]) / sum(sizes) * n).astype(int)
    wanted = np.diff(bounds)
    taken = np.zeros((len(sizes), len(present)), np.int64)
    for turn in range(TURNS):
        for worker in rng.permutation(len(sizes)):
            target = -(-wanted[worker] * (turn + 1) // TURNS)
            _draw(rng, shares[worker], left, taken[worker], int(target - taken[worker].sum()))
    return _samples(rng, labels, present, taken)


def _draw(
    rng: np.random.Generator, share: NDArray[np.float64], left: NDArray[np.int64], taken: NDArray[np.int64], n: int
) -> None:
    """Move ``n`` samples from those that are left, (k,) per class, to a worker with these shares, in place."""
    while n > 0:
        weights = np.where(left > 0, share, 0.0)
        if weights.sum() <= 0:  # none of its classes is left
            weights = left.astype(float)
        drawn = np.minimum(rng.multinomial(n, weights / weights.sum()), left)
        left -= drawn
        taken += drawn
        n -= int(drawn.sum())


def _samples(
    rng: np.random.Generator, labels: NDArray[np.int64], present: NDArray[np.int64], taken: NDArray[np.int64]
) -> list[NDArray[np.int64]]:
    """Return the indices of each worker, given how many samples (p, k) of each class it takes."""
    parts: list[list[NDArray[np.int64]]] = [[] for _ in taken]
    for label, of_class in zip(present, taken.T, strict=True):
        members = rng.permutation(np.flatnonzero(labels == label))
        for part, own in zip(parts, np.split(members, np.cumsum(of_class)[:-1]), strict=True):
            part.append(own)
    return [np.sort(np.concatenate(part)) for part in parts]
