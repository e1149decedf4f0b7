"""SlowMo: local SGD with a slow heavy-ball momentum over the rounds.

    tau steps of the base optimizer with learning rate gamma, from x0:   x_a = mean_i x_i
    u  <- beta*u + (x0 - x_a)/gamma
    x0 <- x0 - alpha*gamma*u;   x_i <- x0

beta = 0 and alpha = 1 is local SGD; tau = 1 with plain SGD is all-reduce SGD with heavy-ball momentum. On a quadratic,
with q = (1 - gamma*h)^tau, (u, x0) obeys [[beta, 1-q], [-alpha*beta, 1-alpha*(1-q)]] (u in units of a displacement),
which is stable iff 0 < alpha*(1-q) < 2*(1+beta).

Source: Wang, Tantia, Ballas, Rabbat, SlowMo: Improving communication-efficient distributed SGD with slow momentum,
2019, https://arxiv.org/abs/1910.00643, algorithm 1. The stability region was derived for this project.

Deviations: the paper's gamma is constant in a round. Here the learning rate may change at every step, and gamma is its
mean over the round: a decay in the middle of a round does not enter u as a larger gradient. The base optimizer's state
stays local. ``finalize`` ends the last round of a run, however short, with an outer step. A worker whose parameters are
not finite is left out of a round and starts the next one from x0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from mpitrain import kernels, theory
from mpitrain.algorithms.base.method import Method
from mpitrain.algorithms.base.replica import Replica
from mpitrain.algorithms.base.settings import integer, number
from mpitrain.algorithms.base.state import Common
from mpitrain.algorithms.base.worker import PeriodicWorker
from mpitrain.algorithms.synchronous.outer_optimizer import OuterParameters


@dataclass(frozen=True)
class SlowMo(Method):
    """Local SGD with a slow momentum over the averages of the rounds.

    Args:
        slow_learning_rate: The slow learning rate alpha; usually 1.
        slow_momentum: The slow momentum beta; usually 0 to 0.7, larger with more workers.
        period: The number tau of local steps per round.
    """

    slow_learning_rate: float = number(1.0, "alpha, of the slow step", above=0)
    slow_momentum: float = number(0.5, "beta, of the slow step", low=0, below=1)
    period: int = integer(48, "tau, local steps a round", low=1)

    name: ClassVar[str] = "slowmo"
    summary: ClassVar[str] = "local steps, averaged with a slow momentum over the rounds"
    source: ClassVar[str] = "Wang, Tantia, Ballas, Rabbat 2019, arXiv 1910.00643"
    communication: ClassVar[str] = "2(p-1)/(p*tau)"
    goes_on: ClassVar[str] = "outer parameters x0 and slow momentum u; mean of the parameters and optimizer states"
    begins_anew: ClassVar[str] = "differences between workers"
    needs_gradient: ClassVar[bool] = False
    grad_point: ClassVar[str] = "post"
    learning_rate_factor: ClassVar[float] = 0.5
    short_run: ClassVar[Mapping[str, Any]] = MappingProxyType({"period": 12})

    def warnings(self, size: int, learning_rate: float) -> Iterator[str]:
        """Yield a warning if alpha >= 2*(1+beta), which is unstable if local steps reach a minimum (q -> 0)."""
        found = theory.slowmo_warning(self.slow_learning_rate, self.slow_momentum)
        if found is not None:
            yield found

    def worker(self, replica: Replica) -> SlowMoWorker:
        """Make a worker. Collective."""
        return SlowMoWorker(self, replica)


class SlowMoWorker(PeriodicWorker):
    """A worker with the slow momentum u and the outer parameters theta (x0 in the paper). The model holds x_i."""

    persistent: ClassVar[tuple[str, ...]] = (Common("_outer"), Common("_sum_of_rates"))

    def __init__(self, method: SlowMo, replica: Replica) -> None:
        super().__init__(method, replica)
        self._outer = OuterParameters(self.comm, self.x.local)
        self._sum_of_rates, self._n_rates = 0.0, 0  # over the steps of this round
        kernels.slow_momentum(*self._outer.empty, 0.0, 0.0, 0.0)  # compiled before the first round

    def after_update(self) -> None:
        """Add the learning rate to the sum of the round; at the end of the round, make the outer step."""
        self._sum_of_rates += self.learning_rate
        self._n_rates += 1
        super().after_update()

    def exchange(self) -> None:
        """Compute u <- beta*u + D/gamma (0 if gamma = 0); x0 <- x0 - alpha*gamma*u; x_i <- x0. Collective."""
        outer, alpha, beta = self._outer, self._method.slow_learning_rate, self._method.slow_momentum
        d = outer.pseudogradient(is_absent=self.is_absent)
        gamma = self._sum_of_rates / self._n_rates
        self._sum_of_rates, self._n_rates = 0.0, 0
        inverse = 1 / gamma if gamma > 0 else 0.0
        self.comm.statistics.n_nonfinite += kernels.slow_momentum(
            self.x.local, outer.theta, outer.momentum, d, beta, inverse, alpha * gamma
        )

    def after_load(self) -> None:
        """Compute the number of steps in the unfinished round. Local."""
        self._n_rates = self.n_local_steps

    def consensus(self, out: Any) -> None:
        """Write x0 after the last round. Local."""
        kernels.copy(out, self._outer.theta)
