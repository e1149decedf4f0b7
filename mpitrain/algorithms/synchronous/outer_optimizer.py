"""What the methods that work in rounds of local steps share: the mean of those present, and the outer parameters.

    a round:   every worker makes tau local steps from theta, which ends at x_i
    D       =  mean_i (theta - x_i)        the outer gradient
    theta   <- the outer optimizer's step with D as its gradient;   x_i <- theta

Local SGD has theta <- theta - D, SlowMo a slow momentum, DiLoCo a Nesterov step.

A worker whose vector is not finite is absent from a mean: it is the mean of the others. When it takes on the outcome it
is present again.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np

from mpitrain import kernels
from mpitrain.algorithms.base.method import PeriodicWorker, Replica, wide_copy
from mpitrain.collectives.communicator import Communicator, Vector


def average(comm: Communicator, vector: Vector) -> None:
    """Replace every worker's vector by the mean of those that are finite; by NaN if none is. Collective."""
    n_nonfinite = kernels.keep_finite(vector.local)
    if n_nonfinite:
        vector.local[...] = 0
    average_present(comm, vector, n_nonfinite)


def average_present(comm: Communicator, vector: Vector, n_nonfinite: int) -> None:
    """The mean over the workers whose ``n_nonfinite`` is 0; the vectors of the others are zeros. Collective."""
    comm.statistics.n_nonfinite += n_nonfinite
    n_present = int(comm.gather([n_nonfinite == 0]).sum())
    if not n_present:
        vector.local[...] = float("nan")
        comm.barrier()  # nobody takes another one's zeros for something to go on from
        return
    comm.allreduce(vector, mean=n_present == comm.size)
    if n_present < comm.size:
        kernels.scale(vector.local, 1.0 / n_present)


class OuterWorker(PeriodicWorker):
    """x_i is what the model holds; theta, from which a round begins, is kept by every worker, equal to the last bit.

    Args:
        method: With the setting ``period``.
        replica: What it works on.
    """

    def __init__(self, method: Any, replica: Replica) -> None:
        super().__init__(method, replica)
        x = self.x.local
        self._theta = wide_copy(x)
        self._d = self.comm.vector(x.size, self._theta.dtype)
        self._momentum = np.zeros_like(self._theta)
        self.comm.broadcast(self._theta)
        kernels.outer_gradient(self._d.local[:0], self._theta[:0], x[:0])  # compiled before the first round

    def exchange(self) -> None:
        """D = mean over those present of theta - x_i, and the outer step with it. Collective."""
        d = self._d.local
        n_nonfinite = kernels.outer_gradient(d, self._theta, self.x.local)
        if n_nonfinite:
            d[...] = 0
        average_present(self.comm, self._d, n_nonfinite)
        self.outer_step(d)

    @abstractmethod
    def outer_step(self, d: Any) -> None:
        """Update theta with the mean outer gradient ``d`` (n,), and set x_i to it. Local."""

    def consensus(self, out: Any) -> None:
        """theta, as the last round has left it. Local."""
        kernels.copy(out, self._theta)

    def state(self) -> Iterator[tuple[str, Any]]:
        """The clock, theta and its momentum."""
        yield from super().state()
        yield "outer_parameters", self._theta
        yield "outer_momentum", self._momentum

    def load(self, state: dict[str, Any]) -> None:
        """Local."""
        super().load(state)
        kernels.assign(self._theta, state["outer_parameters"])
        kernels.assign(self._momentum, state["outer_momentum"])
