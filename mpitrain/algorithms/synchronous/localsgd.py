"""Local SGD and post-local SGD: average the parameters every H steps instead of the gradients every step.

    H times:   x_i <- x_i - eta*g_i(x_i)
    then:      x_i <- mean_j x_j

With H = 1 and plain SGD this is all-reduce SGD. With unlike workers and H > 1 the workers settle around a compromise
that weighs those of high curvature less than the mean of their losses does: worker i by 1 - (1 - eta*h_i)^H.

Post-local SGD makes synchronous steps (the mean of all gradients) first, and goes over to rounds of H local steps when
the learning rate falls for the first time.

Source: Stich, Local SGD converges fast and communicates little, 2018, https://arxiv.org/abs/1805.09767, algorithm 1;
Lin, Stich, Patel, Jaggi, Don't use large mini-batches, use local SGD, 2018, https://arxiv.org/abs/1808.07217.

Deviations: the local update is any torch optimizer's, and its state (momentum, Adam's moments) stays each worker's own:
a method sees no more of the optimizer than the parameters, so it is neither averaged nor reset. What is evaluated is
the mean of all workers at any time, not only where a round ends. A worker whose parameters are no longer finite is left
out of the mean and takes on that of the others. The default H is ours, between the papers' 1 and 16.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from mpitrain import kernels
from mpitrain.algorithms.base.evaluation import mean_of_workers
from mpitrain.algorithms.base.method import Method, PeriodicWorker, Replica, setting
from mpitrain.algorithms.synchronous.outer_optimizer import average


@dataclass(frozen=True)
class LocalSGD(Method):
    """Workers train on their own and meet every ``period`` steps to average their parameters.

    Args:
        period: H, local steps between two averages.

    Example:
        >>> LocalSGD(period=4).period
        4
    """

    period: int = setting(8, "H, local steps between two averages", low=1)

    name: ClassVar[str] = "localsgd"
    summary: ClassVar[str] = "local steps, then the mean of all parameters"
    source: ClassVar[str] = "Stich 2018, arXiv 1805.09767"
    communication: ClassVar[str] = "2(p-1)/(p*H)"
    needs_gradient: ClassVar[bool] = False
    grad_point: ClassVar[str] = "post"

    def worker(self, replica: Replica) -> LocalWorker:
        """Collective."""
        return LocalWorker(self, replica)


class LocalWorker(PeriodicWorker):
    """No state but the parameters."""

    def __init__(self, method: LocalSGD, replica: Replica) -> None:
        super().__init__(method, replica)
        kernels.keep_finite(self.x.local[:0])  # compiled before the first average

    def exchange(self) -> None:
        """x_i <- mean_j x_j. Collective."""
        average(self.comm, self.x)

    def consensus(self, out: Any) -> None:
        """The mean of all workers as they are now. Local: exact while they rest, between their steps otherwise."""
        mean_of_workers(self.comm, self.x, out)


@dataclass(frozen=True)
class PostLocalSGD(LocalSGD):
    """All-reduce SGD while the learning rate is high, local SGD after it has fallen: large steps together, small alone.

    Any decrease of the learning rate counts, so that a schedule that falls every step (cosine) switches at once: give
    ``switch_step`` there.

    Args:
        period: H, local steps between two averages, after the switch.
        switch_step: Synchronous steps before the switch; None: until the learning rate falls for the first time.
    """

    switch_step: int | None = setting(None, "synchronous steps; none: until the learning rate first falls", low=0)

    name: ClassVar[str] = "postlocal"
    summary: ClassVar[str] = "synchronous SGD first, local SGD once the learning rate has fallen"
    source: ClassVar[str] = "Lin, Stich, Patel, Jaggi 2018, arXiv 1808.07217"
    communication: ClassVar[str] = "2(p-1)/p before the switch, 2(p-1)/(p*H) after it"
    needs_gradient: ClassVar[bool] = True
    short_run: ClassVar[Mapping[str, Any]] = MappingProxyType({"switch_step": 100})

    def worker(self, replica: Replica) -> PostLocalWorker:
        """Collective."""
        return PostLocalWorker(self, replica)


class PostLocalWorker(LocalWorker):
    """Synchronous until it is local; it never goes back."""

    def __init__(self, method: PostLocalSGD, replica: Replica) -> None:
        super().__init__(method, replica)
        self._is_local = False
        self._last_rate = 0.0

    def before_update(self) -> None:
        """gbar = (1/p) sum_i g_i, before the switch."""
        switch_step = self._method.switch_step
        has_come = self.learning_rate < self._last_rate if switch_step is None else self.t >= switch_step
        self._is_local = self._is_local or has_come
        self._last_rate = self.learning_rate
        if not self._is_local:
            average(self.comm, self.g)

    def after_update(self) -> None:
        """The mean of all parameters, after the switch."""
        if self._is_local:
            super().after_update()

    def state(self) -> Iterator[tuple[str, Any]]:
        """The clock, whether the switch has been made, and the learning rate that the next one is compared with."""
        yield from super().state()
        yield "is_local", int(self._is_local)
        yield "last_rate", self._last_rate

    def load(self, state: dict[str, Any]) -> None:
        """Local."""
        super().load(state)
        self._is_local = bool(state["is_local"])
        self._last_rate = float(state["last_rate"])
