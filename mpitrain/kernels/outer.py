"""Updates between rounds of local steps: slow momentum, outer Nesterov, delayed corrections, Parle's two loops.

Workers communicate once per round and exchange the displacement of the whole round, theta - x, as if it were a
gradient: the outer gradient (pseudogradient). Terms of a mean over workers are guarded and counted, so that a diverged
worker can be left out.
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
    doc="Replace non-finite elements by zero and count them; the others keep their bits.",
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
    doc="Set d to the outer gradient: how far a round of local steps has moved x from its start theta.",
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
    doc="Step with slow momentum; d is the mean outer gradient, inverse = 1/gamma, rate = alpha*gamma.",
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
    doc="Step with Nesterov momentum as in torch.optim.SGD; d is the mean outer gradient.",
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
    doc="Move x by the correction that averaging makes to its snapshot s; m is the mean of all snapshots.",
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
    doc="Step the inner loop: y is coupled to x, z is its running average, g is the gradient at y.",
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
    doc="Step the outer loop towards z and the reference r, and reset y, z and v for the next inner loop.",
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
