"""AGN: accumulated gradient normalisation, DOWNPOUR that divides what it commits by the number of its local steps.

    tau times    x <- x - eta*g(x)
    then         c <- c + (x - o)/tau;   x, o <- c          o: what was pulled last

The workers explore tau steps far and move the center by the mean of these steps: with more workers and a longer period
the center does not overshoot as DOWNPOUR's does. Served in turn, p workers are stable on a quadratic whatever its
curvature (eta*h <= 1) once tau >= 1/(2 sin(pi/(2(2p-1)))), about 0.64 p; the papers' rule of thumb is
tau = (p + number of layers)/2.

Source: Hermans, Spanakis, Moeckel, Accumulated gradient normalization, 2017, https://arxiv.org/abs/1710.02368; Hermans'
thesis, CERN-THESIS-2017-103 (tau is called lambda there; the class that dist-keras calls ADAG is this method).

Deviations: ``normalise="gradient"`` commits the mean of the steps that plain SGD would have made with the same
gradients. With a local optimizer that is not plain SGD this is another algorithm: the worker explores with that
optimizer, while the center makes plain SGD steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from mpitrain import kernels
from mpitrain.algorithms.base.method import ParamGroupSlice, Replica, setting
from mpitrain.algorithms.parameter_server.center import CenterMethod, CenterWorker, DisplacementWorker
from mpitrain.theory import agn_warning


@dataclass(frozen=True)
class AGN(CenterMethod):
    """DOWNPOUR for many workers and long periods: what a worker commits does not grow with its local steps.

    Args:
        period: tau, local steps between two exchanges; 10 to 40 in the papers.
        normalise: ``displacement``: commit the mean of the local optimizer's steps; ``gradient``: of plain SGD's.
    """

    period: int = setting(15, "tau, local steps between exchanges", low=1)
    normalise: str = setting("displacement", "the mean of what is committed", choices=("displacement", "gradient"))

    name: ClassVar[str] = "agn"
    summary: ClassVar[str] = "DOWNPOUR that commits the mean of its local steps instead of their sum"
    source: ClassVar[str] = "Hermans, Spanakis, Moeckel 2017, arXiv 1710.02368"
    short_run: ClassVar[Mapping[str, Any]] = MappingProxyType({"period": 5})

    @property
    def needs_gradient(self) -> bool:  # type: ignore[override]
        """To gather it."""
        return self.normalise == "gradient"

    def warnings(self, size: int, learning_rate: float) -> Iterator[str]:
        """Periods too short for so many workers."""
        text = agn_warning(size, self.period)
        if text is not None:
            yield text

    def worker(self, replica: Replica) -> CenterWorker:
        """Collective."""
        return (MeanStepWorker if self.normalise == "displacement" else MeanGradientWorker)(self, replica)


class MeanStepWorker(DisplacementWorker):
    """Divides its displacement by the number of local steps, which is smaller than tau at the end of a run."""

    def commit_rate(self) -> float:
        """1/tau"""
        return 1 / max(self._steps, 1)


class MeanGradientWorker(CenterWorker):
    """v = -sum eta*g since the last pull, beside local steps of any kind."""

    def __init__(self, method: AGN, replica: Replica) -> None:
        self._v = np.zeros_like(replica.x.local)
        super().__init__(method, replica)
        self._gather(ParamGroupSlice(slice(0, 0), 0.0))  # compiled before the first step

    def step(
        self,
        group_slices: Sequence[ParamGroupSlice],
        local_update: Callable[[], object] | None,
        loss: float | None = None,
    ) -> bool:
        """Gather the gradient at x before the local step moves it."""
        for group_slice in group_slices:
            self._gather(group_slice)
        return super().step(group_slices, local_update, loss)

    def _gather(self, group_slice: ParamGroupSlice) -> None:
        part = group_slice.part
        kernels.gather_step(
            self._v[part], self.g.local[part], self.x.local[part], group_slice.learning_rate, group_slice.weight_decay
        )

    def visit(self, part: slice, c: Any) -> int:
        """c <- c + v/tau;  x <- c;  v <- 0"""
        return kernels.commit_gathered(self.x.local[part], self._v[part], c, 1 / max(self._steps, 1))

    def state(self) -> Iterator[tuple[str, Any]]:
        """The clock, what is gathered, and the center."""
        yield from super().state()
        yield "gathered", self._v

    def load(self, state: dict[str, Any]) -> None:
        """Collective."""
        kernels.assign(self._v, state["gathered"])
        super().load(state)
