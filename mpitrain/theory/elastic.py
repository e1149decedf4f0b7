"""The EASGD family on a quadratic: matrices, stability, the optimal moving rate, the fixed point.

f(x) = h x^2 / 2 per coordinate, eh = eta*h. A small matrix maps the workers' mean and the center to those of the next
period. The disagreement factor multiplies a worker's difference from the mean. A method is stable if the spectral
radius of the matrix and the modulus of the factor are below 1.

Sources: Zhang, Choromanska, LeCun, Deep learning with Elastic Averaging SGD, 2015, https://arxiv.org/abs/1412.6651
(the methods); Zhang's thesis, 2016, https://arxiv.org/abs/1605.02216, chapters 5 and 6 (stability, the negative moving
rate, the Gauss-Seidel view). The formulas were derived again for this project and are tested against eigenvalues.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from mpitrain.errors import UsageError
from mpitrain.theory.linear import Matrix

Order = Literal["jacobi", "center_first", "worker_first"]
GradPoint = Literal["pre", "post"]


def easgd_matrix(eh: float, alpha: float, beta: float, tau: int = 1) -> Matrix:
    """Return the matrix of a period of synchronous EASGD on (mean of x_i, c), shape (2, 2).

        diag((1-eh)^(tau-1), 1) @ [[1-eh-alpha, alpha], [beta, 1-beta]]

    The exchange is part of the first of the tau steps. Elastic symmetry means beta = p*alpha. Derived for this project
    from eq. 5 and 6 of arXiv 1412.6651.
    """
    exchange = np.array([[1 - eh - alpha, alpha], [beta, 1 - beta]])
    return np.diag([(1 - eh) ** (tau - 1), 1.0]) @ exchange


def easgd_full_matrix(eh: float, alpha: float, p: int, beta: float | None = None, tau: int = 1) -> Matrix:
    """Return the matrix of a period of synchronous EASGD on (x_1, ..., x_p, c), shape (p+1, p+1).

    The default of ``beta`` is p*alpha.

        x_i <- x_i - eh*x_i - alpha*(x_i - c);   c <- (1-beta)*c + beta*mean(x_i);   then tau-1 steps of SGD

    The equations are 5 and 6 of arXiv 1412.6651. The eigenvalues of the matrix are those of ``easgd_matrix`` and, p-1
    times, ``easgd_disagreement_factor``.
    """
    beta = p * alpha if beta is None else beta
    exchange = np.diag([1 - eh - alpha] * p + [1 - beta])
    exchange[:p, p], exchange[p, :p] = alpha, beta / p
    return np.diag([(1 - eh) ** (tau - 1)] * p + [1.0]) @ exchange


def easgd_disagreement_factor(eh: float, alpha: float, tau: int = 1) -> float:
    """Return the factor by which x_i - mean(x_i) changes in a period: (1-eh)^(tau-1) * (1-eh-alpha)."""
    return (1 - eh) ** (tau - 1) * (1 - eh - alpha)


def easgd_is_stable(eh: float, alpha: float, beta: float, p: int = 2) -> bool:
    """Return whether synchronous EASGD with tau = 1 converges on the quadratic.

    The conditions are necessary and sufficient. With a = eh+alpha+beta and q = eh*beta, the mean and the center
    converge if and only if

        q > 0,   a > q,   4 - 2a + q > 0, which is (2-eh)(2-beta) > 2*alpha

    Two or more workers converge to each other if and only if |1-eh-alpha| < 1. For alpha >= 0 and eh, beta > 0, these
    conditions are those of the thesis: (2-eh)(2-beta) > 2*alpha and (2-eh)+(2-beta) > alpha. For alpha < 0 they differ
    from those of the thesis: a > q and eh > -alpha decide. Derived for this project (Jury's criterion).

    Args:
        eh: Step size times curvature.
        alpha: The workers' moving rate, of any sign.
        beta: The center's moving rate, p*alpha under elastic symmetry.
        p: The number of workers. All p >= 2 have the same region; p = 1 has no disagreement.
    """
    a, q = eh + alpha + beta, eh * beta
    return q > 0 and a > q and 4 - 2 * a + q > 0 and (p == 1 or abs(1 - eh - alpha) < 1)


def easgd_mean(t: int, eh: float, alpha: float, p: int, x_start: ArrayLike, c_start: float) -> float:
    """Return E[c_t] of synchronous EASGD with beta = p*alpha and tau = 1, from ``x_start`` (p,), with the minimum at 0.

        E[c_t] = G^t c_0 + (G^t - F^t)/(G - F) * alpha*u_0
        G, F = 1 - (a -+ sqrt(a^2 - 4 eh p alpha))/2,   a = eh + (p+1)*alpha
        alpha*u_0 = alpha*sum_i(x_i) - (1 - eh - alpha - F)*c_0

    The lemma of arXiv 1412.6651 (from memory) has u_0 = sum_i(x_i - alpha/(1-p*alpha-F) c_0). The form here has the
    same value, and no division by zero at alpha = 0. Powers of ``easgd_matrix`` give the same result.
    """
    a = eh + (p + 1) * alpha
    root = math.hypot(
        eh - (p - 1) * alpha, 2 * math.sqrt(p) * alpha
    )  # sqrt(a^2 - 4 eh p alpha), never of a negative number
    g, f = 1 - (a - root) / 2, 1 - (a + root) / 2
    drive = alpha * float(np.sum(x_start)) - (1 - eh - alpha - f) * c_start
    quotient = sum(g**k * f ** (t - 1 - k) for k in range(t))  # (G^t - F^t)/(G - F), also at eh = alpha = 0
    return g**t * c_start + quotient * drive


def easgd_fixed_point(h: ArrayLike, b: ArrayLike, eta: float, alpha: float, tau: int = 1) -> tuple[float, Matrix]:
    """Return the fixed point (c*, x* of shape (p,)) of synchronous EASGD if f_i(x) = h_i (x - b_i)^2 / 2.

        k_i = A_i alpha / (1 - A_i (1 - eta h_i - alpha)),   A_i = (1 - eta h_i)^(tau-1)
        c* = sum_i (1-k_i) b_i / sum_i (1-k_i),   x_i* = b_i + k_i (c* - b_i)  (before the exchange)

    f_i is the loss of worker i. For tau = 1 the weights 1-k_i are proportional to the curvatures of the losses' Moreau
    envelopes, h_i rho/(h_i + rho) with rho = alpha/eta. In general c* minimizes sum f_i only if all h_i are equal.
    Derived for this project.
    """
    h, b = np.asarray(h, float), np.asarray(b, float)
    local = (1 - eta * h) ** (tau - 1)
    k = local * alpha / (1 - local * (1 - eta * h - alpha))
    center = float(np.sum((1 - k) * b) / np.sum(1 - k))
    return center, b + k * (center - b)


def eamsgd_matrix(eh: float, alpha: float, beta: float, delta: float, tau: int = 1) -> Matrix:
    """Return the matrix of a period of synchronous EAMSGD on (mean of v_i, mean of x_i, c), shape (3, 3).

    With dh = delta*(1-eh):

        v <- dh*v - eh*x;   x <- x + v_new - alpha*(x - c);   c <- (1-beta)*c + beta*x
        [[dh, -eh, 0], [dh, 1-eh-alpha, alpha], [0, beta, 1-beta]],   then tau-1 steps with alpha = beta = 0

    The method is algorithm 2 of arXiv 1412.6651, with an exchange of all workers at once. The matrix was derived for
    this project.
    """
    dh = delta * (1 - eh)
    exchange = np.array([[dh, -eh, 0.0], [dh, 1 - eh - alpha, alpha], [0.0, beta, 1 - beta]])
    local = np.array([[dh, -eh, 0.0], [dh, 1 - eh, 0.0], [0.0, 0.0, 1.0]])
    return np.linalg.matrix_power(local, tau - 1) @ exchange


def optimal_moving_rate(eh: float, beta: float) -> tuple[float, float]:
    """Return the alpha that minimizes the spectral radius of ``easgd_matrix`` for given eh and beta, and this radius.

        alpha* = -(sqrt(beta) - sqrt(eh))^2 <= 0,   radius* = 1 - sqrt(eh*beta)

    At beta = 1 and alpha = -delta*(1-eh), the eigenvalues are those of Nesterov's momentum delta: a negative moving
    rate acts as momentum. The alpha* above is optimal for the mean of the workers only. A step multiplies the
    differences of the workers by 1-eh-alpha, which is above 1 unless eh > -alpha. Several workers therefore profit only
    if they have equal starts and equal gradients. The result is in the abstract and chapter 5 of the thesis; the
    formulas were derived for this project.
    """
    if eh <= 0 or beta <= 0:
        raise UsageError(f"the optimal moving rate needs positive eh and beta, not {eh:g} and {beta:g}")
    return -((math.sqrt(beta) - math.sqrt(eh)) ** 2), 1 - math.sqrt(eh * beta)


def elastic_order_matrix(
    eh: float,
    alpha: float,
    beta: float,
    *,
    order: Order = "jacobi",
    grad_point: GradPoint = "pre",
    tau: int = 1,
) -> Matrix:
    """Return the matrix of a period with an elastic exchange in the given order, on (mean of x_i, c), shape (2, 2).

        jacobi        both sides from the old values
        center_first  c <- c + beta*(x - c), then x <- x - alpha*(x - c_new)
        worker_first  x <- x - alpha*(x - c), then c <- c + beta*(x_new - c)

    With ``pre``, the worker's assignment includes the gradient of the old x, and tau-1 steps of SGD follow. With
    ``post``, the exchange is made alone, and tau steps follow.

    EASGD is (jacobi, pre). Synchronous DOWNPOUR is (center_first, post) with alpha = 1 and beta = p. Local SGD is the
    same with beta = 1. The idea is from chapter 6 of the thesis; derived for this project.
    """
    e = eh if grad_point == "pre" else 0.0
    worker, center = np.array([1 - e - alpha, alpha]), np.array([beta, 1 - beta])
    if order == "center_first":
        worker = (1 - e - alpha) * np.array([1.0, 0.0]) + alpha * center
    elif order == "worker_first":
        center = beta * worker + (1 - beta) * np.array([0.0, 1.0])
    local_steps = tau - 1 if grad_point == "pre" else tau
    return np.diag([(1 - eh) ** local_steps, 1.0]) @ np.array([worker, center])


def gauss_seidel_is_stable(eh: float, alpha: float, beta: float, p: int = 2) -> bool:
    """Return whether EASGD with a Gauss-Seidel exchange converges, in either order.

    The gradient point is ``pre`` and tau = 1.

        eh*beta > 0,   (2-beta)(2-eh) > 2*alpha*(1-beta),   |(1-eh-alpha)(1-beta)| < 1

    Two or more workers also need |1-eh-alpha| < 1. For alpha > 0 and 0 < beta < 1, the region is strictly larger than
    that of EASGD, (2-beta)(2-eh) > 2*alpha. Derived for this project.
    """
    shrinks = eh * beta > 0 and (2 - beta) * (2 - eh) > 2 * alpha * (1 - beta)
    return shrinks and abs((1 - eh - alpha) * (1 - beta)) < 1 and (p == 1 or abs(1 - eh - alpha) < 1)
