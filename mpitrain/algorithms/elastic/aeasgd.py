"""AEASGD: asynchronous elastic averaging as Hermans runs it, with an exchange that may come early.

    tau times:  x_i <- x_i - eta*g_i(x_i)
    then:       E = eta*rho*(x_i - c);   x_i <- x_i - E;   c <- c + E

The next gradient is taken after the exchange. A worker whose gradient is balanced by the spring gains nothing from
further steps of its own, -eta*g(x) = eta*rho*(x - c); on a quadratic with its minimum at x* that is at (h x* + rho
c)/(h + rho). So, with ``early_exchange``, it exchanges in the first step in which

    ||eta*g|| - ||eta*rho*(x - c)|| < eta

and after tau steps at the latest. eta cancels: the gradient's norm is compared with 1 + rho*||x - c||, and once it is
below 1, as it may always be in a model with many small gradients, every step exchanges.

Source: Hermans, On scalable deep learning and parallelizing gradient descent, 2017, CERN-THESIS-2017-103
(https://cds.cern.ch/record/2276711); the exchange is that of Zhang, Choromanska, LeCun 2015,
https://arxiv.org/abs/1412.6651.

Deviations: c in the rule is the center as this worker left it at its last exchange. The rule is evaluated in every
step, and the shared center would have to be locked and read for it, which is what a period is to save; alone, a worker
knows the center exactly. g and x are those of the step, before its local update, without weight decay or momentum; the
exchange follows that update.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from mpitrain import kernels, theory
from mpitrain.algorithms.base.method import Method, Replica, setting, wide_copy
from mpitrain.algorithms.elastic.method import AsynchronousCenter, ElasticWorker, rho_of
from mpitrain.collectives.communicator import Communicator
from mpitrain.kernels import norms


@dataclass(frozen=True)
class AEASGD(Method):
    """Workers explore on their own for a number of steps, then are tied to the center; always asynchronous.

    EASGD with the elastic coefficient as its setting and the gradient after the exchange, and the same with
    ``early_exchange`` for workers that would otherwise wait at the balance of gradient and spring.

    Args:
        rho: The elastic coefficient; the moving rate eta*rho follows the learning rate.
        period: tau (lambda in the thesis), local steps between two exchanges, at most.
        early_exchange: Exchange as soon as ||eta*g|| - ||eta*rho*(x - c)|| < eta. Costs a vector and two norms a step.

    Example:
        >>> AEASGD().rates(4, 0.01)
        (0.05, 0.05)
    """

    rho: float = setting(5.0, "elastic coefficient; the moving rate is eta*rho", low=0)
    period: int = setting(10, "tau, local steps between exchanges, at most", low=1)
    early_exchange: bool = setting(False, "exchange when gradient and spring are in balance")

    name: ClassVar[str] = "aeasgd"
    summary: ClassVar[str] = "asynchronous elastic averaging after tau steps, or when gradient and spring balance"
    source: ClassVar[str] = "Hermans 2017, CERN-THESIS-2017-103"
    communication: ClassVar[str] = "2/tau (center pulled and pushed); more when exchanges come early"
    grad_point: ClassVar[str] = "post"
    order: ClassVar[str] = "jacobi"

    @property
    def needs_gradient(self) -> bool:  # type: ignore[override]
        """To know when gradient and spring balance."""
        return self.early_exchange

    @property
    def is_synchronous(self) -> bool:
        """Nobody waits for anybody."""
        return False

    def rates(self, size: int, learning_rate: float) -> tuple[float, float]:
        """The moving rates of worker and center, both eta*rho."""
        return (learning_rate * self.rho,) * 2

    def warnings(self, size: int, learning_rate: float) -> Iterator[str]:
        """What is outside the region of stability on a quadratic."""
        found = theory.elastic_warning(size, learning_rate * self.rho, synchronous=False)
        if found:
            yield found + rho_of(size, learning_rate)

    def worker(self, replica: Replica) -> ElasticWorker:
        """Collective."""
        if self.early_exchange:
            return EarlyWorker(self, replica, RememberedCenter(replica.comm, replica.x.local))
        return ElasticWorker(self, replica, AsynchronousCenter(replica.comm, replica.x.local))


class RememberedCenter(AsynchronousCenter):
    """A center of which each worker knows how it left it.

    Attributes:
        seen: (n,) that; the seed before the first exchange.
    """

    def __init__(self, comm: Communicator, start: Any) -> None:
        super().__init__(comm, start)
        self.seen = wide_copy(start)
        comm.broadcast(self.seen)

    def _compile(self, x: Any, c: Any) -> None:
        kernels.elastic_exchange_seen(x, c, c.copy(), 0.0, 0.0)

    def exchange(self, x: Any, a_w: float, a_c: float) -> None:
        """One fused pass over x, c and what is remembered, shard by shard. Local."""
        self._c.update(lambda part, c: kernels.elastic_exchange_seen(x[part], c, self.seen[part], a_w, a_c))


class EarlyWorker(ElasticWorker):
    """Exchanges at the end of the first step whose gradient the spring balances."""

    def __init__(self, method: AEASGD, replica: Replica, center: RememberedCenter) -> None:
        super().__init__(method, replica, center)
        self._remembered = center
        self._n_local = 0  # steps since the last exchange
        self._is_due = False

    def before_update(self) -> None:
        """Whether this step exchanges: ||eta*g|| - ||eta*rho*(x - c)|| < eta, or it is the tau-th."""
        eta, rho = self.learning_rate, self._method.rho
        self._n_local += 1
        self._is_due = self._n_local >= self._method.period or (
            eta * norms.norm(self.g.local) - eta * rho * norms.distance(self.x.local, self._remembered.seen) < eta
        )

    def after_update(self) -> None:
        """Exchange if it is due."""
        if self._is_due:
            self.exchange()
            self._n_local = 0

    def state(self) -> Iterator[tuple[str, Any]]:
        """The clock, the center, the steps since the last exchange and what is remembered of it."""
        yield from super().state()
        yield "n_local", self._n_local
        yield "seen", self._remembered.seen

    def load(self, state: dict[str, Any]) -> None:
        """Collective."""
        super().load(state)
        self._n_local = int(state["n_local"])
        kernels.assign(self._remembered.seen, state["seen"])
