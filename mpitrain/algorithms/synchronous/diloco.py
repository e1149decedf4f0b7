"""DiLoCo: islands train for hundreds of steps on their own, and an outer optimizer steps with the outcome.

    H steps of the inner optimizer, from theta, end at theta_i
    D     =  mean_i (theta - theta_i)
    b     <- m*b + D
    theta <- theta - eta_out*(D + m*b);   theta_i <- theta

The outer optimizer is SGD with Nesterov momentum, in the form of torch.optim.SGD; D takes the place of the gradient.
The inner optimizer is the torch optimizer (AdamW in the paper); its state stays local. eta_out = 1 and m = 0 is local
SGD. On a quadratic, with q = (1 - eta*h)^H, (b, theta) obeys [[m, 1-q], [-eta_out*m^2, 1 - eta_out*(1-q)*(1+m)]],
stable iff eta_out*(1-q) < 2*(1+m)/(1+2*m).

Source: Douillard et al., DiLoCo: Distributed low-communication training of language models, 2023,
https://arxiv.org/abs/2311.08105, algorithm 1. The stability region was derived for this project.

Deviations: a round is a collective and waits for every island. The paper lets islands drop out of a round; here those
whose parameters are not finite do: the mean is that of the others, and all islands start the next round from theta.
``finalize`` ends the last round of a run, however short, with an outer step.
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
class DiLoCo(Method):
    """Local SGD with an outer optimizer, for slow networks.

    A round has hundreds of inner steps and one outer step. The consensus theta changes once per round, so a run should
    have at least three rounds.

    Args:
        outer_learning_rate: The learning rate eta_out of the outer step.
        outer_momentum: The Nesterov momentum m of the outer step.
        period: The number H of inner steps per round.
    """

    outer_learning_rate: float = number(0.7, "eta_out, of the outer step", above=0)
    outer_momentum: float = number(0.9, "m, Nesterov momentum of the outer step", low=0, below=1)
    period: int = integer(500, "H, inner steps a round", low=1)

    name: ClassVar[str] = "diloco"
    summary: ClassVar[str] = "hundreds of local steps, then a Nesterov step with what they have changed"
    source: ClassVar[str] = "Douillard et al. 2023, arXiv 2311.08105"
    communication: ClassVar[str] = "2(p-1)/(p*H)"
    goes_on: ClassVar[str] = "outer parameters theta and their momentum; mean of the parameters and optimizer states"
    begins_anew: ClassVar[str] = "differences between workers"
    needs_gradient: ClassVar[bool] = False
    grad_point: ClassVar[str] = "post"
    learning_rate_factor: ClassVar[float] = 0.1
    short_run: ClassVar[Mapping[str, Any]] = MappingProxyType({"period": 10})

    def warnings(self, size: int, learning_rate: float) -> Iterator[str]:
        """Yield a warning if eta_out >= 2*(1+m)/(1+2*m), which is unstable if inner steps reach a minimum (q -> 0)."""
        found = theory.diloco_warning(self.outer_learning_rate, self.outer_momentum)
        if found is not None:
            yield found

    def worker(self, replica: Replica) -> DiLoCoWorker:
        """Make a worker. Collective."""
        return DiLoCoWorker(self, replica)


class DiLoCoWorker(PeriodicWorker):
    """A worker with the outer parameters theta and the outer momentum buffer b; the model holds x_i."""

    persistent: ClassVar[tuple[str, ...]] = (Common("_outer"),)

    def __init__(self, method: DiLoCo, replica: Replica) -> None:
        super().__init__(method, replica)
        self._outer = OuterParameters(self.comm, self.x.local)
        kernels.outer_nesterov(*self._outer.empty, 0.0, 0.0)  # compiled before the first round

    def exchange(self) -> None:
        """Compute b <- m*b + D; theta <- theta - eta_out*(D + m*b); x_i <- theta. Collective."""
        outer, method = self._outer, self._method
        d = outer.pseudogradient(is_absent=self.is_absent)
        self.comm.statistics.n_nonfinite += kernels.outer_nesterov(
            self.x.local, outer.theta, outer.momentum, d, method.outer_learning_rate, method.outer_momentum
        )

    def consensus(self, out: Any) -> None:
        """Write theta after the last round. Local."""
        kernels.copy(out, self._outer.theta)
