"""The elastic exchange between workers and a center, shared by the methods of the EASGD family.

    jacobi         x_i <- x_i - a_w*(x_i - c_old);        c <- c + a_c*sum_i (x_i_old - c_old)
    center_first   c   <- c + a_c*sum_i (x_i - c_old),    then  x_i <- x_i - a_w*(x_i - c_new)
    worker_first   x_i <- x_i - a_w*(x_i - c_old),        then  c   <- c + a_c*sum_i (x_i_new - c_old)

every tau steps, with the gradient taken before the exchange (``pre``) or after it (``post``). EASGD is (jacobi, a_w =
a_c = alpha, pre). Synchronous DOWNPOUR is (center_first, 1, 1, post); model averaging, also known as local SGD, is
(center_first, 1, 1/p, post), and with tau = 1 that is mini-batch SGD. There are two moving rates: a_w = alpha is that
of a worker, and a_c is that of the center for the exchange with one worker. beta = p*a_c.

Synchronous: all workers exchange at once. Asynchronous: each worker exchanges alone, whenever it is due (the sums have
one term). The exchange is then atomic for each shard of the center, and the order holds within the visit to a shard.

With ``worker_first`` and ``pre`` the local update lies between the two halves of an exchange: the worker is pulled,
makes its local update, and the center moves towards the outcome. Each half is a visit to the center; both together
transfer the bytes of one exchange.

At the end of a run each worker exchanges once more (``finalize``), unless the center has seen its last step: a run that
is shorter than tau moves the center, too.

Sources: Zhang, Choromanska, LeCun, Deep learning with Elastic Averaging SGD, 2015, https://arxiv.org/abs/1412.6651, eq.
5-6 and algorithm 1; the orders: Zhang's thesis, 2016, https://arxiv.org/abs/1605.02216, chapter 6.

Deviations: the orders of an asynchronous exchange and the separate rates are our reading of the thesis.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, cast

from mpitrain import theory
from mpitrain.algorithms.base.clipping import Clip, clip_displacement
from mpitrain.algorithms.base.method import Method
from mpitrain.algorithms.base.replica import Replica
from mpitrain.algorithms.base.settings import boolean, choice, integer, number
from mpitrain.algorithms.base.state import Common
from mpitrain.algorithms.base.worker import Worker
from mpitrain.algorithms.elastic.center import AsynchronousCenter, Center, SynchronousCenter
from mpitrain.errors import UsageError
from mpitrain.theory.elastic import GradPoint, Order

BETA = 0.9
"""p*alpha in all experiments of Zhang, Choromanska and LeCun."""

LEAST_EH = 0.05
"""Learning rate times curvature at which the Gauss-Seidel orders should be stable; SGD is up to 2."""

ORDERS = ("jacobi", "center_first", "worker_first")


@dataclass(frozen=True)
class ElasticMethod(Method):
    """The settings of the methods with an elastic center.

    Args:
        moving_rate: The moving rate alpha of the worker; by default 0.9/p. It does not change when the learning rate
            decays. A negative value acts as momentum on the mean of the workers, and needs a positive ``center_rate``.
        rho: The elastic coefficient, as an alternative to ``moving_rate``: alpha = eta*rho follows the learning rate.
        center_rate: The moving rate a_c of the center per worker; by default that of the worker (elastic symmetry).
        order: With ``jacobi``, both sides move from the old values. With ``center_first`` or ``worker_first``, that
            side moves first, and the other side uses its new value (Gauss-Seidel).
        period: The number tau of local steps between two exchanges.
        synchronous: Whether all workers exchange at once and wait for each other.
        grad_point: Whether the gradient of a step with an exchange is computed before (``pre``, as in the paper) or
            after (``post``) the exchange.
        clip_displacement: The largest Euclidean norm C by which an exchange of a worker moves the center. A worker
            further than C/a_c from the center is first moved to this distance (``base.clipping``).
    """

    moving_rate: float | None = number(None, "alpha; 0.9/p when not given", above=-2, below=2, optional=True)
    rho: float | None = number(
        None, "elastic coefficient, alpha = eta*rho; instead of moving_rate", low=0, optional=True
    )
    center_rate: float | None = number(
        None, "a_c, the center's rate per worker; alpha when not given", above=-2, below=2, optional=True
    )
    order: str = choice("jacobi", "whose new value the other side sees", ORDERS)
    period: int = integer(10, "tau, local steps between exchanges", low=1)
    synchronous: bool = boolean(False, "all workers exchange at once")
    grad_point: str = choice("pre", "gradient before or after the exchange", ("pre", "post"))
    _: KW_ONLY
    clip_displacement: float | None = clip_displacement()

    starts_at: ClassVar[str | None] = "center"
    can_lose_workers: ClassVar[bool] = False
    averages_optimizer: ClassVar[bool] = False
    goes_on: ClassVar[str] = "center"
    begins_anew: ClassVar[str] = "the workers' distances from the center; velocities and optimizer states"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.moving_rate is not None and self.rho is not None:
            raise UsageError(f"{self.name}: give moving_rate or rho, not both: rho means moving_rate = eta*rho")

    @property
    def is_synchronous(self) -> bool:
        """Whether workers wait for each other."""
        return self.synchronous

    def alpha(self, size: int, learning_rate: float) -> float:
        """Return the worker's moving rate in an exchange between ``size`` workers."""
        if self.rho is not None:
            return learning_rate * self.rho
        if self.moving_rate is not None:
            return self.moving_rate
        # A lone worker that moves first, by 0.9 of the distance, would leave too little of it for the center.
        return BETA / (max(size, 2) if self.order == "worker_first" else size)

    def elastic_coefficient(self, size: int, learning_rate: float) -> float:
        """Return rho = alpha/eta."""
        return self.alpha(size, learning_rate) / learning_rate if learning_rate > 0 else 0.0

    def rates(self, size: int, learning_rate: float) -> tuple[float, float]:
        """Return the moving rates of worker and center, (a_w, a_c)."""
        alpha = self.alpha(size, learning_rate)
        return alpha, alpha if self.center_rate is None else self.center_rate

    def center(self, replica: Replica) -> Center:
        """Create the center, with the parameters of worker 0. Collective."""
        kind = SynchronousCenter if self.synchronous else AsynchronousCenter
        return kind(replica.comm, replica.x.local, self.order, Clip.of(self, replica.comm))

    def warnings(self, size: int, learning_rate: float) -> Iterator[str]:
        """Yield a warning about rates outside the region of stability on a quadratic. They are used nevertheless."""
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
        """Return the warning for ``size`` workers that exchange at once."""
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
    """Return the end of a warning about moving rates for a method with rho: the rho at which p*alpha is 0.9."""
    if learning_rate <= 0:
        return ""
    return f"; as rho that is {BETA / size / learning_rate:.3g} at learning rate {learning_rate:g}"


