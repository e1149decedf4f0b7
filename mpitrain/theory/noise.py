"""Noise: stationary variances, an upper bound for strongly convex functions, and multiplicative noise.

Additive noise: the gradient is h*x - xi with xi ~ N(0, sigma^2), independent for each step and worker. Multiplicative
noise: the curvature is random, u ~ Gamma(shape, rate) for each sample, which models the spread of the inputs.

Sources: Zhang, Choromanska, LeCun 2015, https://arxiv.org/abs/1412.6651 (variance of the center, strongly convex case);
Zhang's thesis, 2016, https://arxiv.org/abs/1605.02216, chapter 5 (the multiplicative model, from memory of it). The
formulas were derived again for this project and are tested against Lyapunov equations and Monte Carlo.
"""

from __future__ import annotations

import math

import numpy as np

from mpitrain.theory.linear import Matrix, spectral_radius


def allreduce_variance(eta: float, h: float, sigma: float, p: int) -> float:
    """Return the stationary variance of all-reduce SGD: (eta^2 sigma^2/p) / (1 - (1-eta*h)^2).

    Derived for this project.
    """
    return eta**2 * sigma**2 / p / (1 - (1 - eta * h) ** 2)


def msgd_matrix(eh: float, delta: float) -> Matrix:
    """Return the matrix of a step of SGD with Nesterov momentum on (v, x), shape (2, 2).

    With dh = delta*(1-eh):

        v <- delta*v - eta*g(x + delta*v);   x <- x + v
        [[dh, -eh], [dh, 1-eh]]

    The method is that of arXiv 1412.6651; the matrix was derived for this project.
    """
    dh = delta * (1 - eh)
    return np.array([[dh, -eh], [dh, 1 - eh]])


def msgd_variance(eta: float, h: float, sigma: float, delta: float) -> float:
    """Return the stationary variance of x under SGD with Nesterov momentum. Derived for this project.

    Var(x) = (eta^2 sigma^2/eh) * (1+dh) / ((1-dh) * (2(1+dh) - eh)),   eh = eta*h, dh = delta*(1-eh)
    """
    eh = eta * h
    dh = delta * (1 - eh)
    return eta**2 * sigma**2 / eh * (1 + dh) / ((1 - dh) * (2 * (1 + dh) - eh))


def critical_momentum(eh: float) -> tuple[float, float]:
    """Return the delta at which Nesterov momentum converges fastest, and its spectral radius.

        delta = (1-sqrt(eh)) / (1+sqrt(eh)),   radius = |1-sqrt(eh)|

    Both eigenvalues of ``msgd_matrix`` are then 1-sqrt(eh), so dh = (1-sqrt(eh))^2. For eh in (1, 2) this delta is
    negative, as chapter 5 of the thesis notes. Derived for this project.
    """
    root = math.sqrt(eh)
    return (1 - root) / (1 + root), abs(1 - root)


def easgd_center_variance(eta: float, h: float, sigma: float, p: int, alpha: float, beta: float | None = None) -> float:
    """Return the stationary variance of the center of synchronous EASGD with tau = 1.

    The default of ``beta`` is p*alpha.

        Var(c) = beta^2 eta^2 (sigma^2/p) * (2-a+q) / ((a-q) * q * (4-2a+q)),   a = eh+alpha+beta, q = eh*beta

    The formula is exact for every p, and alpha and beta may be chosen independently. Derived for this project; arXiv
    1412.6651 gives the limit of many workers.
    """
    eh, beta = eta * h, p * alpha if beta is None else beta
    a, q = eh + alpha + beta, eh * beta
    return beta**2 * eta**2 * sigma**2 / p * (2 - a + q) / ((a - q) * q * (4 - 2 * a + q))


def easgd_worker_variance(eta: float, h: float, sigma: float, p: int, alpha: float, beta: float | None = None) -> float:
    """Return the stationary variance of a worker of synchronous EASGD with tau = 1.

    It is the sum of the variance of the mean and that of the difference from the mean:

        Var(mean x) = eta^2 (sigma^2/p) * ((1+(1-beta)^2)(2-a+q) - 2(1-beta)(2-a)) / ((a-q) * q * (4-2a+q))
        Var(x_i - mean x) = eta^2 sigma^2 (1-1/p) / (1 - (1-eh-alpha)^2)

    a and q are those of ``easgd_center_variance``. Derived for this project.
    """
    eh, beta = eta * h, p * alpha if beta is None else beta
    a, q = eh + alpha + beta, eh * beta
    shape = (1 + (1 - beta) ** 2) * (2 - a + q) - 2 * (1 - beta) * (2 - a)
    mean = eta**2 * sigma**2 / p * shape / ((a - q) * q * (4 - 2 * a + q))
    return mean + eta**2 * sigma**2 * (1 - 1 / p) / (1 - (1 - eh - alpha) ** 2)


def easgd_center_variance_limit(eh: float, beta: float, sigma: float, h: float) -> float:
    """Return the limit of p*Var(c) of synchronous EASGD as p grows while beta = p*alpha stays fixed.

        beta*eh/((2-beta)(2-eh)) * (2-beta-eh+beta*eh)/(beta+eh-beta*eh) * sigma^2/h^2

    This is the corollary of arXiv 1412.6651. For beta = 1, it is p times the variance of all-reduce SGD.
    """
    width = beta * eh / ((2 - beta) * (2 - eh))
    return width * (2 - beta - eh + beta * eh) / (beta + eh - beta * eh) * sigma**2 / h**2


