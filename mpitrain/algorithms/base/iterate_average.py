"""A running average of the iterates of any method: it is evaluated in their place and never fed back.

    z <- (1 - a_t)*z + a_t*x_t      a_t = 1/t   (Polyak: z_t is the mean of x_1, ..., x_t)
                                    a_t = a     (moving average)

With SGD on one worker these are the ASGD and MVASGD of Zhang's comparisons. The variance of the mean of the iterates
does not depend on the learning rate, so the learning rate may stay large.

Source: Polyak, Juditsky, Acceleration of stochastic approximation by averaging, 1992; Ruppert 1988; as run by Zhang,
Choromanska, LeCun, Deep learning with Elastic Averaging SGD, 2015, https://arxiv.org/abs/1412.6651, section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mpitrain import kernels
from mpitrain.algorithms.base.evaluation import mean_of_workers
from mpitrain.algorithms.base.method import LEAST_PERIODS
from mpitrain.algorithms.base.peers import alive_ranks
from mpitrain.algorithms.base.replica import ParamGroupSlice, Replica
from mpitrain.algorithms.base.rescaling import Parts, mean_of_parts, merge
from mpitrain.algorithms.base.state import Common
from mpitrain.algorithms.base.worker import Worker
from mpitrain.errors import UsageError, unknown

KINDS = ("polyak", "moving")
SOURCES = ("workers", "consensus")
DEFAULT_RATE = 0.001
"""The rate of the moving average; the value of Zhang, Choromanska and LeCun for MVADOWNPOUR."""


@dataclass(frozen=True)
class Average:
    """The settings of a running average of the iterates.

    Args:
        kind: ``polyak`` for the mean of all iterates, ``moving`` for an exponential moving average.
        rate: The rate a of the moving average, whose memory is about 1/a steps.
        source: With ``workers``, every worker averages its own parameters, and the mean of these averages is evaluated.
            This costs one pass over the vector per step. With ``consensus``, the first living worker averages the
            consensus at each of its own steps. This costs a read of the center, or of all workers in a gossip method.

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
            raise UsageError(f"average: {unknown('kind', self.kind, KINDS)}")
        if self.source not in SOURCES:
            raise UsageError(f"average: {unknown('source', self.source, SOURCES)}")
        if not 0 < self.rate <= 1:
            raise UsageError(f"average: rate must be a number > 0 and <= 1, not {self.rate!r}")

    @classmethod
    def parse(cls, text: str) -> Average:
        """Parse the value of ``--average``: ``KIND[:RATE][:consensus]``.

        Raises:
            UsageError: The text does not have this form.
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
            raise UsageError(
                f"--average must be polyak, moving or moving:RATE, optionally followed by :consensus, not {text!r}"
            )
        return cls(kind, rate, source)

    def rate_at(self, t: int) -> float:
        """Return the rate a_t of step t = 1, 2, ..."""
        return 1.0 / t if self.kind == "polyak" else self.rate

    def budget_warnings(self, steps: float) -> Iterator[str]:
        """Yield a warning if the moving average is too slow for a run of ``steps`` local steps."""
        if self.kind == "moving" and steps * self.rate < LEAST_PERIODS:
            rate = min(LEAST_PERIODS / max(steps, 1), 1)
            yield (
                f"average: in {steps:.0f} steps a moving average with rate {self.rate:g} keeps "
                f"{(1 - self.rate) ** steps:.0%} of the initial parameters: use moving:{rate:.2g} or more"
            )

    def wrap(self, worker: Worker, replica: Replica) -> Worker:
        """Return a worker that makes the steps of ``worker`` and updates the average. Collective."""
        return AveragedWorker(self, worker, replica)


class AveragedWorker(Worker):
    """A worker that wraps the worker of any method and updates the running average z.

    Args:
        average: The settings of the average.
        worker: The worker of the method.
        replica: The replica with which the worker was created.
    """

    persistent: ClassVar[tuple[str, ...]] = ("_worker", Common("_average_of_iterates"))

    def __init__(self, average: Average, worker: Worker, replica: Replica) -> None:
        super().__init__(replica)
        self._average, self._worker = average, worker
        self._first = 0
        x = self.x.local
        self._average_of_iterates = self.comm.vector(x.size, kernels.accumulator(x.dtype))
        self._evaluated = np.zeros_like(x) if average.source == "consensus" else None
        self._average_of_iterates.local[...] = x
        kernels.elastic_pull(self._average_of_iterates.local[:0], x[:0], 1.0)  # compiled before the first step
        self.comm.barrier()

    def step(
        self,
        group_slices: Sequence[ParamGroupSlice],
        local_update: Callable[[], object] | None,
        loss: float | None = None,
        *,
        skips: bool = False,
        is_combined: bool = False,
    ) -> bool:
        """Make the method's step, then compute z <- (1 - a)*z + a*x; non-finite elements of x are left out."""
        found_nonfinite = self._worker.step(group_slices, local_update, loss, skips=skips, is_combined=is_combined)
        self.skips = self._worker.skips
        self.t = self._worker.t
        source = self.x.local
        if self._evaluated is not None:
            if self.comm.rank != self._averager():
                return found_nonfinite
            self._worker.consensus(self._evaluated)
            source = self._evaluated
        kernels.elastic_pull(self._average_of_iterates.local, source, self._average.rate_at(self.t))
        return found_nonfinite

    def clip_gradients(
        self,
        group_slices: Sequence[ParamGroupSlice],
        max_norm: float,
        order: float,
        *,
        skips: bool = False,
        is_combined: bool = False,
    ) -> float:
        """Call the same method of the worker that this object wraps."""
        norm = self._worker.clip_gradients(group_slices, max_norm, order, skips=skips, is_combined=is_combined)
        self.skips = self._worker.skips
        return norm

    def _averager(self) -> int:
        """Return the worker that averages the consensus, the first alive one; it takes over from one that has died."""
        first = alive_ranks(self.comm)[0]
        if self.comm.rank == first != self._first:
            own = self._average_of_iterates.local
            self.comm.read(self._average_of_iterates, self._first, lambda z: kernels.copy(own, z))
        self._first = first
        return first

    def gradient_ready(self, layer: int) -> bool:
        """Call the same method of the worker that this object wraps."""
        return self._worker.gradient_ready(layer)

    def begin_ready(self) -> None:
        """Call the same method of the worker that this object wraps."""
        self._worker.begin_ready()

    def gradient_complete(self) -> None:
        """Call the same method of the worker that this object wraps."""
        self._worker.gradient_complete()

    def consensus(self, out: Any) -> None:
        """Write the mean of all workers' averages or, if ``source`` is the consensus, the only average. Local."""
        if self._evaluated is not None:
            self.comm.read(self._average_of_iterates, alive_ranks(self.comm)[0], lambda z: kernels.copy(out, z))
            return
        mean_of_workers(self.comm, self._average_of_iterates, out)

    def wait(self) -> None:
        """Wait for the method's background operations. Local."""
        self._worker.wait()

    def finalize(self, group_slices: Sequence[ParamGroupSlice] = ()) -> None:
        """Make the same call to the method's worker. Collective for synchronous methods, else Local."""
        self._worker.finalize(group_slices)

    def merge(self, parts: Parts) -> Iterator[tuple[str, Any]]:
        """Yield the entries for a different number of workers: those of the method, and the average. Local."""
        yield from merge(self._worker, parts)
        name, evaluated = "average_of_iterates", parts if self._evaluated is None else parts[:1]
        yield name, mean_of_parts((part[name], 1.0) for part in evaluated)

    def metrics(self) -> dict[str, float]:
        """Return the method's metrics. Local."""
        return self._worker.metrics()
