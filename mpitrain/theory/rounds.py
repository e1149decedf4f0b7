"""Methods with rounds of local steps followed by an average: Local SGD, SlowMo, DiLoCo, Parle.

On h x^2 / 2, with equal workers, tau local steps of SGD multiply the error by q = (1-eh)^tau. Sources of the methods:
Wang et al., SlowMo, 2019, https://arxiv.org/abs/1910.00643; Douillard et al., DiLoCo, 2023,
https://arxiv.org/abs/2311.08105; Chaudhari et al., Parle, 2017, https://arxiv.org/abs/1707.00424. The formulas were
derived for this project.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from mpitrain.theory.linear import Matrix, spectral_radius


def local_sgd_fixed_point(h: ArrayLike, b: ArrayLike, eta: float, tau: int) -> float:
    """Return the fixed point of Local SGD if worker i has f_i(x) = h_i (x - b_i)^2 / 2.

    It is the mean of b_i with weights 1-(1-eta h_i)^tau. For tau = 1, it minimizes sum f_i. For large tau, all weights
    approach 1.
    """
    weights = 1 - (1 - eta * np.asarray(h, float)) ** tau
    return float(weights @ np.asarray(b, float) / weights.sum())


def slowmo_matrix(eh: float, tau: int, alpha: float, beta: float) -> Matrix:
    """Return the matrix of a round of SlowMo on (eta*u, x), shape (2, 2), where u is the slow momentum.

        u <- beta*u + (x - average)/eta;   x <- x - alpha*eta*u;   [[beta, 1-q], [-alpha*beta, 1-alpha(1-q)]]

    Args:
        eh: Step size times curvature of the local steps.
        tau: The number of local steps.
        alpha: The slow learning rate.
        beta: The slow momentum; beta = 0 and alpha = 1 is Local SGD.
    """
    moved = 1 - (1 - eh) ** tau
    return np.array([[beta, moved], [-alpha * beta, 1 - alpha * moved]])


def slowmo_is_stable(eh: float, tau: int, alpha: float, beta: float) -> bool:
    """Return whether SlowMo converges: 0 < alpha(1-q) < 2(1+beta), for 0 <= beta < 1."""
    return 0 < alpha * (1 - (1 - eh) ** tau) < 2 * (1 + beta)


def diloco_matrix(eh: float, tau: int, alpha: float, delta: float) -> Matrix:
    """Return the matrix of a round of DiLoCo with inner SGD on (buffer, theta), shape (2, 2).

        buffer <- delta*buffer + D;   theta <- theta - alpha*(D + delta*buffer);   D = theta - average = (1-q) theta
        [[delta, 1-q], [-alpha delta^2, 1-alpha(1-q)(1+delta)]]

    Args:
        eh: Step size times curvature of the inner steps.
        tau: The number of inner steps.
        alpha: The outer learning rate.
        delta: The outer Nesterov momentum, in torch's convention; alpha = 1 and delta = 0 is Local SGD.
    """
    moved = 1 - (1 - eh) ** tau
    return np.array([[delta, moved], [-alpha * delta**2, 1 - alpha * moved * (1 + delta)]])


def diloco_radius(eh: float, tau: int, alpha: float, delta: float) -> float:
    """Return the spectral radius of ``diloco_matrix``."""
    return spectral_radius(diloco_matrix(eh, tau, alpha, delta))


def diloco_is_stable(eh: float, tau: int, alpha: float, delta: float) -> bool:
    """Return whether DiLoCo with inner SGD converges: 0 < alpha(1-q) < 2(1+delta)/(1+2 delta), for 0 <= delta < 1."""
    return 0 < alpha * (1 - (1 - eh) ** tau) < 2 * (1 + delta) / (1 + 2 * delta)


def parle_inner_fixed_point(h: float, coupling: float, x: float) -> float:
    """Return the fixed point of Parle's inner loop, y* = coupling*x/(h + coupling), where coupling = 1/gamma."""
    return coupling * x / (h + coupling)


def parle_inner_iterate(h: float, coupling: float, eta: float, x: float, n_steps: int) -> float:
    """Return Parle's inner iterate after n_steps from y = x without momentum: y <- y - eta*(h*y + coupling*(y - x)).

    It is y* + (x - y*)(1 - eta(h + coupling))^n_steps.
    """
    fixed = parle_inner_fixed_point(h, coupling, x)
    return fixed + (x - fixed) * (1 - eta * (h + coupling)) ** n_steps
