"""Parle and Entropy-SGD: an inner loop that prefers wide valleys, and replicas coupled by springs.

    inner, L times, from y = z = x_a and v = 0:
        h <- g(y) + decay*y + ginv*(y - x_a);   v <- delta*v + h;   y <- y - eta_in*(h + delta*v)
        z <- a*z + (1-a)*y
    outer:
        d <- (x_a - z) + rinv*(x_a - r);        u <- delta*u + d;   x_a <- x_a - eta*(d + delta*u)

Both steps are Nesterov's, in the form of torch.optim.SGD. r is the mean of all replicas x_a (``reference="x"``, the
paper) or of their z (``"z"``, the authors' code, which needs a second all-reduce). After an outer step both couplings
are multiplied by 1 + 1/(2B), up to a cap ("scoping"), where B is the number of mini-batches per epoch. ginv = 1/gamma
and rinv = 1/rho; the authors' code calls these inverses gamma and rho.

Entropy-SGD is the inner and the outer loop of one replica, without the spring to r.

Source: Chaudhari, Baldassi, Zecchina, Soatto, Talwalkar, Oberman, Parle: parallelizing stochastic gradient descent,
2017, https://arxiv.org/abs/1707.00424; Chaudhari et al., Entropy-SGD: Biasing gradient descent into wide valleys, 2016,
https://arxiv.org/abs/1611.01838.

Deviations: z and the inner velocity start anew in every inner loop; this is our reading, with which L = 1 without
couplings is Nesterov's SGD at the learning rate eta*(1-a)*eta_in*(1+delta). Entropy-SGD on several workers is one
replica whose gradient is the mean of all workers', which is our choice: the paper has one worker. A replica that is not
finite is left out of r, and a non-finite element of r pulls no replica. ``finalize`` ends the last inner loop of a run,
however short, with its outer step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from mpitrain import kernels
from mpitrain.algorithms.base import gradients
from mpitrain.algorithms.base.method import Method
from mpitrain.algorithms.base.precision import wide_copy
from mpitrain.algorithms.base.replica import ParamGroupSlice, Replica
from mpitrain.algorithms.base.settings import choice, integer, number
from mpitrain.algorithms.base.state import Located
from mpitrain.algorithms.base.worker import Worker
from mpitrain.algorithms.synchronous.outer_optimizer import average


@dataclass(frozen=True)
class EntropyMethod(Method):
    """The settings of the methods with an inner loop.

    The torch optimizer must be a plain ``torch.optim.SGD`` without momentum. Its learning rate is that of the outer
    loop (eta), and its weight decay is part of the gradient.

    Args:
        period: The number L of inner steps per outer step.
        inner_rate: The inner learning rate eta_in. It does not follow the schedule of eta.
        momentum: The momentum delta of both loops.
        averaging: The weight a of the past in the running average z of the inner iterates y.
        gamma_inverse: The coupling ginv between y and the outer parameters x_a at the start of the run.
        gamma_inverse_cap: The largest value of ginv.
        scoping_batches: The number B of mini-batches per epoch. Every outer step multiplies the couplings by
            1 + 1/(2B). With None, they stay constant.
    """

    period: int = integer(25, "L, inner steps an outer step", low=1)
    inner_rate: float = number(0.1, "eta_in, learning rate of the inner loop", above=0)
    momentum: float = number(0.9, "delta, Nesterov momentum of both loops", low=0, below=1)
    averaging: float = number(0.75, "a, weight of the past in the running average z", low=0, below=1)
    gamma_inverse: float = number(0.01, "1/gamma, spring between y and x at the start", low=0)
    gamma_inverse_cap: float = number(1.0, "1/gamma at most", low=0)
    scoping_batches: int | None = integer(390, "B, mini-batches of an epoch; none: no scoping", low=1, optional=True)

    owns_update: ClassVar[bool] = True
    learning_rate_factor: ClassVar[float] = 2.0

    def coupling(self, start: float, cap: float, n_outer: int) -> float:
        """Return a coupling after ``n_outer`` outer steps: start * (1 + 1/(2B))^n_outer, at most ``cap``."""
        if self.scoping_batches is None:
            return min(start, cap)
        growth = n_outer * math.log1p(1 / (2 * self.scoping_batches))
        return min(start * math.exp(min(growth, 700.0)), cap)  # e^710 is not a float64

    def gamma_inverse_at(self, t: int) -> float:
        """Return ginv in step t."""
        return self.coupling(self.gamma_inverse, self.gamma_inverse_cap, t // self.period)


@dataclass(frozen=True)
class EntropySGD(EntropyMethod):
    """SGD that prefers wide valleys: L inner steps, then an outer step towards the average of these iterates.

    With several workers, every gradient is the mean over the workers. The arguments are those of ``EntropyMethod``.
    """

    name: ClassVar[str] = "entropysgd"
    summary: ClassVar[str] = "an inner loop explores, an outer step follows its average into wide valleys"
    source: ClassVar[str] = "Chaudhari et al. 2016, arXiv 1611.01838"
    communication: ClassVar[str] = "2(p-1)/p"
    goes_on: ClassVar[str] = "everything"
    begins_anew: ClassVar[str] = "nothing"
    combines_gradients: ClassVar[bool] = True
    averages_gradients: ClassVar[bool] = True
    metrics: ClassVar[tuple[str, ...]] = ("gamma_inverse",)
    short_run: ClassVar[Mapping[str, Any]] = MappingProxyType({"period": 20})

    def worker(self, replica: Replica) -> EntropyWorker:
        """Make a worker. Collective."""
        return EntropyWorker(self, replica)


@dataclass(frozen=True)
class Parle(EntropyMethod):
    """Several replicas of Entropy-SGD that are coupled to their mean once per L gradients.

    Args:
        rho_inverse: The coupling rinv between a replica x_a and the mean r at the start of the run.
        rho_inverse_cap: The largest value of rinv.
        reference: The vectors whose mean is r: ``x`` (the paper) or ``z`` (the authors' code).

    The other arguments are ``EntropyMethod``'s.
    """

    rho_inverse: float = number(1.0, "1/rho, spring between a replica and the reference at the start", low=0)
    rho_inverse_cap: float = number(10.0, "1/rho at most", low=0)
    reference: str = choice("x", "r is the mean of the replicas' x or z", ("x", "z"))

    name: ClassVar[str] = "parle"
    summary: ClassVar[str] = "replicas that look for wide valleys, tied to their mean by springs"
    source: ClassVar[str] = "Chaudhari et al. 2017, arXiv 1707.00424"
    communication: ClassVar[str] = "2(p-1)/(p*L); 4(p-1)/(p*L) with reference=z"
    starts_at: ClassVar[str | None] = "reference"
    goes_on: ClassVar[str] = "reference r"
    begins_anew: ClassVar[str] = "the replicas' distances from the reference; velocities"
    metrics: ClassVar[tuple[str, ...]] = ("gamma_inverse", "rho_inverse")
    short_run: ClassVar[Mapping[str, Any]] = MappingProxyType({"period": 10})

    def rho_inverse_at(self, t: int) -> float:
        """Return rinv in step t."""
        return self.coupling(self.rho_inverse, self.rho_inverse_cap, t // self.period)

    def warnings(self, size: int, learning_rate: float) -> Iterator[str]:
        """Yield a warning if outer steps can drive replicas apart.

        The difference of two replicas follows Nesterov steps of size eta*(rinv + c) on a quadratic of curvature 1. The
        inner loop determines c, which lies between 0 and 1.
        """
        bound = 2 * (1 + self.momentum) / (1 + 2 * self.momentum)
        largest = (
            self.rho_inverse_cap if self.scoping_batches is not None else min(self.rho_inverse, self.rho_inverse_cap)
        )
        if size > 1 and learning_rate * (1 + largest) >= bound:
            yield (
                f"learning_rate={learning_rate:g} drives replicas apart at 1/rho={largest:g}: "
                f"below {bound / (1 + largest):g} it cannot (learning_rate*(1+1/rho) < 2*(1+momentum)/(1+2*momentum))"
            )

    def worker(self, replica: Replica) -> ParleWorker:
        """Make a worker. Collective."""
        return ParleWorker(self, replica)


class InnerLoopWorker(Worker):
    """A worker with the position x, the running average z and two velocities; the model holds the inner iterate y."""

    persistent: ClassVar[tuple[str, ...]] = (
        Located("_position"),
        Located("_running_average"),
        "_outer_velocity",
        "_inner_velocity",
    )

    def __init__(self, method: EntropyMethod, replica: Replica) -> None:
        super().__init__(replica)
        self._method: Any = method
        y = self.x.local
        self._position, self._running_average = wide_copy(y), wide_copy(y)
        self._outer_velocity, self._inner_velocity = np.zeros_like(self._position), np.zeros_like(self._position)
        self.positions = (y, self._position, self._running_average)
        self.velocities = (self._outer_velocity, self._inner_velocity)
        nothing = ParamGroupSlice(slice(0, 0), 0.0)  # compiled before the first step
        self.update(nothing)
        self._outer_update(nothing, self._position, 0.0)

    def update(self, group_slice: ParamGroupSlice) -> None:
        """Make the inner step."""
        part, method = group_slice.part, self._method
        y, v, z, x = self.x.local, self._inner_velocity, self._running_average, self._position
        kernels.entropy_inner(
            y[part], v[part], z[part], x[part], self.g.local[part],
            method.inner_rate, method.momentum, method.gamma_inverse_at(self.t), method.averaging,
            group_slice.weight_decay,
        )  # fmt: skip

    def _outer_update(self, group_slice: ParamGroupSlice, r: Any, rho_inverse: float) -> None:
        """Make the outer step on one part, and reset y, z and v for the next inner loop."""
        part = group_slice.part
        x, u, y = self._position, self._outer_velocity, self.x.local
        z, v = self._running_average, self._inner_velocity
        self.comm.statistics.n_nonfinite += kernels.entropy_outer(
            x[part], u[part], r[part], y[part], z[part], v[part],
            group_slice.learning_rate, self._method.momentum, rho_inverse,
        )  # fmt: skip

    def after_update(self) -> None:
        """Make the outer step at the end of an inner loop."""
        if (self.t + 1) % self._method.period == 0:
            self.outer_step(self.group_slices)

    def exchange_remaining(self) -> None:
        """Make the outer step of an unfinished inner loop."""
        if self.t % self._method.period:
            self.outer_step(self.group_slices)

    def outer_step(self, group_slices: Sequence[ParamGroupSlice]) -> None:
        """Compute x <- x - eta*(x - z). Local; there is no coupling to other replicas."""
        for group_slice in group_slices:
            self._outer_update(group_slice, self._position, 0.0)

    def metrics(self) -> dict[str, float]:
        """Return the coupling ginv. Local."""
        return {"gamma_inverse": self._method.gamma_inverse_at(self.t)}


class EntropyWorker(InnerLoopWorker):
    """A worker of Entropy-SGD: all workers hold equal copies of x, y, z and the velocities."""

    is_replicated: ClassVar[bool] = True
    unchanged_by_exchanges: ClassVar[frozenset[str]] = frozenset(
        ("position", "running_average", "outer_velocity", "inner_velocity")
    )

    def __init__(self, method: EntropySGD, replica: Replica) -> None:
        super().__init__(method, replica)
        kernels.keep_finite(self._position[:0])  # compiled before the first step

    def combine_gradients(self) -> None:
        """Compute gbar = (1/p) sum_i g_i. Collective."""
        gradients.average(self)

    def consensus(self, out: Any) -> None:
        """Write x after the last outer step. Local."""
        kernels.copy(out, self._position)


class ParleWorker(InnerLoopWorker):
    """A worker with its own replica, and a copy of r with the same bits on all workers."""

    persistent: ClassVar[tuple[str, ...]] = (Located("_reference"),)

    def __init__(self, method: Parle, replica: Replica) -> None:
        super().__init__(method, replica)
        self._reference = self.comm.vector(self._position.size, self._position.dtype)
        kernels.keep_finite(self._position[:0])  # compiled before the first exchange
        self._refer_to(self._position)

    def outer_step(self, group_slices: Sequence[ParamGroupSlice]) -> None:
        """Make the outer step of all replicas, then r <- mean_a x_a. Collective."""
        if self._method.reference == "z":
            self._refer_to(self._running_average)
        rho_inverse = self._method.rho_inverse_at(self.t)
        for group_slice in group_slices:
            self._outer_update(group_slice, self._reference.local, rho_inverse)
        self._refer_to(self._position)

    def _refer_to(self, values: Any) -> None:
        """Compute r <- the mean of all replicas' values. Collective."""
        self._reference.local[...] = values
        average(self.comm, self._reference)

    def consensus(self, out: Any) -> None:
        """Write r, the mean of all x_a after the last outer step. Local."""
        kernels.copy(out, self._reference.local)

    def metrics(self) -> dict[str, float]:
        """Return both couplings. Local."""
        return {**super().metrics(), "rho_inverse": self._method.rho_inverse_at(self.t)}
