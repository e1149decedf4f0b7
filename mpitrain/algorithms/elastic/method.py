"""The elastic exchange between workers and a center, which the methods of the EASGD family share.

    jacobi         x_i <- x_i - a_w*(x_i - c_old);        c <- c + a_c*sum_i (x_i_old - c_old)
    center_first   c   <- c + a_c*sum_i (x_i - c_old),    then  x_i <- x_i - a_w*(x_i - c_new)
    worker_first   x_i <- x_i - a_w*(x_i - c_old),        then  c   <- c + a_c*sum_i (x_i_new - c_old)

every tau steps, the gradient taken before it (``pre``) or after it (``post``). EASGD is (jacobi, a_w = a_c = alpha,
pre). Synchronous DOWNPOUR is (center_first, 1, 1, post); model averaging, also known as local SGD, is (center_first, 1,
1/p, post), and with tau = 1 that is mini-batch SGD. The moving rates are the worker's, a_w = alpha, and the center's
per worker, a_c; beta = p*a_c.

Synchronous: all workers at once; every worker keeps the center, and one all-reduce of sum x_i keeps all copies equal to
the last bit. Asynchronous: whenever a worker comes, for that worker alone (the sums have one term), and atomically for
each shard of the center: what is first and what is second is so within the visit to a shard.

In one exchange of one worker the difference x - c only changes its length, so that a Gauss-Seidel exchange is a Jacobi
one with other rates (``jacobi_rates``). With those, a_c*x_i + a_w*c does not change in an exchange; with equal rates
that is the sum of all x_i and c: what the center gains is what the worker gives.

With ``worker_first`` and ``pre`` the gradient's step lies between the two halves: the worker is pulled, makes its local
update, and the center moves towards what it has become. That is a visit for each half, and the bytes of one.

Sources: Zhang, Choromanska, LeCun, Deep learning with Elastic Averaging SGD, 2015, https://arxiv.org/abs/1412.6651, eq.
5-6 and algorithm 1; the orders: Zhang's thesis, 2016, https://arxiv.org/abs/1605.02216, chapter 6.

Deviations: the orders of an asynchronous exchange, and two rates that are set apart, are our reading of the thesis.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np

from mpitrain import kernels, theory
from mpitrain.algorithms.base.method import Method, PeriodicWorker, Replica, replace_nonfinite, setting, wide_copy
from mpitrain.algorithms.base.peers import saves_shared_state
from mpitrain.collectives.communicator import Communicator
from mpitrain.errors import UsageError
from mpitrain.theory.elastic import GradPoint, Order

BETA = 0.9
"""p*alpha in all experiments of Zhang, Choromanska and LeCun."""

LEAST_EH = 0.05
"""Learning rate times curvature at which the Gauss-Seidel orders are asked to be stable; SGD bears 2."""

ORDERS = ("jacobi", "center_first", "worker_first")


@dataclass(frozen=True)
class ElasticMethod(Method):
    """Hyper-parameters of the methods with an elastic center.

    Args:
        moving_rate: alpha, the worker's moving rate. 0.9/p when it is not given. It stays fixed when the learning rate
            decays. A negative one acts as momentum on the workers' mean; it wants a positive ``center_rate``.
        rho: The elastic coefficient; alpha = eta*rho then follows the learning rate. Give one of the two.
        center_rate: a_c, the center's moving rate for each worker; the worker's when it is not given (elastic
            symmetry).
        order: ``jacobi``: both sides move from the old values; ``center_first``, ``worker_first``: the other side sees
            the new value of that one (Gauss-Seidel).
        period: tau, local steps between two exchanges.
        synchronous: All workers exchange at once, and wait for each other.
        grad_point: ``pre``: the gradient of a step with an exchange is taken before it (the paper's order);
            ``post``: after it.
    """

    moving_rate: float | None = setting(None, "alpha; 0.9/p when not given", above=-2, below=2)
    rho: float | None = setting(None, "elastic coefficient, alpha = eta*rho; instead of moving_rate", low=0)
    center_rate: float | None = setting(
        None, "a_c, the center's rate per worker; alpha when not given", above=-2, below=2
    )
    order: str = setting("jacobi", "whose new value the other side sees", choices=ORDERS)
    period: int = setting(10, "tau, local steps between exchanges", low=1)
    synchronous: bool = setting(False, "all workers exchange at once")
    grad_point: str = setting("pre", "gradient before or after the exchange", choices=("pre", "post"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.moving_rate is not None and self.rho is not None:
            raise UsageError(f"{self.name}: give moving_rate or rho, not both: rho means moving_rate = eta*rho")

    @property
    def is_synchronous(self) -> bool:
        """Whether workers wait for each other."""
        return self.synchronous

    def alpha(self, size: int, learning_rate: float) -> float:
        """The worker's moving rate in an exchange between ``size`` workers."""
        if self.rho is not None:
            return learning_rate * self.rho
        if self.moving_rate is not None:
            return self.moving_rate
        # A lone worker that moves first by 0.9 of the way would leave the center nothing to see.
        return BETA / (max(size, 2) if self.order == "worker_first" else size)

    def elastic_coefficient(self, size: int, learning_rate: float) -> float:
        """rho = alpha/eta."""
        return self.alpha(size, learning_rate) / learning_rate if learning_rate > 0 else 0.0

    def rates(self, size: int, learning_rate: float) -> tuple[float, float]:
        """The moving rates of worker and center, (a_w, a_c)."""
        alpha = self.alpha(size, learning_rate)
        return alpha, alpha if self.center_rate is None else self.center_rate

    def center(self, replica: Replica) -> Center:
        """The center, seeded by worker 0's parameters. Collective."""
        kind = SynchronousCenter if self.synchronous else AsynchronousCenter
        return kind(replica.comm, replica.x.local, self.order)

    def warnings(self, size: int, learning_rate: float) -> Iterator[str]:
        """What is outside the region of stability on a quadratic; nothing is clamped."""
        a_w, a_c = self.rates(size, learning_rate)
        found = (
            self._jacobi_warning(size, a_w)
            if self.order == "jacobi"
            else self._gauss_seidel_warning(size if self.synchronous else 1, a_w, a_c)
        )
        if found:
            yield found if self.rho is None else found + rho_of(size, learning_rate)
        if a_c < 0:
            yield (
                f"the center's rate {a_c:g} is negative: the center flees the workers at every learning rate; "
                f"center_rate {BETA / size:.3g} (0.9/p) is inside"
            )

    def _jacobi_warning(self, size: int, a_w: float) -> str | None:
        beta = None if self.center_rate is None else size * self.center_rate
        return theory.elastic_warning(size, a_w, beta, synchronous=self.synchronous)

    def _gauss_seidel_warning(self, size: int, a_w: float, a_c: float) -> str | None:
        """For ``size`` workers at once."""
        order, grad_point = cast(Order, self.order), cast(GradPoint, self.grad_point)
        matrix = theory.elastic_order_matrix(
            LEAST_EH, a_w, size * a_c, order=order, grad_point=grad_point, tau=self.period
        )
        if theory.spectral_radius(matrix) < 1:
            return None
        return (
            f"{self.order} with moving_rate {a_w:g}, center_rate {a_c:g} and period {self.period} is not stable where "
            f"learning rate times curvature is {LEAST_EH:g}; moving_rate and center_rate of 0.9/p are inside"
        )


def rho_of(size: int, learning_rate: float) -> str:
    """What a remark on moving rates adds for those who set rho."""
    if learning_rate <= 0:
        return ""
    return f"; as rho that is {BETA / size / learning_rate:.3g} at learning rate {learning_rate:g}"


def jacobi_rates(order: str, a_w: float, a_c: float) -> tuple[float, float]:
    """The rates with which a Jacobi exchange of one worker is one in ``order`` with a_w and a_c.

    center_first:  x - c_new = (1 - a_c)*(x - c)   so the worker's rate is a_w*(1 - a_c)
    worker_first:  x_new - c = (1 - a_w)*(x - c)   so the center's rate is a_c*(1 - a_w)
    """
    if order == "center_first":
        return a_w * (1 - a_c), a_c
    if order == "worker_first":
        return a_w, a_c * (1 - a_w)
    return a_w, a_c


class ElasticWorker(PeriodicWorker):
    """A worker with a center: x_i is what the model holds.

    Args:
        method: Has ``period``, ``grad_point``, ``order`` and ``rates(size, learning_rate)``.
        replica: What it works on.
        center: The center.
        position: (n,) what is exchanged, x_i; what the model holds unless it is given.
    """

    def __init__(self, method: Any, replica: Replica, center: Center, position: Any = None) -> None:
        super().__init__(method, replica)
        self._position = self.x.local if position is None else position
        self._center = center
        self._is_split = method.order == "worker_first" and method.grad_point == "pre"

    def exchange(self) -> None:
        """Once; or the worker's half of it, when the gradient's step belongs between the two."""
        a_w, a_c = self._rates()
        if self._is_split:
            self._center.pull(self._position, a_w)
        else:
            self._center.exchange(self._position, a_w, a_c)

    def after_update(self) -> None:
        """An exchange with grad_point = post; or the center's half of one."""
        super().after_update()
        if self._is_split and self.t % self._method.period == 0:
            self._center.push(self._position, self._rates()[1])

    def consensus(self, out: Any) -> None:
        """The center. Local."""
        self._center.read(out)

    def state(self) -> Iterator[tuple[str, Any]]:
        """The clock and the center."""
        yield from super().state()
        yield from self._center.state()

    def load(self, state: dict[str, Any]) -> None:
        """Collective."""
        super().load(state)
        self._center.load(state)

    def _rates(self) -> tuple[float, float]:
        rates: tuple[float, float] = self._method.rates(self.comm.size, self.learning_rate)
        return rates


class Center(Protocol):
    """The center variable, as a worker meets it."""

    def exchange(self, x: Any, a_w: float, a_c: float) -> None:
        """Both sides of an exchange, in the center's order."""

    def pull(self, x: Any, a_w: float) -> None:
        """The worker's side: x <- x - a_w*(x - c)."""

    def push(self, x: Any, a_c: float) -> None:
        """The center's side: c <- c + a_c*(x - c), or the sum of that over all workers."""

    def read(self, out: Any) -> None:
        """Copy the center to ``out`` (n,). Local."""

    def state(self) -> Iterator[tuple[str, Any]]:
        """What a checkpoint must hold."""

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint. Collective."""


class AsynchronousCenter:
    """The center lives in the memory of all workers, a shard each.

    Args:
        comm: The workers.
        start: (n,) worker 0's seeds the center.
        order: Of an exchange.
    """

    def __init__(self, comm: Communicator, start: Any, order: str = "jacobi") -> None:
        self._comm, self._dtype, self._order = comm, kernels.accumulator(start.dtype), order
        self._c = comm.shared_vector(start.size, self._dtype)
        x, c = start[:0].copy(), np.zeros_like(start[:0], dtype=self._dtype)
        self._compile(x, c)
        self._seed(start)

    def _compile(self, x: Any, c: Any) -> None:
        """All that an exchange may call, before the first one, so that it takes no longer than the others."""
        kernels.elastic_exchange(x, c, 0.0, 0.0)
        if self._order == "worker_first":
            compile_halves(x, c, x)

    def exchange(self, x: Any, a_w: float, a_c: float) -> None:
        """One fused pass over x and c, shard by shard. Local."""
        a_w, a_c = jacobi_rates(self._order, a_w, a_c)
        self._c.update(lambda part, c: kernels.elastic_exchange(x[part], c, a_w, a_c))

    def displace(self, x: Any, a_w: float, a_c: float) -> None:
        """The center's side of an exchange; ``x``, a copy of the worker's, becomes what it has to subtract. Local."""
        self._c.update(lambda part, c: kernels.elastic_displacement(x[part], c, a_w, a_c))

    def pull(self, x: Any, a_w: float) -> None:
        """x <- x - a_w*(x - c). Local."""
        self._c.update(lambda part, c: kernels.elastic_pull(x[part], c, a_w), pushes=False)

    def push(self, x: Any, a_c: float) -> None:
        """c <- c + a_c*(x - c). Local."""
        self._c.update(lambda part, c: kernels.elastic_center(c, x[part], a_c, 1.0), pulls=False)

    def read(self, out: Any) -> None:
        """Copy the center to ``out`` (n,). Local."""
        self._c.read(out)

    def state(self) -> Iterator[tuple[str, Any]]:
        """The whole center, in the part of a checkpoint that is worker 0's, or of the first that lives."""
        if saves_shared_state(self._comm):
            values = np.empty(self._c.n, self._dtype)
            self._c.read(values)
            yield "center", values

    def load(self, state: dict[str, Any]) -> None:
        """Collective."""
        self._seed(state.get("center"))

    def _seed(self, values: Any) -> None:
        """Exactly one worker seeds the center."""
        if self._comm.rank == 0:
            self._c.write(values)
        self._comm.barrier()


class SynchronousCenter:
    """Every worker keeps the center; s = sum_i x_i by all-reduce.

    Args:
        comm: The workers.
        start: (n,) worker 0's seeds the center.
        order: Of an exchange.
    """

    def __init__(self, comm: Communicator, start: Any, order: str = "jacobi") -> None:
        self._comm, self._order = comm, order
        self._kernel = kernels.elastic_sync_center_first if order == "center_first" else kernels.elastic_sync
        self._c = wide_copy(start)
        self._s = comm.vector(start.size, self._c.dtype)
        comm.broadcast(self._c)
        x, c, s = start[:0].copy(), self._c[:0], self._s.local[:0]
        self._kernel(x, c, s, 0.0, 0.0, 1.0)  # compiled before the first exchange
        kernels.receive(s, x)
        if order == "worker_first":
            compile_halves(x, c, s)

    def exchange(self, x: Any, a_w: float, a_c: float) -> None:
        """Both sides in one fused pass. Collective."""
        if self._order == "worker_first":  # s after the workers' moves is (1 - a_w)*s + a_w*p*c
            a_w, a_c = jacobi_rates(self._order, a_w, a_c)
        self._sum(x)
        self._count(self._kernel(x, self._c, self._s.local, a_w, a_c, float(self._comm.size)))

    def pull(self, x: Any, a_w: float) -> None:
        """x <- x - a_w*(x - c). Local."""
        self._count(kernels.elastic_pull(x, self._c, a_w))

    def push(self, x: Any, a_c: float) -> None:
        """c <- c + a_c*(s - p*c). Collective."""
        self._sum(x)
        self._count(kernels.elastic_center(self._c, self._s.local, a_c, float(self._comm.size)))

    def read(self, out: Any) -> None:
        """Copy the center to ``out`` (n,). Local."""
        kernels.copy(out, self._c)

    def state(self) -> Iterator[tuple[str, Any]]:
        """This worker's copy: all are equal."""
        yield "center", self._c

    def load(self, state: dict[str, Any]) -> None:
        """Local."""
        kernels.assign(self._c, state["center"])

    def _sum(self, x: Any) -> None:
        """s = sum_i x_i, in which c stands where a worker is not finite: it then pulls nobody. Collective."""
        n_nonfinite = kernels.receive(self._s.local, x)
        if n_nonfinite:
            kernels.copy(self._s.local, x)
            replace_nonfinite(self._s.local, self._c)
            self._count(n_nonfinite)
        self._comm.allreduce(self._s)

    def _count(self, n_nonfinite: int) -> None:
        self._comm.statistics.n_nonfinite += n_nonfinite


def compile_halves(x: Any, c: Any, s: Any) -> None:
    """Of an exchange: the worker's, and the center's with ``s``, before the first one. All are empty."""
    kernels.elastic_pull(x, c, 0.0)
    kernels.elastic_center(c, s, 0.0, 1.0)
