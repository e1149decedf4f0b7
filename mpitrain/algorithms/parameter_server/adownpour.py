"""ADOWNPOUR and MVADOWNPOUR: DOWNPOUR that evaluates a running average at the parameter server.

    c <- c + d                            a commit, as in DOWNPOUR
    z <- (1-a_t)*z + a_t*c                at every commit t = 0, 1, ...;  z_0 = c_0

    ADOWNPOUR     a_t = 1/(t+1): z is the mean of all centers since the first commit
    MVADOWNPOUR   a_t = a, a constant: a moving average, in which c_0 keeps the weight (1-a)^t

z is never fed back: c and the workers equal DOWNPOUR's bit for bit.

Source: Zhang, Choromanska, LeCun, Deep learning with Elastic Averaging SGD, 2015, https://arxiv.org/abs/1412.6651,
section 5.

A run should have a few times 1/a commits: with fewer, MVADOWNPOUR evaluates mostly c_0, by its definition.

Deviations: each shard of the center has its own clock t.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from mpitrain import kernels
from mpitrain.algorithms.base.method import Interval, Method
from mpitrain.algorithms.base.replica import Replica
from mpitrain.algorithms.base.settings import integer, number
from mpitrain.algorithms.parameter_server.center import DOWNPOUR_RATE, CenterWorker
from mpitrain.algorithms.parameter_server.commit import Displacement
from mpitrain.collectives.rma.shared_vector import SharedVector
from mpitrain.theory import downpour_warning

CLOCK = 0
"""The tag that counts the commits of a shard."""


@dataclass(frozen=True)
class AveragedDownpour(Method):
    """The common settings of ADownpour and MVADownpour.

    Args:
        period: The number tau of local steps between two exchanges.
    """

    period: int = integer(1, "tau, local steps between exchanges", low=1)

    source: ClassVar[str] = "Zhang, Choromanska, LeCun 2015, arXiv 1412.6651"
    communication: ClassVar[str] = "2/tau (commit and pull); between nodes 4/tau, as the average travels along"
    starts_at: ClassVar[str | None] = "center"
    averages_optimizer: ClassVar[bool] = False
    goes_on: ClassVar[str] = "center, its average and the count of commits"
    begins_anew: ClassVar[str] = "steps not committed; optimizer states"
    needs_gradient: ClassVar[bool] = False
    evaluates_history: ClassVar[bool] = True
    learning_rate_factor: ClassVar[float] = DOWNPOUR_RATE
    metrics: ClassVar[tuple[str, ...]] = ("staleness",)

    @property
    def is_synchronous(self) -> bool:
        """False: no worker waits for another."""
        return False

    @abstractmethod
    def averaging_rate(self, t: float) -> float:
        """Return the averaging rate a_t for a shard with t commits."""

    def warnings(self, size: int, learning_rate: float) -> Iterator[str]:
        """Yield a line for settings outside DOWNPOUR's region of stability."""
        text = downpour_warning(size, self.period)
        if text is not None:
            yield text

    def worker(self, replica: Replica) -> CenterWorker:
        """Make a worker. Collective."""
        return CenterWorker(self, replica, AveragedDisplacement(replica.x.local, self))


@dataclass(frozen=True)
class ADownpour(AveragedDownpour):
    """DOWNPOUR that evaluates the mean of all its centers so far.

    The mean has less noise than the center, but a long memory of the start. The arguments are those of
    ``AveragedDownpour``.
    """

    name: ClassVar[str] = "adownpour"
    summary: ClassVar[str] = "DOWNPOUR that evaluates the mean of all its centers"

    def averaging_rate(self, t: float) -> float:
        """Return 1/(t+1)."""
        return 1 / (t + 1)


@dataclass(frozen=True)
class MVADownpour(AveragedDownpour):
    """DOWNPOUR that evaluates a moving average of its centers.

    Args:
        rate: The averaging rate a; the memory of the average is about 1/a commits.

    The other arguments are those of ``AveragedDownpour``.
    """

    rate: float = number(0.001, "a, of the moving average", above=0, high=1)

    name: ClassVar[str] = "mvadownpour"
    summary: ClassVar[str] = "DOWNPOUR that evaluates a moving average of its center"
    short_run: ClassVar[Mapping[str, Any]] = MappingProxyType({"rate": 0.01})

    def interval(self, size: int) -> Interval:
        """Return the number of local steps of a worker in which all workers together make 1/a commits."""
        return Interval(
            self.period / (self.rate * size),
            "rate",
            lambda steps: f"{min(self.period / (max(steps, 1) * size), 1):.2g} or more",
        )

    def averaging_rate(self, t: float) -> float:
        """Return a."""
        return self.rate


class AveragedDisplacement(Displacement):
    """The rule that commits a displacement, and updates the average under the same lock.

    Args:
        x: (n,) the model's parameters.
        method: The hyper-parameters.
    """

    rows: ClassVar[tuple[str, ...]] = ("center", "average")
    evaluated_row: ClassVar[int] = 1
    tags: ClassVar[str | None] = "clocks"

    def __init__(self, x: Any, method: AveragedDownpour) -> None:
        super().__init__(x)
        self._averaging_rate = method.averaging_rate

    def __call__(self, part: slice, c: Any, shared: SharedVector, steps: int) -> int:
        """Compute c <- c + (x - o);  x, o <- c;  z <- (1-a_t)*z + a_t*c"""
        rate = self._averaging_rate(shared.tags[CLOCK])
        shared.tags[CLOCK] += 1
        return kernels.commit_averaged(self.x[part], self.origin[part], c[0], c[1], rate)