def averaged_center_variance(h: float, sigma: float, p: int, n_steps: int) -> float:
    """Return the asymptotic variance of the average of n_steps centers: sigma^2/(p h^2 n_steps).

    It depends on neither eta nor alpha, because the average of the center is asymptotically efficient (Polyak and
    Juditsky 1992; the lemma of arXiv 1412.6651).
    """
    return sigma**2 / (p * h**2 * n_steps)


def easgd_error_bound(
    eta: float, mu: float, smoothness: float, sigma: float, p: int, alpha: float, beta: float
) -> tuple[Matrix, Matrix]:
    """Return a bound on the errors of synchronous EASGD on a mu-strongly convex function: matrix (3, 3), offset (3,).

    The errors are (E|mean x - x*|^2, mean_i E|x_i - x*|^2, E|c - x*|^2). They stay below the values of the recursion
    e <- matrix @ e + offset if eta <= 2(1-alpha)/(mu+L), 0 <= alpha < 1 and 0 <= beta <= 1. With L = ``smoothness``:

        g1 = 2 eta mu L/(mu+L),   g2 = 2 eta L (1 - 2 sqrt(mu L)/(mu+L))
        [[1-g1-g2-alpha, g2, alpha], [0, 1-g1-alpha, alpha], [beta, 0, 1-beta]],   (eta^2 sigma^2/p, eta^2 sigma^2, 0)

    From memory of arXiv 1412.6651. sigma^2 is the variance of the gradient's noise, summed over all coordinates.
    """
    g1 = 2 * eta * mu * smoothness / (mu + smoothness)
    g2 = 2 * eta * smoothness * (1 - 2 * math.sqrt(mu * smoothness) / (mu + smoothness))
    matrix = np.array([[1 - g1 - g2 - alpha, g2, alpha], [0.0, 1 - g1 - alpha, alpha], [beta, 0.0, 1 - beta]])
    return matrix, np.array([eta**2 * sigma**2 / p, eta**2 * sigma**2, 0.0])


def spread_sgd_factor(eta: float, shape: float, rate: float, p: int) -> float:
    """Return E x_{t+1}^2 / E x_t^2 of SGD on f(x) = u x^2/2, where u is the mean of p draws from Gamma(shape, rate).

        r(eta) = 1 - 2 eta shape/rate + eta^2 shape (p*shape+1) / (p rate^2)

    The factor r is below 1 if and only if eta < ``spread_sgd_bound``. p is the mini-batch size, or the number of
    all-reduce workers. A smaller shape means a wider spread of the inputs. The model is from chapter 5 of the thesis,
    from memory; the factor was derived for this project.
    """
    return 1 - 2 * eta * shape / rate + eta**2 * shape * (p * shape + 1) / (p * rate**2)


def spread_sgd_bound(shape: float, rate: float, p: int) -> float:
    """Return the learning rate below which ``spread_sgd_factor`` is below 1: 2 p rate/(p*shape+1)."""
    return 2 * p * rate / (p * shape + 1)


def spread_sgd_optimum(shape: float, rate: float, p: int) -> tuple[float, float]:
    """Return the eta that minimizes ``spread_sgd_factor``, p rate/(p*shape+1), and the least factor, 1/(p*shape+1)."""
    return p * rate / (p * shape + 1), 1 / (p * shape + 1)


def easgd_second_moment(eta: float, alpha: float, beta: float, p: int, shape: float, rate: float) -> Matrix:
    """Return the matrix (4, 4) of a step of synchronous EASGD with multiplicative noise, on second moments.

    The moments are A = E x_i^2, B = E x_i x_j, C = E x_i c and D = E c^2.

    Each worker draws its own curvature u ~ Gamma(shape, rate), with mean mu = shape/rate and variance var =
    shape/rate^2. With m1 = 1 - eta*mu - alpha and m2 = m1^2 + eta^2 var:

        A' = m2 A + 2 alpha m1 C + alpha^2 D
        B' = m1^2 B + 2 alpha m1 C + alpha^2 D
        C' = (m1 beta/p) A + (m1 beta (p-1)/p) B + (m1 (1-beta) + alpha beta) C + alpha (1-beta) D
        D' = (beta^2/p) A + (beta^2 (p-1)/p) B + 2 beta (1-beta) C + (1-beta)^2 D

    The model is from memory of chapter 5 of the thesis; the moments were derived for this project.
    """
    m1 = 1 - eta * shape / rate - alpha
    m2 = m1**2 + eta**2 * shape / rate**2
    return np.array(
        [
            [m2, 0.0, 2 * alpha * m1, alpha**2],
            [0.0, m1**2, 2 * alpha * m1, alpha**2],
            [m1 * beta / p, m1 * beta * (p - 1) / p, m1 * (1 - beta) + alpha * beta, alpha * (1 - beta)],
            [beta**2 / p, beta**2 * (p - 1) / p, 2 * beta * (1 - beta), (1 - beta) ** 2],
        ]
    )


def easgd_is_mean_square_stable(eta: float, alpha: float, beta: float, p: int, shape: float, rate: float) -> bool:
    """Return whether all second moments converge to 0: the spectral radius of ``easgd_second_moment`` is below 1."""
    return spectral_radius(easgd_second_moment(eta, alpha, beta, p, shape, rate)) < 1
