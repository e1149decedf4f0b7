"""EAMSGD: elastic averaging with Nesterov momentum on the workers.

    v_i <- delta*v_i - eta*g_i(x_i + delta*v_i)
    x_i <- x_i + v_i - alpha*(x_i - c)            c as in EASGD; it has no momentum, and v_i is never exchanged

The gradient is taken at the look-ahead y_i = x_i + delta*v_i, so the model holds y_i; x_i is a second vector. The
exchange uses x_i before the momentum step. With delta = 0 every number equals that of EASGD.

Source: Zhang, Choromanska, LeCun, Deep learning with Elastic Averaging SGD, 2015, https://arxiv.org/abs/1412.6651,
eq. 7-8 and algorithm 2.

Deviations: weight decay is part of the gradient and is taken at y_i, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpitrain import kernels
from mpitrain.algorithms.base.precision import wide_copy
from mpitrain.algorithms.base.replica import ParamGroupSlice, Replica
from mpitrain.algorithms.base.settings import number
from mpitrain.algorithms.base.state import Located
from mpitrain.algorithms.elastic.method import ElasticMethod, ElasticWorker


@dataclass(frozen=True)
class EAMSGD(ElasticMethod):
    """Elastic averaging with Nesterov momentum, asynchronous unless ``synchronous`` is set.

    The method makes the local update itself. The torch optimizer must be a plain ``torch.optim.SGD`` without momentum;
    it only provides learning rates and weight decays.

    Args:
        momentum: The momentum delta; 0.99 in the paper. The learning rate should be about ten times smaller than that
            of SGD.

    The other arguments are ``ElasticMethod``'s.
    """

    momentum: float = number(0.99, "delta, Nesterov momentum of the workers", low=0, below=1)

    name: ClassVar[str] = "eamsgd"
    summary: ClassVar[str] = "elastic averaging with Nesterov momentum on the workers"
    source: ClassVar[str] = "Zhang, Choromanska, LeCun 2015, arXiv 1412.6651"
    communication: ClassVar[str] = "2/tau (center pulled and pushed); synchronous 2(p-1)/(p*tau)"
    owns_update: ClassVar[bool] = True
    learning_rate_factor: ClassVar[float] = 0.1

    def worker(self, replica: Replica) -> EAMSGDWorker:
        """Make a worker. Collective."""
        return EAMSGDWorker(self, replica)


class EAMSGDWorker(ElasticWorker):
    """A worker with a position and a velocity; the model holds their look-ahead y."""

    persistent: ClassVar[tuple[str, ...]] = (Located("_position"), "_velocity")

    def __init__(self, method: EAMSGD, replica: Replica) -> None:
        super().__init__(method, replica, method.center(replica), position=wide_copy(replica.x.local))
        self._velocity = np.zeros_like(self._position)
        self.positions, self.velocities = (self.x.local, self._position), (self._velocity,)
        self.update(ParamGroupSlice(slice(0, 0), 0.0))  # compiled before the first step

    def update(self, group_slice: ParamGroupSlice) -> None:
        """Compute v <- delta*v - eta*g; x <- x + v; y <- x + delta*v."""
        part, eta, decay = group_slice.part, group_slice.learning_rate, group_slice.weight_decay
        x, v, y = self._position[part], self._velocity[part], self.x.local[part]
        kernels.eamsgd_step(x, v, self.g.local[part], y, eta, self._method.momentum, decay)

    def exchange(self) -> None:
        """Exchange x as EASGD does. An exchange after the momentum step also moves the look-ahead y."""
        super().exchange()
        if not self._is_pre:
            self._look_ahead()

    def _exchange_at_rest(self) -> None:
        """Exchange x; no momentum step follows that would move the look-ahead with it."""
        super()._exchange_at_rest()
        self._look_ahead()

    def _look_ahead(self) -> None:
        """Compute y <- x + delta*v"""
        kernels.lookahead(self._position, self._velocity, self.x.local, self._method.momentum)
