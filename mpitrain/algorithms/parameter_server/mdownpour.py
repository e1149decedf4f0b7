"""MDOWNPOUR: DOWNPOUR with Nesterov momentum at the parameter server.

    worker       pull y;  push g = g(y)                        at every step, without local steps
    server       v <- delta*v - eta*g;   c <- c + v;   y = c + delta*v

With one worker every number is that of Nesterov momentum SGD; with delta = 0 that of DOWNPOUR with period 1. The delay
among p workers acts as momentum, too (about 1 - 1/p), and the two add up: delta = 0.99 needs tiny learning rates.

Source: Zhang, Choromanska, LeCun, Deep learning with Elastic Averaging SGD, 2015, https://arxiv.org/abs/1412.6651,
section 5.

Deviations: the server's equations are in the look-ahead form above, which is exactly Nesterov momentum for p = 1; this
is our reading. There is no server process: the worker visits the shards of c and v, makes the server's step there with
its gradient, under the lock, and pulls y. Between nodes c and v are therefore transferred both ways, four vectors per
step instead of two; on a node nothing is transferred. Weight decay is part of the gradient and is taken at y. The
default momentum is 0.5, not the paper's 0.99, with which a few workers are unstable at ordinary learning rates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mpitrain import kernels
from mpitrain.algorithms.base.clipping import Clip
from mpitrain.algorithms.base.replica import ParamGroupSlice, Replica
from mpitrain.algorithms.base.settings import number
from mpitrain.algorithms.parameter_server.center import CenterMethod, CenterWorker
from mpitrain.algorithms.parameter_server.commit import CommitRule
from mpitrain.collectives.rma.shared_vector import SharedVector
from mpitrain.kernels import norms
from mpitrain.theory import mdownpour_warning


@dataclass(frozen=True)
class MDownpour(CenterMethod):
    """A parameter server that makes a Nesterov momentum step with each gradient that arrives.

    Workers push at every step, so there is no period. The torch optimizer must be a plain ``torch.optim.SGD`` without
    momentum; it only provides learning rates and weight decays.

    Args:
        momentum: The Nesterov momentum delta of the center. The paper uses 0.99 with very small learning rates.
    """

    momentum: float = number(0.5, "delta, Nesterov momentum of the center", low=0, below=1)

    name: ClassVar[str] = "mdownpour"
    summary: ClassVar[str] = "DOWNPOUR at every step, with Nesterov momentum at the center"
    source: ClassVar[str] = "Zhang, Choromanska, LeCun 2015, arXiv 1412.6651"
    communication: ClassVar[str] = "4 (center and velocity, fetched and returned)"
    goes_on: ClassVar[str] = "center and its velocity"
    begins_anew: ClassVar[str] = "nothing"
    owns_update: ClassVar[bool] = True
    learning_rate_factor: ClassVar[float] = 0.5

    def warnings(self, size: int, learning_rate: float) -> Iterator[str]:
        """Yield a warning about a momentum that is unstable with this number of workers."""
        text = mdownpour_warning(size, self.momentum)
        if text is not None:
            yield text

    def worker(self, replica: Replica) -> MDownpourWorker:
        """Make a worker. Collective."""
        return MDownpourWorker(self, replica, MomentumStep(replica.x.local, replica.g.local, self.momentum))


class MomentumStep(CommitRule):
    """The rule that makes a momentum step of the center. The velocity v is shared, as the center is.

    Args:
        x: (n,) the model's parameters y.
        g: (n,) the gradient.
        momentum: The momentum delta.

    Attributes:
        group_slices: The parameter groups of the present step.
    """

    rows: ClassVar[tuple[str, ...]] = ("center", "velocity")

    def __init__(self, x: Any, g: Any, momentum: float) -> None:
        self._x, self._g, self._momentum = x, g, momentum
        self.group_slices: list[ParamGroupSlice] = [ParamGroupSlice(slice(0, 0), 0.0)]  # to compile with

    def start(self, name: str, x: Any) -> Any:
        """Return the first values of a shared vector. The velocity starts at 0."""
        return np.zeros_like(x) if name == "velocity" else x

    def limit(self, part: slice, clip: Clip, radius: float) -> None:
        """Scale g so that eta*||g|| <= (1 - delta)*radius.

        By the momentum, a gradient also acts in the following steps. With this limit, it moves the center by at most
        ``radius`` in all of them together.
        """
        g = self._g[part]
        eta = max(group_slice.learning_rate for group_slice in self.group_slices)
        if (factor := clip.factor(eta * norms.norm(g) / (1 - self._momentum), radius)) < 1:
            g *= factor

    def __call__(self, part: slice, c: Any, shared: SharedVector, steps: int) -> int:
        """Compute v <- delta*v - eta*g;  c <- c + v;  y <- c + delta*v"""
        n_nonfinite = 0
        for group_slice in self.group_slices:
            start, stop = max(part.start, group_slice.part.start), min(part.stop, group_slice.part.stop)
            whole = slice(start, max(start, stop))  # in the vector
            here = slice(whole.start - part.start, whole.stop - part.start)  # in the shard
            n_nonfinite += kernels.master_momentum(
                self._x[whole], self._g[whole], c[0, here], c[1, here],
                group_slice.learning_rate, self._momentum, group_slice.weight_decay,
            )  # fmt: skip
        return n_nonfinite


class MDownpourWorker(CenterWorker):
    """A worker that visits the center at every step; the model holds y.

    Args:
        method: The hyper-parameters.
        replica: The vectors and the communicator to work with.
        rule: The momentum step.
    """

    def __init__(self, method: MDownpour, replica: Replica, rule: MomentumStep) -> None:
        super().__init__(method, replica, rule)
        self._group_slices = rule.group_slices

    def before_update(self) -> None:
        """Discard the parameter groups of the previous step."""
        self._group_slices.clear()

    def update(self, group_slice: ParamGroupSlice) -> None:
        """Store the parameter group. The visit to the center makes the step for all groups, shard by shard."""
        self._group_slices.append(group_slice)

    def is_due(self) -> bool:
        """Return True, because the center is visited at every step."""
        return True
