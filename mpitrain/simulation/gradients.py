"""Gradients of many workers, computed together before they are needed.

A worker's parameters do not change between two of its steps, so that the gradient of its next step can be computed as
soon as a step has ended. When one gradient is needed, those of other workers that can be computed by then are computed
in the same batch. The order of events in virtual time does not change.
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
        largest_batch: The largest number of workers in a batch.
    """

    largest_batch: int

    def batch(self, ranks: list[int], xs: list[np.ndarray], out: np.ndarray) -> None:
        """Compute the next gradients of k workers at their parameters ``xs``, (n,) each, into ``out`` (k, n)."""


class OneByOne:
    """Gradients that are computed one at a time, when they are needed.

    Args:
        gradient: The function that computes a gradient.
    """

    def __init__(self, gradient: Gradient) -> None:
        self._gradient = gradient

    def announce(self, rank: int) -> None:
        """Do nothing."""

    def __call__(self, rank: int, x: np.ndarray) -> Any:
        """Return the worker's next gradient (n,)."""
        return self._gradient(rank, x)


class AheadOfTime:
    """Gradients that are computed in batches, before they are needed.

    A worker announces when its parameters are final, so that its next gradient can be part of a batch.

    Args:
        gradient: The object that computes a batch.
        xs: The array with the parameters of each worker. They count as announced at first.
    """

    def __init__(self, gradient: BatchedGradient, xs: Sequence[np.ndarray]) -> None:
        self._gradient, self._xs = gradient, xs
        self._announced = dict.fromkeys(range(len(xs)))  # in the order of the announcements
        self._rows: dict[int, np.ndarray] = {}  # gradients computed and not yet taken

    def announce(self, rank: int) -> None:
        """Announce that the worker's parameters will not change before its next gradient."""
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
    """Return an object that computes the gradients of workers at ``xs``, in batches if ``gradient`` can do so."""
    if isinstance(gradient, BatchedGradient) and gradient.largest_batch > 1:
        return AheadOfTime(gradient, xs)
    return OneByOne(gradient)
