"""DaSGD: local SGD whose averages arrive late, so that nobody waits for them.

    after every tau-th step:   s_i <- x_i, and an all-reduce of the s_i begins in the background
    d steps later:             x_i <- x_i + (mean_j s_j - s_i)

The corrections sum to zero over the workers, so that the mean of all x_i moves by the mean gradient step alone, late or
not. d = 0 is local SGD. If d steps take longer than an all-reduce, communication costs no time.

Source: Zhou et al., DaSGD: Squeezing SGD parallelization performance in distributed training using delayed averaging,
2020, https://arxiv.org/abs/2006.00441. The abstract gives the idea; the form of the correction is our reading.

Deviations: the local update is any torch optimizer's, whose state stays each worker's own. A correction that is not
finite, because some worker's snapshot was not, is left out. A checkpoint taken while an all-reduce is under way holds
the snapshot, and the all-reduce begins again where the run is continued. The default periods are ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mpitrain import kernels
from mpitrain.algorithms.base.evaluation import mean_of_workers
from mpitrain.algorithms.base.method import Method, PeriodicWorker, Replica, setting
from mpitrain.collectives.communicator import Pending


@dataclass(frozen=True)
class DaSGD(Method):
    """Local SGD for slow networks: the average of all workers is made while they go on, and mixed in later.

    Args:
        period: tau, local steps between the beginnings of two averages.
        delay: d, local steps that an average may take. One all-reduce is under way at a time, so that d is at most
            tau-1: a longer one means that.
    """

    period: int = setting(8, "tau, local steps between two averages", low=1)
    delay: int = setting(1, "d, local steps until an average arrives, at most tau-1", low=0)

    name: ClassVar[str] = "dasgd"
    summary: ClassVar[str] = "local SGD whose averages are made in the background and arrive late"
    source: ClassVar[str] = "Zhou et al. 2020, arXiv 2006.00441"
    communication: ClassVar[str] = "2(p-1)/(p*tau), while the worker computes"
    needs_gradient: ClassVar[bool] = False
    grad_point: ClassVar[str] = "post"

    @property
    def steps_late(self) -> int:
        """d, so that an average arrives before the next one begins."""
        return min(self.delay, self.period - 1)

    def warnings(self, size: int, learning_rate: float) -> Iterator[str]:
        """A delay that is cut."""
        if self.delay > self.steps_late:
            yield f"delay={self.delay} is cut to {self.steps_late}: it must be below period={self.period}"

    def worker(self, replica: Replica) -> DaSGDWorker:
        """Collective."""
        return DaSGDWorker(self, replica)


class DaSGDWorker(PeriodicWorker):
    """s, the snapshot, and the vector that becomes the mean of all snapshots."""

    def __init__(self, method: DaSGD, replica: Replica) -> None:
        super().__init__(method, replica)
        x = self.x.local
        self._mean = self.comm.vector(x.size, x.dtype)
        self._snapshot = np.zeros_like(x)
        self._under_way: Pending | None = None
        kernels.delayed_correction(x[:0], x[:0].copy(), self._mean.local[:0])  # compiled before the first

    def after_update(self) -> None:
        """The beginning of an average, and d steps later its end."""
        super().after_update()
        if self._under_way is not None and (self.t + 1) % self._method.period == self._method.steps_late:
            self._correct(self._under_way)

    def exchange(self) -> None:
        """s_i <- x_i, and off it goes. Collective."""
        self._snapshot[...] = self.x.local
        self._begin()

    def _begin(self) -> None:
        """Nobody touches the vector from here to ``wait``; the snapshot is a copy of it for oneself."""
        self._mean.local[...] = self._snapshot
        self._under_way = self.comm.start_allreduce(self._mean, mean=True)

    def _correct(self, under_way: Pending) -> None:
        """x_i <- x_i + (mean_j s_j - s_i). Collective."""
        under_way.wait()
        self._under_way = None
        self.comm.statistics.n_nonfinite += kernels.delayed_correction(self.x.local, self._snapshot, self._mean.local)

    def consensus(self, out: Any) -> None:
        """The mean of all workers as they are now. Local: exact while they rest, between their steps otherwise."""
        mean_of_workers(self.comm, self.x, out)

    def state(self) -> Iterator[tuple[str, Any]]:
        """The clock, and the snapshot if its average is under way. Local: the all-reduce goes on undisturbed."""
        yield from super().state()
        if self._under_way is not None:
            yield "snapshot", self._snapshot

    def load(self, state: dict[str, Any]) -> None:
        """Begin again what was under way. Collective."""
        super().load(state)
        if self._under_way is not None:
            self._under_way.wait()
            self._under_way = None
        if "snapshot" in state:
            kernels.assign(self._snapshot, state["snapshot"])
            self._begin()
