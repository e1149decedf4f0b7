"""AEASGD: asynchronous elastic averaging as run by Hermans, optionally with early exchanges.

    tau times:  x_i <- x_i - eta*g_i(x_i)
    then:       E = eta*rho*(x_i - c);   x_i <- x_i - E;   c <- c + E

The next gradient is taken after the exchange. A worker whose gradient is balanced by the spring gains nothing from
further local steps, -eta*g(x) = eta*rho*(x - c); on a quadratic with its minimum at x* the balance is at
(h x* + rho c)/(h + rho). With ``early_exchange`` the worker therefore exchanges in the first step in which

    ||eta*g|| - ||eta*rho*(x - c)|| < eta

and after tau steps at the latest. eta cancels: the gradient's norm is compared with 1 + rho*||x - c||. While this norm
is below 1, every step exchanges; in a model with small gradients, this may be the whole run.

Source: Hermans, On scalable deep learning and parallelizing gradient descent, 2017, CERN-THESIS-2017-103
(https://cds.cern.ch/record/2276711); the exchange is that of Zhang, Choromanska, LeCun 2015,
https://arxiv.org/abs/1412.6651.

Deviations: c in the rule is the center as this worker left it at its last exchange. The rule is evaluated at every
step; reading the shared center each time would lock it as often as an exchange at every step. With one worker this c
is exact. g and x are those of the step before its local update, without weight decay or momentum; the exchange follows
the update.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from mpitrain import kernels, theory
from mpitrain.algorithms.base.clipping import Clip, clip_displacement
from mpitrain.algorithms.base.method import Method
from mpitrain.algorithms.base.precision import wide_copy
from mpitrain.algorithms.base.replica import Replica
from mpitrain.algorithms.base.settings import boolean, integer, number
from mpitrain.algorithms.base.state import Located
from mpitrain.algorithms.elastic.center import AsynchronousCenter
from mpitrain.algorithms.elastic.method import ElasticWorker, rho_of
from mpitrain.collectives.communicator import Communicator
from mpitrain.kernels import norms


@dataclass(frozen=True)
class AEASGD(Method):
    """Asynchronous elastic averaging with the elastic coefficient as its parameter.

    AEASGD is EASGD with a gradient that is computed after the exchange. ``early_exchange`` is for workers that would
    otherwise stop at the point where gradient and elastic force are in balance.

    Args:
        rho: The elastic coefficient; the moving rate eta*rho follows the learning rate.
        period: The largest number tau of local steps between two exchanges (lambda in the thesis).
        early_exchange: Whether to exchange as soon as ||eta*g|| - ||eta*rho*(x - c)|| < eta. This needs one more vector
            of memory, and two norms per step.
        clip_displacement: The largest Euclidean norm C by which an exchange moves the center (``base.clipping``).

    Example:
        >>> AEASGD().rates(4, 0.01)
        (0.05, 0.05)
    """

    rho: float = number(5.0, "elastic coefficient; the moving rate is eta*rho", low=0)
    period: int = integer(10, "tau, local steps between exchanges, at most", low=1)
    early_exchange: bool = boolean(False, "exchange when gradient and spring are in balance")
    clip_displacement: float | None = clip_displacement()

    name: ClassVar[str] = "aeasgd"
    summary: ClassVar[str] = "asynchronous elastic averaging after tau steps, or when gradient and spring balance"
    source: ClassVar[str] = "Hermans 2017, CERN-THESIS-2017-103"
    communication: ClassVar[str] = "2/tau (center pulled and pushed); more when exchanges come early"
    starts_at: ClassVar[str | None] = "center"
    averages_optimizer: ClassVar[bool] = False
    goes_on: ClassVar[str] = "center"
    begins_anew: ClassVar[str] = "the workers' distances from the center; optimizer states"
    grad_point: ClassVar[str] = "post"
    order: ClassVar[str] = "jacobi"

    @property
    def needs_gradient(self) -> bool:  # type: ignore[override]
        """Whether the method uses the gradient itself: ``early_exchange`` compares it with the elastic force."""
        return self.early_exchange

    @property
    def is_synchronous(self) -> bool:
        """False: no worker waits for another."""
        return False

    def rates(self, size: int, learning_rate: float) -> tuple[float, float]:
        """Return the moving rates of worker and center, both eta*rho."""
        return (learning_rate * self.rho,) * 2

    def warnings(self, size: int, learning_rate: float) -> Iterator[str]:
        """Yield a line for a moving rate outside the region of stability on a quadratic."""
        found = theory.elastic_warning(size, learning_rate * self.rho, synchronous=False)
        if found:
            yield found + rho_of(size, learning_rate)

    def worker(self, replica: Replica) -> ElasticWorker:
        """Make a worker. Collective."""
        clip = Clip.of(self, replica.comm)
        if self.early_exchange:
            return EarlyWorker(self, replica, RememberedCenter(replica.comm, replica.x.local, clip))
        return ElasticWorker(self, replica, AsynchronousCenter(replica.comm, replica.x.local, clip=clip))


class RememberedCenter(AsynchronousCenter):
    """A center with a copy of its values after this worker's last exchange. Collective to create.

    Args:
        comm: The communicator of the workers.
        start: (n,) the first values; those of worker 0 are used.
        clip: The bound on the displacement of the center by this worker.

    Attributes:
        seen: (n,) the copy.
    """

    def __init__(self, comm: Communicator, start: Any, clip: Clip | None = None) -> None:
        super().__init__(comm, start, clip=clip)
        self.seen = wide_copy(start)
        comm.broadcast(self.seen)
        c = self.empty_shard(start)
        kernels.elastic_exchange_seen(start[:0].copy(), c, c.copy(), 0.0, 0.0)  # compiled before the first exchange

    def exchange(self, x: Any, a_w: float, a_c: float) -> None:
        """Make both sides of an exchange in one fused pass over x, c and ``seen``, shard by shard. Local."""
        self.vector.update(
            self.clipped(x, a_c, lambda part, c: kernels.elastic_exchange_seen(x[part], c, self.seen[part], a_w, a_c))
        )


class EarlyWorker(ElasticWorker):
    """A worker that exchanges after the first step in which the elastic force balances the gradient.

    It exchanges after ``period`` steps at the latest.

    Args:
        method: The hyper-parameters.
        replica: The vectors and the communicator to work with.
        center: The center.
    """

    persistent: ClassVar[tuple[str, ...]] = ("_n_local", Located("_seen"))

    def __init__(self, method: AEASGD, replica: Replica, center: RememberedCenter) -> None:
        super().__init__(method, replica, center)
        self._seen = center.seen
        self._n_local = 0  # steps since the last exchange
        self._is_due = False

    def before_update(self) -> None:
        """Decide to exchange if ||eta*g|| - ||eta*rho*(x - c)|| < eta, or if this is the tau-th step."""
        eta, rho = self.learning_rate, self._method.rho
        self._n_local += 1
        self._is_due = self._n_local >= self._method.period or (
            eta * norms.norm(self.g.local) - eta * rho * norms.distance(self.x.local, self._seen) < eta
        )

    def after_update(self) -> None:
        """Exchange if ``before_update`` has decided so."""
        if self._is_due:
            self.exchange()
            self._n_local = 0

    @property
    def n_local_steps(self) -> int:
        """The number of local steps since the last exchange."""
        return self._n_local
