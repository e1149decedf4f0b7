"""The outer optimizer of methods that work in rounds of local steps, and the mean over finite vectors.

    a round:   every worker makes tau local steps from theta and ends at x_i
    D       =  mean_i (theta - x_i)        the pseudogradient
    theta   <- the outer optimizer's step with D as its gradient;   x_i <- theta

Local SGD has theta <- theta - D, SlowMo a slow momentum, DiLoCo a Nesterov step.

A worker whose vector is not finite is left out of a mean, which is then that of the others. It receives this mean as
they do, and takes part in the next one.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from mpitrain import kernels
from mpitrain.algorithms.base.precision import wide_copy
from mpitrain.collectives.communicator import Communicator, Vector


def average(comm: Communicator, vector: Vector, *, is_absent: bool = False) -> None:
    """Replace every worker's vector by the mean of the finite vectors, or by NaN if none is finite. Collective.

    Args:
        comm: The communicator of the workers.
        vector: The vector of each worker.
        is_absent: Whether this worker is absent: its vector is left out of the mean.
    """
    average_present(comm, vector, kernels.keep_finite(vector.local), is_absent=is_absent)


def average_present(comm: Communicator, vector: Vector, n_nonfinite: int, *, is_absent: bool = False) -> None:
    """Replace every worker's vector by the mean over the present workers with ``n_nonfinite`` = 0. Collective.

    Args:
        comm, vector, is_absent: See ``average``.
        n_nonfinite: The number of elements of this worker's vector that were not finite.
    """
    comm.statistics.n_nonfinite += n_nonfinite
    is_absent = is_absent or n_nonfinite > 0
    if is_absent:
        vector.local[...] = 0
    n_present = int(comm.gather([not is_absent]).sum())
    if not n_present:
        vector.local[...] = float("nan")
        comm.barrier()  # so that no worker continues from the zeros of another
        return
    comm.allreduce(vector, mean=n_present == comm.size)
    if n_present < comm.size:
        kernels.scale(vector.local, 1.0 / n_present)


class OuterParameters:
    """The outer parameters theta, from which a round starts, and their momentum. Collective to create.

    The copies on all workers have the same bits.

    Args:
        comm: The communicator of the workers.
        x: (n,) the model's parameters; those of worker 0 are the first theta.

    Attributes:
        theta: (n,) the outer parameters.
        momentum: (n,) the outer optimizer's buffer.
        empty: Empty arguments of an outer step, to compile the kernel of this step.
    """

    persistent: ClassVar[tuple[str, ...]] = ("theta", "momentum")

    def __init__(self, comm: Communicator, x: Any) -> None:
        self._comm, self._x = comm, x
        self.theta = wide_copy(x)
        self._pseudogradient = comm.vector(x.size, self.theta.dtype)
        self.momentum = np.zeros_like(self.theta)
        comm.broadcast(self.theta)
        self.empty = x[:0], self.theta[:0], self.momentum[:0], self._pseudogradient.local[:0]
        kernels.outer_gradient(self._pseudogradient.local[:0], self.theta[:0], x[:0])  # compiled before the first round

    def pseudogradient(self, *, is_absent: bool = False) -> Any:
        """Return the pseudogradient D (n,): the mean of theta - x_i over the workers with finite x_i. Collective.

        Args:
            is_absent: Whether this worker is left out.
        """
        d = self._pseudogradient.local
        n_nonfinite = kernels.outer_gradient(d, self.theta, self._x)
        average_present(self._comm, self._pseudogradient, n_nonfinite, is_absent=is_absent)
        return d
