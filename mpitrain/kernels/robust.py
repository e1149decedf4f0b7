"""Operations across workers' vectors: distances, weighted sums, and trimmed means of each coordinate.

`Rows` holds k vectors and processes them in blocks that stay in the cache, in float64 for any stored dtype; no method
allocates a whole vector. Distances are sums of squared differences and not derived from a Gram matrix: equal vectors
are exactly 0 apart, and a large common part does not cancel digits.

Bytes moved per element: every method reads k elements; `weighted_sum` and `trimmed_mean` also write one.
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
    doc="Copy a peer's z to x, with 0 where it is not finite.",
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
    doc="Add w times a gradient to a running sum; a non-finite sum is counted and reset to 0.",
)

KERNELS: Final = (receive, accumulate)


class Rows:
    """k vectors of n elements, initially zero.

    Args:
        k: The number of vectors.
        n: The number of elements of each.
        dtype: The dtype of the elements: float16, bfloat16, float32 or float64.

    Attributes:
        values: (k, n), one vector per row.
    """

    def __init__(self, k: int, n: int, dtype: Any) -> None:
        self.values = np.zeros((k, n), dtype)
        length = min(n, BLOCK)  # not more than the rows themselves
        self._block = np.empty((k, length))
        self._other = np.empty((k, length))
        self._line = np.empty(length)

    def squared_distances(self, rows: np.ndarray) -> np.ndarray:
        """Return the squared Euclidean distances between the given rows: (k, k) float64, with 0 for all other rows."""
        k, n_chosen = len(self.values), len(rows)
        squares = np.zeros((n_chosen, n_chosen))
        with np.errstate(over="ignore"):  # an infinite distance is a valid answer
            for _, block in self._blocks(rows):
                for i in range(n_chosen - 1):
                    d = np.subtract(block[i + 1 :], block[i], out=self._other[i + 1 : n_chosen, : block.shape[1]])
                    squares[i, i + 1 :] += np.einsum("ij,ij->i", d, d)
        distances = np.zeros((k, k))
        distances[np.ix_(rows, rows)] = squares + squares.T
        return distances

    def weighted_sum(self, weights: np.ndarray, out: Any) -> None:
        """Compute ``out = sum_i weights[i]*values[i]`` (n,), in the order of the rows, without rows of weight 0."""
        rows = np.flatnonzero(weights)
        for part, block in self._blocks(rows):
            block *= weights[rows, None]
            out[part] = np.add.reduce(block, axis=0, out=self._line[: block.shape[1]])

    def trimmed_mean(self, rows: np.ndarray, n_cut: int, out: Any) -> None:
        """Compute the trimmed mean of the given rows for each coordinate.

        The ``n_cut`` smallest and the ``n_cut`` largest values of each coordinate are dropped.

        Args:
            rows: The indices of the rows.
            n_cut: The number of values to drop at each end.
            out: (n,) the means, as a result.
        """
        n_left = len(rows) - 2 * n_cut
        for part, block in self._blocks(rows):
            block.sort(axis=0)
            middle = np.add.reduce(block[n_cut : n_cut + n_left], axis=0, out=self._line[: block.shape[1]])
            out[part] = np.divide(middle, n_left, out=middle)

    def _blocks(self, rows: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield the slice of each block and a working copy of the given rows in it, (len(rows), length)."""
        n = self.values.shape[1]
        for start in range(0, n, BLOCK):
            part = slice(start, min(start + BLOCK, n))
            block = self._block[: len(rows), : part.stop - start]
            for line, i in zip(block, rows):
                line[...] = self.values[i, part]
            yield part, block
