"""One worker at a time: round-robin EASGD, whose stability bound is independent of p, and round-robin ADMM.

At global time t only worker (t mod p) + 1 acts. A sweep is p turns. Source: Zhang, Choromanska, LeCun 2015,
https://arxiv.org/abs/1412.6651, section 3.3 and figure 1, where ADMM diverges for settings at which each single step is
stable: it has no bound like that of EASGD. The constants of the sweeps were computed for this project.
"""

from __future__ import annotations

import numpy as np

from mpitrain.theory.linear import Matrix


def round_robin_easgd_step(eh: float, alpha: float) -> Matrix:
    """Return the symmetric matrix of a worker's turn on (x_i, c): [[1-eh-alpha, alpha], [alpha, 1-alpha]]."""
    return np.array([[1 - eh - alpha, alpha], [alpha, 1 - alpha]])


def round_robin_easgd_bound(eh: float) -> float:
    """Return the largest alpha at which round-robin EASGD is stable: (4-2eh)/(4-eh), for 0 <= eh <= 2 and every p.

    For alpha between 0 and the bound, no turn increases the norm of (x_1, ..., x_p, c), because the matrix of a turn is
    symmetric. Therefore no sequence of turns increases the norm. Beyond the bound, a single turn may increase the norm,
    although a whole sweep may still be stable. The bound is from section 3.3 of arXiv 1412.6651.
    """
    return (4 - 2 * eh) / (4 - eh)


def round_robin_easgd_matrix(eh: float, alpha: float, p: int) -> Matrix:
    """Return the matrix of a sweep of round-robin EASGD on (x_1, ..., x_p, c), shape (p+1, p+1)."""
    sweep = np.eye(p + 1)
    for i in range(p):
        sweep[[i, p]] = round_robin_easgd_step(eh, alpha) @ sweep[[i, p]]
    return sweep


def round_robin_admm_matrix(eta: float, rho: float, p: int, h: float = 1.0) -> Matrix:
    """Return the matrix of a sweep of linearized ADMM on (lam_1, ..., lam_p, x_1, ..., x_p, c), shape (2p+1, 2p+1).

    In its turn, worker i makes these assignments, in which the multipliers lam are scaled by rho:

        lam_i <- lam_i - (x_i - c)
        x_i   <- (x_i - eta*h*x_i + eta*rho*(lam_i + c)) / (1 + eta*rho)
        c     <- (1/p) sum_j (x_j - lam_j)

    The structure is that of arXiv 1412.6651, section 3.3. The exact form is from memory, and was derived again for this
    project.
    """
    sweep = np.eye(2 * p + 1)
    lam, x, c = (
        sweep[:p],
        sweep[p : 2 * p],
        sweep[2 * p],
    )  # rows: each quantity in terms of those at the start of the sweep
    for i in range(p):
        lam[i] -= x[i] - c
        x[i] = ((1 - eta * h) * x[i] + eta * rho * (lam[i] + c)) / (1 + eta * rho)
        c[:] = (x - lam).mean(axis=0)
    return sweep
