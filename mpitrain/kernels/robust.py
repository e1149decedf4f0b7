"""Many vectors side by side, one of each worker: their distances, their weighted mean, the middle of each coordinate.

``Rows`` holds k vectors and works through them in blocks that stay in the cache, in float64, whatever they are stored
as; nothing as long as a vector is allocated after it is made. Distances are sums of squared differences and not taken
from a Gram matrix: equal vectors are exactly 0 apart, and what all have in common does not cancel.

Bytes moved per element: all of it reads k elements; ``weighted_sum`` and ``middle_mean`` write one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np

from mpitrain.kernels.compile.declare import Kernel

BLOCK: Final = 1024  # elements of each vector: with 16 vectors 128 KiB, in the second-level cache

receive: Final = Kernel(
    "receive",
    """
    d = z
    x = d
    """,
    arrays="x z",
    guard="d",
    source="the definition of a copy",
    doc="x becomes a peer's z, with 0 where that is not finite.",
)

accumulate: Final = Kernel(
    "accumulate",
    """
    d = s + w * g
    s = d
    """,
    arrays="s g",
    scalars="w",
    guard="d",
    source="Allen-Zhu, Ebrahimianghazani, Li, Alistarh 2021, arXiv 2012.14368, algorithm 1",
    doc="Adds a share of a gradient to a running sum; a sum that is not finite any more is counted and begins anew.",
)

KERNELS: Final = (receive, accumulate)


class Rows:
    """k vectors of n elements, zeros at first.

    Args:
        k: How many.
        n: Elements of each.
        dtype: Of the elements.

    Attributes:
        values: (k, n)
    """

    def __init__(self, k: int, n: int, dtype: Any) -> None:
        self.values = np.zeros((k, n), dtype)
        self._block = np.empty((k, BLOCK))
        self._other = np.empty((k, BLOCK))
        self._line = np.empty(BLOCK)

    def squared_distances(self, who: np.ndarray) -> np.ndarray:
        """(k, k) float64, the squared Euclidean distances between those vectors; 0 elsewhere."""
        k, chosen = len(self.values), len(who)
        squares = np.zeros((chosen, chosen))
        with np.errstate(over="ignore"):  # infinitely far is an answer
            for _, block in self._blocks(who):
                for i in range(chosen - 1):
                    d = np.subtract(block[i + 1 :], block[i], out=self._other[i + 1 : chosen, : block.shape[1]])
                    squares[i, i + 1 :] += np.einsum("ij,ij->i", d, d)
        distances = np.zeros((k, k))
        distances[np.ix_(who, who)] = squares + squares.T
        return distances

    def weighted_sum(self, weights: np.ndarray, out: Any) -> None:
        """out (n,) = sum_i weights[i]*values[i], summed in that order; vectors of weight 0 are not looked at."""
        who = np.flatnonzero(weights)
        for part, block in self._blocks(who):
            block *= weights[who, None]
            out[part] = np.add.reduce(block, axis=0, out=self._line[: block.shape[1]])

    def middle_mean(self, who: np.ndarray, n_cut: int, out: Any) -> None:
        """out (n,): for each coordinate the mean of what is left without the ``n_cut`` smallest and largest values."""
        n_left = len(who) - 2 * n_cut
        for part, block in self._blocks(who):
            block.sort(axis=0)
            middle = np.add.reduce(block[n_cut : n_cut + n_left], axis=0, out=self._line[: block.shape[1]])
            out[part] = np.divide(middle, n_left, out=middle)

    def _blocks(self, who: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        """Where a block lies, and a copy of it (len(who), length) to work in."""
        n = self.values.shape[1]
        for start in range(0, n, BLOCK):
            part = slice(start, min(start + BLOCK, n))
            block = self._block[: len(who), : part.stop - start]
            for line, i in zip(block, who):
                line[...] = self.values[i, part]
            yield part, block
