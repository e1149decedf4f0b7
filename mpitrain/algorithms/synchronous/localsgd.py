"""Local SGD and post-local SGD: average the parameters every H steps instead of the gradients at every step.

    H times:   x_i <- x_i - eta*g_i(x_i)
    then:      x_i <- mean_j x_j

With H = 1 and plain SGD this is all-reduce SGD. If the workers' losses differ and H > 1, the workers converge to a
compromise in which losses of high curvature count less than in the mean of all losses: worker i has the weight
1 - (1 - eta*h_i)^H.

Post-local SGD first makes synchronous steps (with the mean of all gradients) and switches to rounds of H local steps
when the learning rate falls for the first time.

Source: Stich, Local SGD converges fast and communicates little, 2018, https://arxiv.org/abs/1805.09767, algorithm 1;
Lin, Stich, Patel, Jaggi, Don't use large mini-batches, use local SGD, 2018, https://arxiv.org/abs/1808.07217.

Deviations: the local update is any torch optimizer's, and its state (momentum, Adam's moments) stays local: a method
sees only the parameters of the optimizer, so that its state is neither averaged nor reset. The mean of all workers is
evaluated at any time, not only at the end of a round. ``finalize`` ends the last round of a run, however short, with an
average. A worker whose parameters are not finite is left out of the mean and receives that of the others. The default
H is ours, between the papers' 1 and 16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from mpitrain import kernels
from mpitrain.algorithms.base import gradients
from mpitrain.algorithms.base.evaluation import mean_of_workers
from mpitrain.algorithms.base.method import Method
from mpitrain.algorithms.base.replica import Replica
from mpitrain.algorithms.base.settings import integer
from mpitrain.algorithms.base.state import Common
from mpitrain.algorithms.base.worker import PeriodicWorker
from mpitrain.algorithms.synchronous.outer_optimizer import average


@dataclass(frozen=True)
class LocalSGD(Method):
    """Local SGD: workers train separately and average their parameters every ``period`` steps.

    Args:
        period: The number H of local steps between two averages.

    Example:
        >>> LocalSGD(period=4).period
        4
    """

    period: int = integer(8, "H, local steps between two averages", low=1)

    name: ClassVar[str] = "localsgd"
    summary: ClassVar[str] = "local steps, then the mean of all parameters"
    source: ClassVar[str] = "Stich 2018, arXiv 1805.09767"
    communication: ClassVar[str] = "2(p-1)/(p*H)"
    needs_gradient: ClassVar[bool] = False
    grad_point: ClassVar[str] = "post"

    def worker(self, replica: Replica) -> PeriodicWorker:
        """Make a worker. Collective."""
        return LocalWorker(self, replica)


class LocalWorker(PeriodicWorker):
    """A worker without state of its own; the model holds x_i."""

    def __init__(self, method: LocalSGD, replica: Replica) -> None:
        super().__init__(method, replica)
        kernels.keep_finite(self.x.local[:0])  # compiled before the first average

    def exchange(self) -> None:
        """Compute x_i <- mean_j x_j. Collective."""
        average(self.comm, self.x, is_absent=self.is_absent)

    def consensus(self, out: Any) -> None:
        """Write the mean of all workers' present parameters. Local; exact while no worker makes a step."""
        mean_of_workers(self.comm, self.x, out)


@dataclass(frozen=True)
class PostLocalSGD(LocalSGD):
    """All-reduce SGD while the learning rate is high, local SGD after it has fallen.

    By default, the method switches when the learning rate first decreases. With a schedule that decreases at every
    step, such as cosine, it would switch at once; set ``switch_step`` then.

    Args:
        period: The number H of local steps between two averages, after the switch.
        switch_step: The number of synchronous steps before the switch; by default until the first decrease of the
            learning rate.
    """

    switch_step: int | None = integer(
        None, "synchronous steps; none: until the learning rate first falls", low=0, optional=True
    )

    name: ClassVar[str] = "postlocal"
    summary: ClassVar[str] = "synchronous SGD first, local SGD once the learning rate has fallen"
    source: ClassVar[str] = "Lin, Stich, Patel, Jaggi 2018, arXiv 1808.07217"
    can_join: ClassVar[bool] = False
    lost: ClassVar[str] = "after the switch, its local steps since the last exchange"
    communication: ClassVar[str] = "2(p-1)/p before the switch, 2(p-1)/(p*H) after it"
    needs_gradient: ClassVar[bool] = True
    combines_gradients: ClassVar[bool] = True
    short_run: ClassVar[Mapping[str, Any]] = MappingProxyType({"switch_step": 100})

    def exchanges_before(self, worker: Any) -> bool:
        """Return whether the worker has not switched to local steps before the present step. Local."""
        return not worker.is_local

    def exchanges_after(self, worker: Any) -> bool:
        """Return whether the step is the last one of a round, after the switch. Local."""
        return bool(worker.is_local and (worker.t + 1) % self.period == 0)

    def worker(self, replica: Replica) -> PeriodicWorker:
        """Make a worker. Collective."""
        return PostLocalWorker(self, replica)


class PostLocalWorker(PeriodicWorker):
    """A worker that averages gradients before the switch, and parameters after it. The model holds x_i."""

    persistent: ClassVar[tuple[str, ...]] = (Common("_is_local"), Common("_last_rate"))

    def __init__(self, method: PostLocalSGD, replica: Replica) -> None:
        super().__init__(method, replica)
        self._is_local = False
        self._last_rate = 0.0
        kernels.keep_finite(self.x.local[:0])  # compiled before the first average

    @property
    def is_local(self) -> bool:
        """Whether the worker has switched to local steps."""
        return self._is_local

    def combine_gradients(self) -> None:
        """Compute gbar = (1/p) sum_i g_i before the switch (Collective), and nothing after it."""
        switch_step = self._method.switch_step
        switches = self.learning_rate < self._last_rate if switch_step is None else self.t >= switch_step
        self._is_local = self._is_local or switches
        self._last_rate = self.learning_rate
        if not self._is_local:
            gradients.average(self)

    def after_update(self) -> None:
        """Average the parameters at the end of a round, after the switch."""
        if self._is_local:
            super().after_update()

    def exchange_remaining(self) -> None:
        """Average the parameters of an unfinished round, after the switch."""
        if self._is_local:
            super().exchange_remaining()

    def exchange(self) -> None:
        """Compute x_i <- mean_j x_j. Collective."""
        average(self.comm, self.x)

    def consensus(self, out: Any) -> None:
        """Write the mean of all workers' present parameters. Local; exact while no worker makes a step."""
        mean_of_workers(self.comm, self.x, out)
