"""Gradients of many workers, computed together before they are needed.

A worker's parameters do not change between two of its steps, so that the gradient of its next step is settled at the
end of the last one. It is computed when one of the gradients settled so far is needed, in a batch with others. The
order of events in virtual time does not change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

Gradient = Callable[[int, np.ndarray], Any]
"""``gradient(rank, x)`` returns the gradient (n,) of a worker at its parameters x (n,)."""


@runtime_checkable
class BatchedGradient(Protocol):
    """A gradient that can be computed for several workers at once.

    Attributes:
        largest_batch: The number of workers in a batch, at most.
    """

    largest_batch: int

    def batch(self, ranks: list[int], xs: list[np.ndarray], out: np.ndarray) -> None:
        """Compute the next gradient of each of k workers at its parameters xs[k] (n,), into ``out`` (k, n)."""


class OneByOne:
    """Gradients computed when they are needed.

    Args:
        gradient: Computes one.
    """

    def __init__(self, gradient: Gradient) -> None:
        self._gradient = gradient

    def announce(self, rank: int) -> None:
        """Do nothing."""

    def __call__(self, rank: int, x: np.ndarray) -> Any:
        """Return the worker's next gradient (n,)."""
        return self._gradient(rank, x)


class AheadOfTime:
    """Gradients computed in batches of the workers that have announced their next one.

    Args:
        gradient: Computes a batch.
        xs: The parameters of each worker, which do not move. All workers are announced at first.
    """

    def __init__(self, gradient: BatchedGradient, xs: Sequence[np.ndarray]) -> None:
        self._gradient, self._xs = gradient, xs
        self._announced = dict.fromkeys(range(len(xs)))  # in the order of the announcements
        self._rows: dict[int, np.ndarray] = {}  # gradients computed and not yet taken

    def announce(self, rank: int) -> None:
        """Note that the worker's parameters stay as they are until it takes its next gradient."""
        self._announced[rank] = None

    def __call__(self, rank: int, x: np.ndarray) -> np.ndarray:
        """Return the gradient (n,) of a worker that has announced it; valid until the next call."""
        if rank not in self._rows:
            self._compute(rank)
        return self._rows.pop(rank)

    def _compute(self, rank: int) -> None:
        """Compute the gradients of a worker and of those that announced theirs first."""
        del self._announced[rank]
        ranks = [rank, *list(self._announced)[: self._gradient.largest_batch - 1]]
        for other in ranks[1:]:
            del self._announced[other]
        out = np.empty((len(ranks), self._xs[rank].size), self._xs[rank].dtype)
        self._gradient.batch(ranks, [self._xs[member] for member in ranks], out)
        self._rows.update(zip(ranks, out, strict=True))


def ahead_of_time(gradient: Any, xs: Sequence[np.ndarray]) -> OneByOne | AheadOfTime:
    """Return the gradients of workers with parameters ``xs``, computed in batches where that is possible."""
    if isinstance(gradient, BatchedGradient) and gradient.largest_batch > 1:
        return AheadOfTime(gradient, xs)
    return OneByOne(gradient)
