"""DiLoCo: islands that train for hundreds of steps on their own, and an outer optimizer that sees only the outcome.

    H steps of the inner optimizer, from theta, end at theta_i
    D     =  mean_i (theta - theta_i)
    b     <- m*b + D
    theta <- theta - eta_out*(D + m*b);   theta_i <- theta

The outer optimizer is SGD with Nesterov momentum, as torch.optim.SGD has it; D takes the place of the gradient. The
inner optimizer is the torch optimizer (AdamW in the paper); its state stays the island's own. eta_out = 1 and m = 0 is
local SGD. On a quadratic, with q = (1 - eta*h)^H, (b, theta) obeys
[[m, 1-q], [-eta_out*m^2, 1 - eta_out*(1-q)*(1+m)]], stable iff eta_out*(1-q) < 2*(1+m)/(1+2*m).

Source: Douillard et al., DiLoCo: Distributed low-communication training of language models, 2023,
https://arxiv.org/abs/2311.08105, algorithm 1. The stability region was derived for this project.

Deviations: a round is a collective and waits for every island. The paper's islands that drop out of a round are here
those whose parameters are no longer finite: the mean is that of the others, and they begin the next round with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from mpitrain import kernels, theory
from mpitrain.algorithms.base.method import Method, Replica, setting
from mpitrain.algorithms.synchronous.outer_optimizer import OuterWorker


@dataclass(frozen=True)
class DiLoCo(Method):
    """For slow networks: hundreds of steps between two exchanges, then one step of an outer optimizer.

    What is evaluated is theta, which moves once a round: a run shorter than ``period`` evaluates its beginning.

    Args:
        outer_learning_rate: eta_out.
        outer_momentum: m, Nesterov.
        period: H, inner steps a round.
    """

    outer_learning_rate: float = setting(0.7, "eta_out, of the outer step", above=0)
    outer_momentum: float = setting(0.9, "m, Nesterov momentum of the outer step", low=0, below=1)
    period: int = setting(500, "H, inner steps a round", low=1)

    name: ClassVar[str] = "diloco"
    summary: ClassVar[str] = "hundreds of local steps, then a Nesterov step with what they have changed"
    source: ClassVar[str] = "Douillard et al. 2023, arXiv 2311.08105"
    communication: ClassVar[str] = "2(p-1)/(p*H)"
    needs_gradient: ClassVar[bool] = False
    grad_point: ClassVar[str] = "post"
    learning_rate_factor: ClassVar[float] = 0.1
    short_run: ClassVar[Mapping[str, Any]] = MappingProxyType({"period": 20})

    def warnings(self, size: int, learning_rate: float) -> Iterator[str]:
        """eta_out >= 2*(1+m)/(1+2*m) is unstable wherever a round comes near the minimum (q -> 0)."""
        found = theory.diloco_warning(self.outer_learning_rate, self.outer_momentum)
        if found is not None:
            yield found

    def worker(self, replica: Replica) -> DiLoCoWorker:
        """Collective."""
        return DiLoCoWorker(self, replica)


class DiLoCoWorker(OuterWorker):
    """theta and b, the outer momentum buffer."""

    def __init__(self, method: DiLoCo, replica: Replica) -> None:
        super().__init__(method, replica)
        empty = self._theta[:0]
        kernels.outer_nesterov(self.x.local[:0], empty, empty.copy(), self._d.local[:0], 0.0, 0.0)

    def outer_step(self, d: Any) -> None:
        """b <- m*b + d;  theta <- theta - eta_out*(d + m*b)"""
        self.comm.statistics.n_nonfinite += kernels.outer_nesterov(
            self.x.local,
            self._theta,
            self._momentum,
            d,
            self._method.outer_learning_rate,
            self._method.outer_momentum,
        )