class ElasticWorker(Worker):
    """A worker that is tied to a center; the model holds x_i.

    Args:
        method: The method, with ``period``, ``grad_point``, ``order`` and ``rates(size, learning_rate)``.
        replica: The vectors and the communicator to work with.
        center: The center.
        position: (n,) the vector x_i to exchange; by default the parameters of the model.
    """

    persistent: ClassVar[tuple[str, ...]] = (Common("_center"),)

    def __init__(self, method: Any, replica: Replica, center: Center, position: Any = None) -> None:
        super().__init__(replica)
        self._method = method
        self._position = self.x.local if position is None else position
        self._center = center
        self._is_pre = method.grad_point == "pre"
        self._is_split = method.order == "worker_first" and self._is_pre

    def before_update(self) -> None:
        """Exchange if it is due and grad_point = pre, which means that the gradient precedes the exchange."""
        if self._is_pre and self.t % self._method.period == 0:
            self.exchange()

    def after_update(self) -> None:
        """Exchange if it is due and grad_point = post, or make the second half of an exchange begun in this step."""
        if not self._is_pre:
            if (self.t + 1) % self._method.period == 0:
                self.exchange()
        elif self._is_split and self.t % self._method.period == 0:
            self._center.push(self._position, self._rates()[1])

    def exchange(self) -> None:
        """Exchange once. If the local update lies between the two halves, make only the worker's half."""
        a_w, a_c = self._rates()
        if self._is_split:
            self._center.pull(self._position, a_w)
        else:
            self._center.exchange(self._position, a_w, a_c)

    @property
    def n_local_steps(self) -> int:
        """The number of local steps since the last exchange. It is valid only between two steps."""
        period = int(self._method.period)
        if not self._is_pre:
            return self.t % period
        return (self.t - 1) % period + (not self._is_split)

    def exchange_remaining(self) -> None:
        """Make both halves of an exchange, if there have been local steps since the last exchange."""
        if self.n_local_steps:
            self._exchange_at_rest()

    def _exchange_at_rest(self) -> None:
        """Exchange when no local update follows: a split exchange makes both of its halves."""
        self.exchange()
        if self._is_split:
            self._center.push(self._position, self._rates()[1])

    def consensus(self, out: Any) -> None:
        """Write the center. Local."""
        self._center.read(out)

    def _rates(self) -> tuple[float, float]:
        rates: tuple[float, float] = self._method.rates(self.comm.size, self.learning_rate)
        return rates
