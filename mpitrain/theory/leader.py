"""Pulls towards a leader, and when they or an elastic center leave workers trapped in a double well.

Sources: Teng et al., Leader Stochastic Gradient Descent, 2019, https://arxiv.org/abs/1905.10395; Zhang's thesis, 2016,
https://arxiv.org/abs/1605.02216, section 5.3 (the trap of EASGD). The thresholds were derived for this project.

The double well is f(x) = (1-x^2)^2 / 4: minima at -1 and 1, a saddle at 0.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from mpitrain.theory.linear import Matrix

EASGD_TRAP = 2 / 3
"""The rho below which two EASGD workers can stay in different wells, with the center on the saddle between them."""

LEADER_TRAP = 1 / 4
"""The lam/eta up to which a follower can stay in the well opposite its leader's."""


def follower_factor(eh: float, lam: float) -> float:
    """Return 1 - eh - lam, by which a step with a pull ``lam`` multiplies a follower's distance to its leader."""
    return 1 - eh - lam


def follower_is_stable(eh: float, lam: float) -> bool:
    """Return whether followers converge to their leader: 0 < eh + lam < 2."""
    return 0 < eh + lam < 2


def trapped_follower(lam: float, eta: float) -> float | None:
    """Return the point where a follower stays trapped in the well at -1 while the leader is at 1; None if it escapes.

    Besides 1, the equation x - x^3 = (lam/eta)(x - 1) has the roots of x^2 + x + lam/eta = 0. They exist for lam/eta <=
    1/4. The lower root is stable and is the result.
    """
    discriminant = 1 - 4 * lam / eta
    return None if discriminant < 0 else (-1 - math.sqrt(discriminant)) / 2


def double_well_gradient(x: ArrayLike) -> Matrix:
    """Return x^3 - x, the gradient of (1-x^2)^2 / 4."""
    x = np.asarray(x, float)
    return x**3 - x


def trapped_easgd(rho: float) -> tuple[float, float, float] | None:
    """Return the critical point (s, -s, 0) of the elastic objective of two workers in the double well, s = sqrt(1-rho).

    The point exists for rho < 1; otherwise the result is None. It is a strict local minimum, in which EASGD stays, if
    and only if rho < 2/3.
    """
    if rho >= 1:
        return None
    s = math.sqrt(1 - rho)
    return s, -s, 0.0


def elastic_double_well_hessian(x: ArrayLike, rho: float) -> Matrix:
    """Return the Hessian of sum_i f(x_i) + (rho/2) sum_i (x_i - c)^2 in (x_1, ..., x_p, c), shape (p+1, p+1)."""
    x = np.asarray(x, float)
    p = len(x)
    hessian = np.diag([*(3 * x**2 - 1 + rho), p * rho])
    hessian[:p, p] = hessian[p, :p] = -rho
    return hessian
