"""Linear recursions: the rate of convergence and the stationary covariance.

On a quadratic each coordinate of a method's state s follows s' = M s + noise, independently of the others.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mpitrain.errors import UsageError

Matrix = NDArray[np.float64]


def spectral_radius(matrix: ArrayLike) -> float:
    """Return the largest modulus of the eigenvalues of a square matrix. A method converges if it is below 1."""
    return float(np.abs(np.linalg.eigvals(np.asarray(matrix))).max())


def stationary_covariance(matrix: ArrayLike, noise: ArrayLike) -> Matrix:
    """Return the stationary covariance S of the recursion s' = M s + xi.

    M is ``matrix`` and ``noise`` is Q = Cov(xi). S, M and Q are (n, n), and S = M S M^T + Q.

    Raises:
        UsageError: The spectral radius of M is not below 1, so S does not exist.
    """
    m, q = np.asarray(matrix, float), np.asarray(noise, float)
    if (radius := spectral_radius(m)) >= 1:
        raise UsageError(f"no stationary variance: the spectral radius is {radius:.6g}, it must be below 1")
    return np.linalg.solve(np.eye(m.size) - np.kron(m, m), q.reshape(-1)).reshape(m.shape)
