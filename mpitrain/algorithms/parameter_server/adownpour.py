"""ADOWNPOUR and MVADOWNPOUR: DOWNPOUR with a running average at the parameter server, which is evaluated.

    c <- c + d                            a commit, as in DOWNPOUR
    z <- (1-a_t)*z + a_t*c                at every commit t = 0, 1, ...;  z_0 = c_0

    ADOWNPOUR     a_t = 1/(t+1): z is the mean of all centers since the first commit
    MVADOWNPOUR   a_t = a, a constant: a moving average, which c_0 leaves only slowly, by (1-a)^t

z is never fed back: c and the workers are DOWNPOUR's to the bit.

Source: Zhang, Choromanska, LeCun, Deep learning with Elastic Averaging SGD, 2015, https://arxiv.org/abs/1412.6651,
section 5.

Deviations: each shard of the center has a clock t of its own.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from mpitrain import kernels
from mpitrain.algorithms.base.method import Replica, setting
from mpitrain.algorithms.base.peers import saves_shared_state
from mpitrain.algorithms.parameter_server.center import DOWNPOUR_RATE, CenterMethod, DisplacementWorker
from mpitrain.theory import downpour_warning

CLOCK = 0
"""The tag of a shard that counts its commits."""


@dataclass(frozen=True)
class AveragedDownpour(CenterMethod):
    """Hyper-parameters of both.

    Args:
        period: tau, local steps between two exchanges.
    """

    period: int = setting(1, "tau, local steps between exchanges", low=1)

    source: ClassVar[str] = "Zhang, Choromanska, LeCun 2015, arXiv 1412.6651"
    communication: ClassVar[str] = "2/tau (commit and pull); between nodes 4/tau, as the average travels along"
    needs_gradient: ClassVar[bool] = False
    evaluates_history: ClassVar[bool] = True
    learning_rate_factor: ClassVar[float] = DOWNPOUR_RATE

    @abstractmethod
    def averaging_rate(self, t: float) -> float:
        """a_t, of a shard that has seen t commits."""

    def warnings(self, size: int, learning_rate: float) -> Iterator[str]:
        """Settings outside DOWNPOUR's bound."""
        text = downpour_warning(size, self.period)
        if text is not None:
            yield text

    def worker(self, replica: Replica) -> AveragingWorker:
        """Collective."""
        return AveragingWorker(self, replica)


@dataclass(frozen=True)
class ADownpour(AveragedDownpour):
    """DOWNPOUR whose result is the mean of all centers so far: less noise, and a long memory of the beginning.

    The arguments are ``AveragedDownpour``'s.
    """

    name: ClassVar[str] = "adownpour"
    summary: ClassVar[str] = "DOWNPOUR that evaluates the mean of all its centers"

    def averaging_rate(self, t: float) -> float:
        """1/(t+1)"""
        return 1 / (t + 1)


@dataclass(frozen=True)
class MVADownpour(AveragedDownpour):
    """DOWNPOUR whose result is a moving average of its centers.

    Args:
        rate: a; the average remembers about 1/a commits.

    The other arguments are ``AveragedDownpour``'s.
    """

    rate: float = setting(0.001, "a, of the moving average", above=0, high=1)

    name: ClassVar[str] = "mvadownpour"
    summary: ClassVar[str] = "DOWNPOUR that evaluates a moving average of its center"
    short_run: ClassVar[Mapping[str, Any]] = MappingProxyType({"rate": 0.01})

    def averaging_rate(self, t: float) -> float:
        """a"""
        return self.rate


class AveragingWorker(DisplacementWorker):
    """The average lies beside the center and is changed under the same locks."""

    rows: ClassVar[tuple[str, ...]] = ("center", "average")

    def visit(self, part: slice, c: Any) -> int:
        """c <- c + (x - o);  x, o <- c;  z <- (1-a_t)*z + a_t*c"""
        tags = self._center.tags
        rate = self._method.averaging_rate(tags[CLOCK])
        tags[CLOCK] += 1
        return kernels.commit_averaged(self.x.local[part], self._origin[part], c[0], c[1], rate)

    def consensus(self, out: Any) -> None:
        """The average. Local."""
        self._center.read(out, self.rows.index("average"))

    def state(self) -> Iterator[tuple[str, Any]]:
        """DOWNPOUR's, with the average and the shards' clocks."""
        yield from super().state()
        if saves_shared_state(self.comm):
            yield "clocks", self._center.read_tags()

    def load(self, state: dict[str, Any]) -> None:
        """Collective."""
        if self.comm.rank == 0:
            self._center.write_tags(state["clocks"])
        super().load(state)
