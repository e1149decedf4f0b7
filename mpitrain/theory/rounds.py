"""Methods of rounds, local steps and then an average: Local SGD, SlowMo, DiLoCo, Parle.

On h x^2 / 2 with equal workers tau local steps of SGD multiply the error by q = (1-eh)^tau. Sources of the methods:
Wang et al., SlowMo, 2019, https://arxiv.org/abs/1910.00643; Douillard et al., DiLoCo, 2023,
https://arxiv.org/abs/2311.08105; Chaudhari et al., Parle, 2017, https://arxiv.org/abs/1707.00424. The formulas were
derived for this project.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from mpitrain.theory.linear import Matrix, spectral_radius


def local_sgd_fixed_point(h: ArrayLike, b: ArrayLike, eta: float, tau: int) -> float:
    """Where Local SGD settles if worker i has f_i(x) = h_i (x - b_i)^2 / 2: mean of b_i, weights 1-(1-eta h_i)^tau.

    For tau = 1 the weights are those of sum f_i; for many steps all are 1, however flat a worker's function.
    """
    weights = 1 - (1 - eta * np.asarray(h, float)) ** tau
    return float(weights @ np.asarray(b, float) / weights.sum())


def slowmo_matrix(eh: float, tau: int, alpha: float, beta: float) -> Matrix:
    """One round of SlowMo on (eta*u, x), shape (2, 2): the slow momentum as a displacement, and the common parameters.

        u <- beta*u + (x - average)/eta;   x <- x - alpha*eta*u;   [[beta, 1-q], [-alpha*beta, 1-alpha(1-q)]]

    Args:
        eh, tau: of the local steps.
        alpha: the slow learning rate.
        beta: the slow momentum; beta = 0 and alpha = 1 is Local SGD.
    """
    moved = 1 - (1 - eh) ** tau
    return np.array([[beta, moved], [-alpha * beta, 1 - alpha * moved]])


def slowmo_is_stable(eh: float, tau: int, alpha: float, beta: float) -> bool:
    """Whether SlowMo converges: 0 < alpha(1-q) < 2(1+beta), for 0 <= beta < 1."""
    return 0 < alpha * (1 - (1 - eh) ** tau) < 2 * (1 + beta)


def diloco_matrix(eh: float, tau: int, alpha: float, delta: float) -> Matrix:
    """One round of DiLoCo with SGD inside on (buffer, theta), shape (2, 2).

        buffer <- delta*buffer + D;   theta <- theta - alpha*(D + delta*buffer);   D = theta - average = (1-q) theta
        [[delta, 1-q], [-alpha delta^2, 1-alpha(1-q)(1+delta)]]

    Args:
        eh, tau: of the inner steps.
        alpha: the outer learning rate.
        delta: the outer Nesterov momentum, as torch has it; alpha = 1 and delta = 0 is Local SGD.
    """
    moved = 1 - (1 - eh) ** tau
    return np.array([[delta, moved], [-alpha * delta**2, 1 - alpha * moved * (1 + delta)]])


def diloco_radius(eh: float, tau: int, alpha: float, delta: float) -> float:
    """The spectral radius of ``diloco_matrix``. On an easy quadratic outer momentum slows down."""
    return spectral_radius(diloco_matrix(eh, tau, alpha, delta))


def diloco_is_stable(eh: float, tau: int, alpha: float, delta: float) -> bool:
    """Whether DiLoCo with SGD inside converges: 0 < alpha(1-q) < 2(1+delta)/(1+2 delta), for 0 <= delta < 1."""
    return 0 < alpha * (1 - (1 - eh) ** tau) < 2 * (1 + delta) / (1 + 2 * delta)


def parle_inner_fixed_point(h: float, coupling: float, x: float) -> float:
    """Where Parle's inner iterate settles, coupling = 1/gamma: y* = coupling*x/(h + coupling)."""
    return coupling * x / (h + coupling)


def parle_inner_iterate(h: float, coupling: float, eta: float, x: float, n_steps: int) -> float:
    """Parle's inner iterate from y = x after n_steps without momentum: y* + (x - y*)(1 - eta(h + coupling))^n_steps.

    y <- y - eta*(h*y + coupling*(y - x)).
    """
    fixed = parle_inner_fixed_point(h, coupling, x)
    return fixed + (x - fixed) * (1 - eta * (h + coupling)) ** n_steps
