"""Parle and Entropy-SGD: an inner loop that feels how wide a valley is, and replicas held together by springs.

    inner, L times, from y = z = x_a and at rest:
        h <- g(y) + decay*y + ginv*(y - x_a);   v <- delta*v + h;   y <- y - eta_in*(h + delta*v)
        z <- a*z + (1-a)*y
    outer:
        d <- (x_a - z) + rinv*(x_a - r);        u <- delta*u + d;   x_a <- x_a - eta*(d + delta*u)

Both steps are Nesterov's, as torch.optim.SGD has them. r is the mean of all replicas x_a (``reference="x"``, the paper)
or of their z (``"z"``, the authors' code, a second all-reduce). After an outer step both couplings are multiplied by
1 + 1/(2B), up to a cap ("scoping"), B being the mini-batches of an epoch. ginv = 1/gamma and rinv = 1/rho; the authors'
code calls these inverses gamma and rho.

Entropy-SGD is the inner and the outer loop of one replica, without the spring to r.

Source: Chaudhari, Baldassi, Zecchina, Soatto, Talwalkar, Oberman, Parle: parallelizing stochastic gradient descent,
2017, https://arxiv.org/abs/1707.00424; Chaudhari et al., Entropy-SGD: Biasing gradient descent into wide valleys, 2016,
https://arxiv.org/abs/1611.01838.

Deviations: that z and the inner velocity begin anew in every inner loop is our reading; with it L = 1 without
couplings is Nesterov's SGD, at the learning rate eta*(1-a)*eta_in*(1+delta). Entropy-SGD on several workers is one
replica whose gradient is the mean of all workers', our choice: the paper has one worker. A replica that is no longer
finite is left out of r, and an element of r that is not finite pulls nobody.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mpitrain import kernels
from mpitrain.algorithms.base.method import Method, ParamGroupSlice, Replica, Worker, setting, wide_copy
from mpitrain.algorithms.synchronous.outer_optimizer import average


@dataclass(frozen=True)
class EntropyMethod(Method):
    """Hyper-parameters of the methods with an inner loop.

    The learning rate and the weight decays of the torch optimizer are those of the outer loop (eta) and of the
    gradient; the optimizer must be a plain ``torch.optim.SGD`` without momentum.

    Args:
        period: L, inner steps an outer step.
        inner_rate: eta_in; it does not follow the schedule of eta.
        momentum: delta, of both loops.
        averaging: a, the weight of the past in z.
        gamma_inverse: ginv, of the spring between y and x, as the run begins.
        gamma_inverse_cap: What it grows to at most.
        scoping_batches: B, mini-batches of an epoch; None: the couplings stay what they are.
    """

    period: int = setting(25, "L, inner steps an outer step", low=1)
    inner_rate: float = setting(0.1, "eta_in, learning rate of the inner loop", above=0)
    momentum: float = setting(0.9, "delta, Nesterov momentum of both loops", low=0, below=1)
    averaging: float = setting(0.75, "a, weight of the past in the running average z", low=0, below=1)
    gamma_inverse: float = setting(0.01, "1/gamma, spring between y and x at the start", low=0)
    gamma_inverse_cap: float = setting(1.0, "1/gamma at most", low=0)
    scoping_batches: int | None = setting(390, "B, mini-batches of an epoch; none: no scoping", low=1)

    owns_update: ClassVar[bool] = True

    def coupling(self, start: float, cap: float, n_outer: int) -> float:
        """A coupling after ``n_outer`` outer steps: start * (1 + 1/(2B))^n_outer, at most ``cap``."""
        if self.scoping_batches is None:
            return min(start, cap)
        growth = n_outer * math.log1p(1 / (2 * self.scoping_batches))
        return min(start * math.exp(min(growth, 700.0)), cap)  # e^710 is no float64

    def gamma_inverse_at(self, t: int) -> float:
        """ginv in step t."""
        return self.coupling(self.gamma_inverse, self.gamma_inverse_cap, t // self.period)


@dataclass(frozen=True)
class EntropySGD(EntropyMethod):
    """SGD that prefers wide valleys: it looks around for L steps, then steps towards where it has been on average.

    On several workers every gradient is the mean of all. The arguments are ``EntropyMethod``'s.
    """

    name: ClassVar[str] = "entropysgd"
    summary: ClassVar[str] = "an inner loop explores, an outer step follows its average into wide valleys"
    source: ClassVar[str] = "Chaudhari et al. 2016, arXiv 1611.01838"
    communication: ClassVar[str] = "2(p-1)/p"
    metrics: ClassVar[tuple[str, ...]] = ("gamma_inverse",)

    def worker(self, replica: Replica) -> EntropyWorker:
        """Collective."""
        return EntropyWorker(self, replica)


@dataclass(frozen=True)
class Parle(EntropyMethod):
    """Replicas that each run Entropy-SGD and pull each other together once in L gradients.

    Args:
        rho_inverse: rinv, of the spring between x_a and r, as the run begins.
        rho_inverse_cap: What it grows to at most.
        reference: r is the mean of all ``x`` (the paper) or of all ``z`` (the authors' code).

    The other arguments are ``EntropyMethod``'s.
    """

    rho_inverse: float = setting(1.0, "1/rho, spring between a replica and the reference at the start", low=0)
    rho_inverse_cap: float = setting(10.0, "1/rho at most", low=0)
    reference: str = setting("x", "r is the mean of the replicas' x or z", choices=("x", "z"))

    name: ClassVar[str] = "parle"
    summary: ClassVar[str] = "replicas that look for wide valleys, tied to their mean by springs"
    source: ClassVar[str] = "Chaudhari et al. 2017, arXiv 1707.00424"
    communication: ClassVar[str] = "2(p-1)/(p*L); 4(p-1)/(p*L) with reference=z"
    metrics: ClassVar[tuple[str, ...]] = ("gamma_inverse", "rho_inverse")

    def rho_inverse_at(self, t: int) -> float:
        """rinv in step t."""
        return self.coupling(self.rho_inverse, self.rho_inverse_cap, t // self.period)

    def warnings(self, size: int, learning_rate: float) -> Iterator[str]:
        """What replicas differ by obeys a Nesterov step with eta*(rinv + c), 0 <= c <= 1."""
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
        """Collective."""
        return ParleWorker(self, replica)


class InnerLoopWorker(Worker):
    """y, what the model holds, explores around x; z is its running average; u and v are the two velocities."""

    def __init__(self, method: EntropyMethod, replica: Replica) -> None:
        super().__init__(replica)
        self._method: Any = method
        self._y = self.x.local
        self._x, self._z = wide_copy(self._y), wide_copy(self._y)
        self._u, self._v = np.zeros_like(self._x), np.zeros_like(self._x)
        self.positions, self.velocities = (self._y, self._x, self._z), (self._u, self._v)
        self._group_slices: list[ParamGroupSlice] = []
        nothing = ParamGroupSlice(slice(0, 0), 0.0)  # compiled before the first step
        self.update(nothing)
        self.outer_update(nothing, self._x, 0.0)
        self._group_slices.clear()

    def update(self, group_slice: ParamGroupSlice) -> None:
        """The inner step."""
        part, method = group_slice.part, self._method
        self._group_slices.append(group_slice)
        kernels.entropy_inner(
            self._y[part], self._v[part], self._z[part], self._x[part], self.g.local[part],
            method.inner_rate, method.momentum, method.gamma_inverse_at(self.t), method.averaging,
            group_slice.weight_decay,
        )  # fmt: skip

    def outer_update(self, group_slice: ParamGroupSlice, r: Any, rho_inverse: float) -> None:
        """The outer step, and y, z and v as the next inner loop begins."""
        part = group_slice.part
        self.comm.statistics.n_nonfinite += kernels.entropy_outer(
            self._x[part], self._u[part], r[part], self._y[part], self._z[part], self._v[part],
            group_slice.learning_rate, self._method.momentum, rho_inverse,
        )  # fmt: skip

    def after_update(self) -> None:
        """The outer step, where an inner loop ends."""
        if (self.t + 1) % self._method.period == 0:
            self.outer_step(self._group_slices)
        self._group_slices.clear()

    def outer_step(self, group_slices: list[ParamGroupSlice]) -> None:
        """x <- x - eta*(x - z): without a spring to the others, x is its own reference. Local."""
        for group_slice in group_slices:
            self.outer_update(group_slice, self._x, 0.0)

    def metrics(self) -> dict[str, float]:
        """The coupling."""
        return {"gamma_inverse": self._method.gamma_inverse_at(self.t)}

    def state(self) -> Iterator[tuple[str, Any]]:
        """The clock, position, running average and velocities; the inner iterate is what the model holds."""
        yield from super().state()
        yield "position", self._x
        yield "running_average", self._z
        yield "outer_velocity", self._u
        yield "inner_velocity", self._v

    def load(self, state: dict[str, Any]) -> None:
        """Local."""
        super().load(state)
        kernels.assign(self._x, state["position"])
        kernels.assign(self._z, state["running_average"])
        kernels.assign(self._u, state["outer_velocity"])
        kernels.assign(self._v, state["inner_velocity"])


class EntropyWorker(InnerLoopWorker):
    """All workers hold the same replica."""

    def __init__(self, method: EntropySGD, replica: Replica) -> None:
        super().__init__(method, replica)
        kernels.keep_finite(self._x[:0])  # compiled before the first step

    def before_update(self) -> None:
        """gbar = (1/p) sum_i g_i. Collective."""
        average(self.comm, self.g)

    def consensus(self, out: Any) -> None:
        """x, as the last outer step has left it. Local."""
        kernels.copy(out, self._x)


class ParleWorker(InnerLoopWorker):
    """Every worker is a replica and keeps r, equal to the last bit."""

    def __init__(self, method: Parle, replica: Replica) -> None:
        super().__init__(method, replica)
        self._r = self.comm.vector(self._x.size, self._x.dtype)
        kernels.keep_finite(self._x[:0])  # compiled before the first exchange
        self._refer_to(self._x)

    def outer_step(self, group_slices: list[ParamGroupSlice]) -> None:
        """The outer step of all replicas, then r <- mean_a x_a. Collective."""
        if self._method.reference == "z":
            self._refer_to(self._z)
        rho_inverse = self._method.rho_inverse_at(self.t)
        for group_slice in group_slices:
            self.outer_update(group_slice, self._r.local, rho_inverse)
        self._refer_to(self._x)

    def _refer_to(self, values: Any) -> None:
        """r <- the mean of all replicas' values. Collective."""
        self._r.local[...] = values
        average(self.comm, self._r)

    def consensus(self, out: Any) -> None:
        """r, the mean of all x_a after the last outer step. Local."""
        kernels.copy(out, self._r.local)

    def metrics(self) -> dict[str, float]:
        """Both couplings."""
        return {**super().metrics(), "rho_inverse": self._method.rho_inverse_at(self.t)}

    def state(self) -> Iterator[tuple[str, Any]]:
        """And the reference."""
        yield from super().state()
        yield "reference", self._r.local

    def load(self, state: dict[str, Any]) -> None:
        """Local."""
        super().load(state)
        kernels.assign(self._r.local, state["reference"])
