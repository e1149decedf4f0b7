"""A running average of the iterates, beside any method: evaluated instead of them, and never fed back.

    z <- (1 - a_t)*z + a_t*x_t      a_t = 1/t   (Polyak: z_t is the mean of x_1, ..., x_t)
                                    a_t = a     (moving average)

The two are the ASGD and MVASGD of Zhang's comparisons when the method is SGD on one worker. The mean of the iterates
has a variance that does not depend on the learning rate, so the steps may stay long.

Source: Polyak, Juditsky, Acceleration of stochastic approximation by averaging, 1992; Ruppert 1988; as run by Zhang,
Choromanska, LeCun, Deep learning with Elastic Averaging SGD, 2015, https://arxiv.org/abs/1412.6651, section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpitrain import kernels
from mpitrain.algorithms.base.evaluation import mean_of_workers
from mpitrain.algorithms.base.method import ParamGroupSlice, Replica, Worker
from mpitrain.algorithms.base.peers import alive_ranks
from mpitrain.errors import UsageError

KINDS = ("polyak", "moving")
SOURCES = ("workers", "consensus")
DEFAULT_RATE = 0.001
"""Of the moving average; that of Zhang, Choromanska and LeCun for MVADOWNPOUR."""


@dataclass(frozen=True)
class Average:
    """What to average, and how.

    Args:
        kind: ``polyak``: the mean of all iterates; ``moving``: an exponential moving average.
        rate: a, of the moving average; its memory is about 1/a steps.
        source: ``workers``: every worker averages its own parameters, and their mean is evaluated: one pass over the
            vector a step. ``consensus``: worker 0, or the first that lives, averages what the method evaluates, once
            each of its steps: for a center that is a read of all its shards, for gossip one of all workers.

    Example:
        >>> Average("moving", 0.01).rate_at(7)
        0.01
        >>> Average().rate_at(4)
        0.25
    """

    kind: str = "polyak"
    rate: float = DEFAULT_RATE
    source: str = "workers"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"average: kind must be one of {', '.join(KINDS)}, not {self.kind!r}")
        if self.source not in SOURCES:
            raise UsageError(f"average: source must be one of {', '.join(SOURCES)}, not {self.source!r}")
        if not 0 < self.rate <= 1:
            raise UsageError(f"average: rate must be a number > 0 and <= 1, not {self.rate!r}")

    @classmethod
    def parse(cls, text: str) -> Average:
        """``polyak`` or ``moving``, then perhaps ``:RATE`` and ``:consensus``, as the command line gives it.

        Raises:
            UsageError: With what is wrong.
        """
        kind, *rest = text.split(":")
        source = SOURCES[0]
        if rest and rest[-1] in SOURCES:
            source = rest.pop()
        try:
            rate = float(rest.pop()) if rest and kind == "moving" else DEFAULT_RATE
        except ValueError:
            rest = [text]
        if rest:
            raise UsageError(f"--average must be polyak, moving or moving:RATE, perhaps with :consensus, not {text!r}")
        return cls(kind, rate, source)

    def rate_at(self, t: int) -> float:
        """a_t of step t = 1, 2, ..."""
        return 1.0 / t if self.kind == "polyak" else self.rate

    def wrap(self, worker: Worker, replica: Replica) -> Worker:
        """The worker, with an average beside it. Collective."""
        return AveragedWorker(self, worker, replica)


class AveragedWorker(Worker):
    """A worker of any method and its average z.

    Args:
        average: What to average.
        worker: Of the method; it never learns of the average.
        replica: What it works on.
    """

    def __init__(self, average: Average, worker: Worker, replica: Replica) -> None:
        super().__init__(replica)
        self._average, self._worker = average, worker
        self._first = 0
        x = self.x.local
        self._z = self.comm.vector(x.size, kernels.accumulator(x.dtype))
        self._evaluated = np.zeros_like(x) if average.source == "consensus" else None
        self._z.local[...] = x
        kernels.elastic_pull(self._z.local[:0], x[:0], 1.0)  # compiled before the first step
        self.comm.barrier()

    def step(
        self,
        group_slices: Sequence[ParamGroupSlice],
        local_update: Callable[[], object] | None,
        loss: float | None = None,
    ) -> bool:
        """The method's step, then z <- (1 - a)*z + a*x; what is not finite is left out of it."""
        found_nonfinite = self._worker.step(group_slices, local_update, loss)
        self.t = self._worker.t
        source = self.x.local
        if self._evaluated is not None:
            if self.comm.rank != self._averager():
                return found_nonfinite
            self._worker.consensus(self._evaluated)
            source = self._evaluated
        kernels.elastic_pull(self._z.local, source, self._average.rate_at(self.t))
        return found_nonfinite

    def _averager(self) -> int:
        """Who averages what the method evaluates: the first that lives. It goes on from what the dead one had."""
        first = alive_ranks(self.comm)[0]
        if self.comm.rank == first != self._first:
            self.comm.read(self._z, self._first, lambda z: kernels.copy(self._z.local, z))
        self._first = first
        return first

    def gradient_ready(self, layer: int) -> bool:
        """The method's."""
        return self._worker.gradient_ready(layer)

    def begin_ready(self) -> None:
        """The method's."""
        self._worker.begin_ready()

    def gradient_complete(self) -> None:
        """The method's."""
        self._worker.gradient_complete()

    def consensus(self, out: Any) -> None:
        """The average: the mean of all workers', or that of the first that lives. Local."""
        if self._evaluated is not None:
            self.comm.read(self._z, alive_ranks(self.comm)[0], lambda z: kernels.copy(out, z))
            return
        mean_of_workers(self.comm, self._z, out)

    def wait(self) -> None:
        """The method's."""
        self._worker.wait()

    def finalize(self) -> None:
        """The method's."""
        self._worker.finalize()

    def metrics(self) -> dict[str, float]:
        """The method's."""
        return self._worker.metrics()

    def state(self) -> Iterator[tuple[str, Any]]:
        """The method's, and z."""
        yield from self._worker.state()
        yield "average_of_iterates", self._z.local

    def load(self, state: dict[str, Any]) -> None:
        """Collective."""
        self._worker.load(state)
        self.t = self._worker.t
        kernels.assign(self._z.local, state["average_of_iterates"])
        self.comm.barrier()
