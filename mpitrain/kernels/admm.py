"""A worker's turn in ADMM: update its multiplier, its parameters and its contribution to the center.

Boyd, Parikh, Chu, Peleato, Eckstein 2011, Distributed optimization and statistical learning via the alternating
direction method of multipliers, section 7.1; linearised and with multipliers scaled by rho as in Zhang, Choromanska,
LeCun 2015, https://arxiv.org/abs/1412.6651, section 4. The minimisation over x_i is one gradient step with an exact
proximal term, so that a turn is one pass. x is the worker's parameters, lam its multiplier, c the center.

The change of a contribution is guarded: where x_i or its multiplier is not finite, the contribution stays as it is.
"""

from __future__ import annotations

from typing import Final

from mpitrain.kernels.compile.declare import Kernel

_ZHANG: Final = "Zhang et al. 2015, arXiv 1412.6651, section 4"

_TURN: Final = """
    lam = lam - (x - c)
    x = (x - eta * (g + decay * x) + eta * rho * (lam + c)) / (1 + eta * rho)
"""

admm_local: Final = Kernel(
    "admm_local",
    f"""{_TURN}
    d = x - lam - c
    c = c + d
    """,
    arrays="x lam c g",
    scalars="eta rho decay",
    guard="d",
    source=_ZHANG,
    doc="Take a turn of all workers at once: c becomes this worker's contribution; their mean is the next center.",
)

admm_turn: Final = Kernel(
    "admm_turn",
    f"""{_TURN}
    d = x - lam - s
    s = s + d
    c = c + share * d
    """,
    arrays="x lam s g c",
    scalars="eta rho decay share",
    guard="d",
    source=_ZHANG,
    doc="Take a turn of one worker and replace its contribution s in the center c, the mean of all; share = 1/p.",
)

admm_arrival: Final = Kernel(
    "admm_arrival",
    f"""{_TURN}
    d = x - lam - s
    s = s + d
    m = m + share * d
    """,
    arrays="x lam s g c m",
    scalars="eta rho decay share",
    guard="d",
    source=f"{_ZHANG}; Zhang and Kwok 2014, Asynchronous distributed ADMM, algorithm 1",
    doc="Take a turn of one worker with the center fixed: its contribution s is replaced in m, the next center.",
)

KERNELS: Final = (admm_local, admm_turn, admm_arrival)
