"""Repair of a worker's own vectors after a gradient that was not finite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mpitrain import kernels

STEPS_BETWEEN_CHECKS = 50
"""Steps between two reads of the number of non-finite elements on a GPU, because a read waits for the GPU."""


def is_finite(vector: Any) -> bool:
    """Whether all elements of a vector (n,) are finite."""
    return bool(np.isfinite(kernels.to_host(vector)).all())


def replace_nonfinite(vector: Any, other: Any) -> None:
    """Replace the non-finite elements of ``vector`` (n,) by the elements of ``other`` (n,) at the same places."""
    own = kernels.to_host(vector)
    kernels.assign(vector, np.where(np.isfinite(own), own, kernels.to_host(other)))


def repair(worker: Any) -> bool:
    """Replace the non-finite elements of this worker's vectors if new ones have been counted; see ``reset``. Local.

    Args:
        worker: A ``Worker``.

    Returns:
        Whether new non-finite elements have been counted.
    """
    n_nonfinite: Any = worker.comm.statistics.n_nonfinite
    if not isinstance(n_nonfinite, int | np.integer) and worker.t % STEPS_BETWEEN_CHECKS:
        return False
    before, worker.n_nonfinite = worker.n_nonfinite, int(n_nonfinite)
    if worker.n_nonfinite == before:
        return False
    reset(worker.positions, worker.velocities, worker.consensus)
    return True


def reset(positions: Sequence[Any], velocities: Sequence[Any], consensus: Callable[[Any], object]) -> None:
    """Replace the non-finite elements of a worker's own vectors. Local.

    Args:
        positions: Vectors (n,) of parameters; the elements of the consensus replace their non-finite elements.
        velocities: Vectors (n,) such as momenta; their non-finite elements become zero.
        consensus: A function that writes the consensus to a vector (n,).
    """
    if not all(is_finite(vector) for vector in positions):
        evaluated = np.zeros_like(positions[0])
        consensus(evaluated)
        for vector in positions:
            replace_nonfinite(vector, evaluated)
    for vector in velocities:
        kernels.keep_finite(vector)
