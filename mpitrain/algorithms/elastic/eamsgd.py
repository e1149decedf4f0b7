"""EAMSGD: elastic averaging with Nesterov momentum on the workers.

    v_i <- delta*v_i - eta*g_i(x_i + delta*v_i)
    x_i <- x_i + v_i - alpha*(x_i - c)            c as in EASGD; it has no momentum, and v_i is never exchanged

The gradient is wanted at the look-ahead y_i = x_i + delta*v_i, so y_i is what the model holds; x_i is a vector beside
it. E is formed from x_i before the momentum step. With delta = 0 every number is that of EASGD.

Source: Zhang, Choromanska, LeCun, Deep learning with Elastic Averaging SGD, 2015, https://arxiv.org/abs/1412.6651,
eq. 7-8 and algorithm 2.

Deviations: weight decay is part of the gradient and, like it, taken at y_i.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mpitrain import kernels
from mpitrain.algorithms.base.method import ParamGroupSlice, Replica, setting, wide_copy
from mpitrain.algorithms.elastic.method import ElasticMethod, ElasticWorker


@dataclass(frozen=True)
class EAMSGD(ElasticMethod):
    """Elastic averaging with momentum, asynchronous unless ``synchronous`` is set.

    It makes the momentum step itself: the torch optimizer lends its learning rates and weight decays and must be a
    plain ``torch.optim.SGD`` without momentum.

    Args:
        momentum: delta; 0.99 in the paper. The learning rate should be about ten times smaller than that of SGD.

    The other arguments are ``ElasticMethod``'s.
    """

    momentum: float = setting(0.99, "delta, Nesterov momentum of the workers", low=0, below=1)

    name: ClassVar[str] = "eamsgd"
    summary: ClassVar[str] = "elastic averaging with Nesterov momentum on the workers"
    source: ClassVar[str] = "Zhang, Choromanska, LeCun 2015, arXiv 1412.6651"
    communication: ClassVar[str] = "2/tau (center pulled and pushed); synchronous 2(p-1)/(p*tau)"
    owns_update: ClassVar[bool] = True
    learning_rate_factor: ClassVar[float] = 0.1

    def worker(self, replica: Replica) -> EAMSGDWorker:
        """Collective."""
        return EAMSGDWorker(self, replica)


class EAMSGDWorker(ElasticWorker):
    """y, what the model holds, is the look-ahead of position and velocity."""

    def __init__(self, method: EAMSGD, replica: Replica) -> None:
        self._y = replica.x.local
        self._x = wide_copy(self._y)
        self._v = np.zeros_like(self._x)
        super().__init__(method, replica, method.center(replica), position=self._x)
        self.positions, self.velocities = (self._y, self._x), (self._v,)
        self.update(ParamGroupSlice(slice(0, 0), 0.0))  # compiled before the first step

    def update(self, group_slice: ParamGroupSlice) -> None:
        """v <- delta*v - eta*g;  x <- x + v;  y <- x + delta*v"""
        part, eta, decay = group_slice.part, group_slice.learning_rate, group_slice.weight_decay
        kernels.eamsgd_step(
            self._x[part], self._v[part], self.g.local[part], self._y[part], eta, self._method.momentum, decay
        )

    def exchange(self) -> None:
        """As without momentum; after the momentum step the look-ahead moves with x."""
        super().exchange()
        if self._method.grad_point == "post":
            kernels.lookahead(self._x, self._v, self._y, self._method.momentum)

    def state(self) -> Iterator[tuple[str, Any]]:
        """The clock, the center, position and velocity; the look-ahead is what the model holds."""
        yield from super().state()
        yield "position", self._x
        yield "velocity", self._v

    def load(self, state: dict[str, Any]) -> None:
        """Collective."""
        super().load(state)
        kernels.assign(self._x, state["position"])
        kernels.assign(self._v, state["velocity"])
