"""What every linear model of a method is asked: how fast it shrinks, and where its noise settles.

On a quadratic each coordinate of a method's state s obeys s' = M s + noise of its own, so a matrix says everything.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mpitrain.errors import UsageError

Matrix = NDArray[np.float64]


def spectral_radius(matrix: ArrayLike) -> float:
    """The largest eigenvalue modulus of a square matrix: below 1 the method converges, above 1 it diverges."""
    return float(np.abs(np.linalg.eigvals(np.asarray(matrix))).max())


def stationary_covariance(matrix: ArrayLike, noise: ArrayLike) -> Matrix:
    """The covariance S that s' = M s + xi keeps: S = M S M^T + Q. Shape (n, n), as M and Q = Cov(xi).

    Raises:
        UsageError: the spectral radius of M is not below 1, so there is none.
    """
    m, q = np.asarray(matrix, float), np.asarray(noise, float)
    if (radius := spectral_radius(m)) >= 1:
        raise UsageError(f"no stationary variance: the spectral radius is {radius:.6g}, it must be below 1")
    return np.linalg.solve(np.eye(m.size) - np.kron(m, m), q.reshape(-1)).reshape(m.shape)
