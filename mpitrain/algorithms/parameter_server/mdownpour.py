"""MDOWNPOUR: DOWNPOUR with Nesterov momentum at the parameter server.

    worker       pull y;  push g = g(y)                        at every step, with no local steps
    server       v <- delta*v - eta*g;   c <- c + v;   y = c + delta*v

With one worker every number is that of Nesterov momentum SGD, with delta = 0 that of DOWNPOUR with period 1. The delay
among p workers acts as momentum, too (about 1 - 1/p), and the two add up: with delta = 0.99 it needs tiny learning
rates.

Source: Zhang, Choromanska, LeCun, Deep learning with Elastic Averaging SGD, 2015, https://arxiv.org/abs/1412.6651,
section 5.

Deviations: the server's lines are in the look-ahead form above, which is exactly Nesterov momentum for p = 1; this is
our reading. There is no server process: the worker brings its gradient to the shards of c and v, makes the server's
step there under the lock, and takes y along. So c and v travel both ways between nodes, four vectors a step instead of
two; on a node nothing travels. Weight decay is part of the gradient and taken at y. The default momentum is 0.5, not
the paper's 0.99, with which a handful of workers is unstable at ordinary learning rates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mpitrain import kernels
from mpitrain.algorithms.base.method import ParamGroupSlice, Replica, setting
from mpitrain.algorithms.parameter_server.center import CenterMethod, CenterWorker
from mpitrain.theory import mdownpour_warning


@dataclass(frozen=True)
class MDownpour(CenterMethod):
    """A parameter server that makes momentum steps with the gradients of all workers, each as it comes.

    Workers push at every step: there is no period to set. The torch optimizer lends its learning rates and weight
    decays and must be a plain ``torch.optim.SGD`` without momentum.

    Args:
        momentum: delta, Nesterov momentum of the center; 0.99 in the paper, with very small learning rates.
    """

    momentum: float = setting(0.5, "delta, Nesterov momentum of the center", low=0, below=1)

    name: ClassVar[str] = "mdownpour"
    summary: ClassVar[str] = "DOWNPOUR at every step, with Nesterov momentum at the center"
    source: ClassVar[str] = "Zhang, Choromanska, LeCun 2015, arXiv 1412.6651"
    communication: ClassVar[str] = "4 (center and velocity, fetched and returned)"
    owns_update: ClassVar[bool] = True
    learning_rate_factor: ClassVar[float] = 0.5

    def warnings(self, size: int, learning_rate: float) -> Iterator[str]:
        """Momentum that the delay does not bear."""
        text = mdownpour_warning(size, self.momentum)
        if text is not None:
            yield text

    def worker(self, replica: Replica) -> MDownpourWorker:
        """Collective."""
        return MDownpourWorker(self, replica)


class MDownpourWorker(CenterWorker):
    """y is what the model holds; the center and its velocity are shared."""

    rows: ClassVar[tuple[str, ...]] = ("center", "velocity")

    def __init__(self, method: MDownpour, replica: Replica) -> None:
        self._group_slices: list[ParamGroupSlice] = [ParamGroupSlice(slice(0, 0), 0.0)]
        super().__init__(method, replica)

    def start(self, name: str) -> Any:
        """The velocity begins at 0."""
        return np.zeros_like(self.x.local) if name == "velocity" else super().start(name)

    def update(self, group_slice: ParamGroupSlice) -> None:
        """Note it: the server's step is made shard by shard, for all segments in one visit."""
        self._group_slices.append(group_slice)

    def before_update(self) -> None:
        """A step begins."""
        self._group_slices.clear()

    def is_due(self) -> bool:
        """At every step."""
        return True

    def visit(self, part: slice, c: Any) -> int:
        """v <- delta*v - eta*g;  c <- c + v;  y <- c + delta*v"""
        n_nonfinite = 0
        for group_slice in self._group_slices:
            start, stop = max(part.start, group_slice.part.start), min(part.stop, group_slice.part.stop)
            whole = slice(start, max(start, stop))  # of the vector
            here = slice(whole.start - part.start, whole.stop - part.start)  # of the shard
            n_nonfinite += kernels.master_momentum(
                self.x.local[whole], self.g.local[whole], c[0, here], c[1, here],
                group_slice.learning_rate, self._method.momentum, group_slice.weight_decay,
            )  # fmt: skip
        return n_nonfinite
