"""DaSGD: local SGD with delayed averages, for which no worker waits.

    after every tau-th step:   s_i <- x_i, and an all-reduce of the s_i starts in the background
    d steps later:             x_i <- x_i + (mean_j s_j - s_i)

The corrections sum to zero over the workers. Whatever the delay is, the mean of all x_i therefore moves only by the
mean of the workers' gradient steps. d = 0 is local SGD. If d steps take longer than an all-reduce, communication costs
no time.

Source: Zhou et al., DaSGD: Squeezing SGD parallelization performance in distributed training using delayed averaging,
2020, https://arxiv.org/abs/2006.00441. The abstract gives the idea; the form of the correction is our reading.

Deviations: the local update is any torch optimizer's, whose state stays local. A correction that is not finite, because
some worker's snapshot was not, is left out. A checkpoint taken during an all-reduce holds the snapshot, and the
all-reduce is repeated when the run is continued. The default periods are ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mpitrain import kernels
from mpitrain.algorithms.base.evaluation import mean_of_workers
from mpitrain.algorithms.base.method import Method
from mpitrain.algorithms.base.replica import Replica
from mpitrain.algorithms.base.settings import integer
from mpitrain.algorithms.base.state import State
from mpitrain.algorithms.base.worker import PeriodicWorker
from mpitrain.collectives.communicator import Communicator, Pending


@dataclass(frozen=True)
class DaSGD(Method):
    """Local SGD for slow networks: the average is computed while the workers continue, and applied later.

    Args:
        period: The number tau of local steps between the starts of two averages.
        delay: The number d of local steps that an average may take. Since there is only one all-reduce at a time, d is
            limited to tau-1.
    """

    period: int = integer(8, "tau, local steps between two averages", low=1)
    delay: int = integer(1, "d, local steps until an average arrives, at most tau-1", low=0)

    name: ClassVar[str] = "dasgd"
    summary: ClassVar[str] = "local SGD whose averages are made in the background and arrive late"
    source: ClassVar[str] = "Zhou et al. 2020, arXiv 2006.00441"
    communication: ClassVar[str] = "2(p-1)/(p*tau), while the worker computes"
    needs_gradient: ClassVar[bool] = False
    grad_point: ClassVar[str] = "post"

    @property
    def steps_late(self) -> int:
        """The delay d, limited so that an average arrives before the next one starts."""
        return min(self.delay, self.period - 1)

    def warnings(self, size: int, learning_rate: float) -> Iterator[str]:
        """Yield a warning if the delay is larger than tau-1 and therefore limited."""
        if self.delay > self.steps_late:
            yield f"delay={self.delay} is cut to {self.steps_late}: it must be below period={self.period}"

    def exchanges_after(self, worker: Any) -> bool:
        """Return whether an average starts or arrives after the step. Local."""
        return (worker.t + 1) % self.period in (0, self.steps_late)

    def worker(self, replica: Replica) -> DaSGDWorker:
        """Make a worker. Collective."""
        return DaSGDWorker(self, replica)


class DaSGDWorker(PeriodicWorker):
    """A worker whose averages are computed in the background; the model holds x_i."""

    persistent: ClassVar[tuple[str, ...]] = ("_delayed",)

    def __init__(self, method: DaSGD, replica: Replica) -> None:
        super().__init__(method, replica)
        self._delayed = DelayedAverage(self.comm, self.x.local)

    def after_update(self) -> None:
        """Start an average when it is due, and apply it d steps later."""
        super().after_update()
        if self._delayed.started is not None and (self.t + 1) % self._method.period == self._method.steps_late:
            self._delayed.correct(self.x.local)

    def exchange(self) -> None:
        """Copy s_i <- x_i, and start the all-reduce. Collective."""
        self._delayed.start(self.x.local)

    def exchange_remaining(self) -> None:
        """Apply the average that is under way. The consensus, which is the mean of all workers, does not change."""
        if self._delayed.started is not None:
            self._delayed.correct(self.x.local)

    def consensus(self, out: Any) -> None:
        """Write the mean of all workers' present parameters. Local; exact while no worker makes a step."""
        mean_of_workers(self.comm, self.x, out)


class DelayedAverage:
    """The snapshot s_i of this worker, and the mean of all snapshots. Collective to create.

    Args:
        comm: The communicator of the workers.
        x: (n,) a vector of the size and type of the snapshots.

    Attributes:
        started: The all-reduce under way; None if there is none.
    """

    def __init__(self, comm: Communicator, x: Any) -> None:
        self._comm = comm
        self._mean = comm.vector(x.size, x.dtype)
        self._snapshot = np.zeros_like(x)
        self.started: Pending | None = None
        kernels.delayed_correction(x[:0], x[:0].copy(), self._mean.local[:0])  # compiled before the first

    def start(self, x: Any) -> None:
        """Copy s_i <- x_i, and start the all-reduce. Collective."""
        self._snapshot[...] = x
        self._start()

    def correct(self, x: Any) -> None:
        """Wait for the all-reduce, then compute x_i <- x_i + (mean_j s_j - s_i). Collective."""
        assert self.started is not None
        self.started.wait()
        self.started = None
        self._comm.statistics.n_nonfinite += kernels.delayed_correction(x, self._snapshot, self._mean.local)

    def _start(self) -> None:
        # The vector must be left alone until the end; the snapshot is this worker's own copy.
        self._mean.local[...] = self._snapshot
        self.started = self._comm.start_allreduce(self._mean, mean=True)

    def state(self) -> Iterator[tuple[str, Any]]:
        """Yield the snapshot if its average is under way. Local; the all-reduce continues."""
        if self.started is not None:
            yield "snapshot", self._snapshot

    def load(self, state: State) -> None:
        """Start the all-reduce again if one was under way. Collective."""
        if self.started is not None:
            self.started.wait()
            self.started = None
        if "snapshot" in state:
            kernels.assign(self._snapshot, state["snapshot"])
            self._start()
