"""Local steps of stochastic gradient descent, with weight decay and the usual kinds of momentum.

x is the parameters, g the gradient, v the velocity, eta the learning rate, delta the momentum, decay the weight decay
(an L2 term, as in torch.optim.SGD). There are two conventions: the papers' velocity includes eta (v is a displacement),
torch's does not. They agree while eta is constant; when eta changes, the papers' velocity keeps the step sizes with
which it was accumulated.
"""

from __future__ import annotations

import functools
from typing import Final

from mpitrain.kernels.compile.declare import Kernel

_SUTSKEVER: Final = "Sutskever, Martens, Dahl, Hinton 2013, On the importance of initialization and momentum"
_TORCH: Final = "torch.optim.SGD, https://docs.pytorch.org/docs/stable/generated/torch.optim.SGD.html"

_SGD: Final = "x = x - eta * (g + decay * x)"
_MOMENTUM: Final = """\
v = delta * v + (g + decay * x)
x = x - eta * v
"""
_NESTEROV: Final = """\
h = g + decay * x
v = delta * v + h
x = x - eta * (h + delta * v)
"""

sgd_step: Final = Kernel(
    "sgd_step",
    _SGD,
    arrays="x g",
    scalars="eta decay",
    source="Robbins and Monro 1951, with an L2 term",
    doc="Take a step of SGD.",
)

heavy_ball_step: Final = Kernel(
    "heavy_ball_step",
    """
    v = delta * v - eta * (g + decay * x)
    x = x + v
    """,
    arrays="x v g",
    scalars="eta delta decay",
    source=f"Polyak 1964; {_SUTSKEVER}, eq. 1-2",
    doc="Take a step with classical momentum; g is the gradient at x.",
)

eamsgd_step: Final = Kernel(
    "eamsgd_step",
    """
    v = delta * v - eta * (g + decay * y)
    x = x + v
    y = x + delta * v
    """,
    arrays="x v g y",
    scalars="eta delta decay",
    source=f"Zhang et al. 2015, arXiv 1412.6651, Algorithm 2; {_SUTSKEVER}, eq. 3-4",
    doc="Take a step with Nesterov momentum; g is the gradient at the look-ahead y = x + delta*v, which is updated.",
)

lookahead: Final = Kernel(
    "lookahead",
    "y = x + delta * v",
    arrays="x v y",
    scalars="delta",
    source=f"{_SUTSKEVER}, eq. 3",
    doc="Compute the look-ahead point of Nesterov momentum, for instance after an exchange has moved x.",
)

torch_momentum_step: Final = Kernel(
    "torch_momentum_step",
    _MOMENTUM,
    arrays="x v g",
    scalars="eta delta decay",
    source=f"{_TORCH}, momentum without dampening",
    doc="Take a step of torch.optim.SGD with momentum; v starts at zero.",
)

torch_nesterov_step: Final = Kernel(
    "torch_nesterov_step",
    _NESTEROV,
    arrays="x v g",
    scalars="eta delta decay",
    source=f"{_TORCH}, nesterov=True",
    doc="Take a step of torch.optim.SGD with nesterov=True; v starts at zero.",
)

MAX_MEAN_GRADIENTS: Final = 8
"""The largest number of gradients in `mean_step`: with more, the prefetchers lose track of the streams."""

_OF_THE_MEAN: Final = {
    "sgd": ("x", "eta decay", _SGD),
    "momentum": ("x v", "eta delta decay", _MOMENTUM),
    "nesterov": ("x v", "eta delta decay", _NESTEROV),
}


@functools.cache
def mean_step(kind: str, k: int) -> Kernel:
    """Return a step of torch.optim.SGD with the gradient ``g = a * (z1 + ... + zk)``, which is never stored.

    Args:
        kind: ``sgd``, with the arrays x z1...zk; ``momentum`` or ``nesterov``, with the arrays x v z1...zk.
        k: The number of gradients, 1 to 8. The scalar a is the first scalar of a call.

    Raises:
        ValueError: k is out of range.
    """
    if not 1 <= k <= MAX_MEAN_GRADIENTS:
        raise ValueError(f"{k} gradients; a step takes 1 to {MAX_MEAN_GRADIENTS}, sum more of them first")
    names = [f"z{j}" for j in range(1, k + 1)]
    arrays, scalars, equations = _OF_THE_MEAN[kind]
    return Kernel(
        f"mean_{kind}_step_{k}",
        f"g = a * ({' + '.join(names)})\n{equations}",
        arrays=" ".join([arrays, *names]),
        scalars=f"a {scalars}",
        source=_TORCH,
        doc=f"Take a step of torch.optim.SGD with the mean of {k} gradients.",
    )


KERNELS: Final = (sgd_step, heavy_ball_step, eamsgd_step, lookahead, torch_momentum_step, torch_nesterov_step)
