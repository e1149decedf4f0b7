"""What happens between rounds of local steps: slow momentum, outer Nesterov, delayed corrections, Parle's two loops.

Workers meet rarely, and then exchange the displacement of a whole round, theta - x, as if it were a gradient: the outer
gradient. What goes into a mean over workers is guarded and counted, so that a worker that has diverged can be left out.
"""

from __future__ import annotations

from typing import Final

from mpitrain.kernels.compile.declare import Kernel

keep_finite: Final = Kernel(
    "keep_finite",
    """
    d = x
    x = d
    """,
    arrays="x",
    guard="d",
    source="the guard alone",
    doc="Elements that are not finite become zero and are counted; the others keep their bits.",
)

outer_gradient: Final = Kernel(
    "outer_gradient",
    """
    h = theta - x
    d = h
    """,
    arrays="d theta x",
    guard="h",
    source="Douillard et al. 2023, DiLoCo, arXiv 2311.08105, Algorithm 1",
    doc="d becomes what a round of local steps has taken from theta, where it began.",
)

slow_momentum: Final = Kernel(
    "slow_momentum",
    """
    h = d
    u = beta * u + inverse * h
    theta = theta - rate * u
    x = theta
    """,
    arrays="x theta u d",
    scalars="beta inverse rate",
    guard="h",
    source="Wang, Tantia, Ballas, Rabbat 2019, SlowMo, arXiv 1910.00643, Algorithm 1",
    doc="d is the mean outer gradient; inverse = 1/gamma and rate = alpha*gamma, gamma the fast learning rate.",
)

outer_nesterov: Final = Kernel(
    "outer_nesterov",
    """
    h = d
    b = m * b + h
    theta = theta - eta * (h + m * b)
    x = theta
    """,
    arrays="x theta b d",
    scalars="eta m",
    guard="h",
    source="Douillard et al. 2023, DiLoCo, arXiv 2311.08105, Algorithm 1",
    doc="d is the mean outer gradient; Nesterov momentum as torch.optim.SGD has it.",
)

delayed_correction: Final = Kernel(
    "delayed_correction",
    """
    d = m - s
    x = x + d
    """,
    arrays="x s m",
    guard="d",
    source="Zhou et al. 2020, DaSGD, arXiv 2006.00441",
    doc="x is moved by what averaging would have done to its snapshot s; m is the mean of all snapshots.",
)

entropy_inner: Final = Kernel(
    "entropy_inner",
    """
    h = g + decay * y + gamma_inverse * (y - x)
    v = delta * v + h
    y = y - eta * (h + delta * v)
    z = a * z + (1 - a) * y
    """,
    arrays="y v z x g",
    scalars="eta delta gamma_inverse a decay",
    source="Chaudhari et al. 2017, Parle, arXiv 1707.00424",
    doc="One step of the inner loop: y explores around x on a spring, z averages where it was; g was taken at y.",
)

entropy_outer: Final = Kernel(
    "entropy_outer",
    """
    e = rho_inverse * (x - r)
    d = (x - z) + e
    u = delta * u + d
    x = x - eta * (d + delta * u)
    y = x
    z = x
    v = 0
    """,
    arrays="x u r y z v",
    scalars="eta delta rho_inverse",
    guard="e",
    source="Chaudhari et al. 2017, Parle, arXiv 1707.00424",
    doc="One step of the outer loop, towards z and the reference r; y, z and v begin the next inner loop.",
)

KERNELS: Final = (
    keep_finite,
    outer_gradient,
    slow_momentum,
    outer_nesterov,
    delayed_correction,
    entropy_inner,
    entropy_outer,
)
