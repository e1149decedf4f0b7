"""AGN: accumulated gradient normalisation, DOWNPOUR that divides each commit by its number of local steps.

    tau times    x <- x - eta*g(x)
    then         c <- c + (x - o)/tau;   x, o <- c          o: the values of the last pull

The workers explore for tau steps and move the center by the mean of these steps: with more workers or a longer period
the center does not overshoot as DOWNPOUR's does. p workers that commit in turn are stable on a quadratic of any
curvature (eta*h <= 1) if tau >= 1/(2 sin(pi/(2(2p-1)))), about 0.64 p; the papers' rule of thumb is tau = (p + number
of layers)/2.

Source: Hermans, Spanakis, Moeckel, Accumulated gradient normalization, 2017, https://arxiv.org/abs/1710.02368; Hermans'
thesis, CERN-THESIS-2017-103 (tau is called lambda there; the class that dist-keras calls ADAG is this method).

Deviations: ``normalise="gradient"`` commits the mean of the steps that plain SGD would have made with the same
gradients. With any other local optimizer this is a different algorithm: the worker explores with that optimizer, while
the center makes plain SGD steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from mpitrain import kernels
from mpitrain.algorithms.base.clipping import Clip
from mpitrain.algorithms.base.replica import ParamGroupSlice, Replica
from mpitrain.algorithms.base.settings import choice, integer
from mpitrain.algorithms.parameter_server.center import CenterMethod, CenterWorker
from mpitrain.algorithms.parameter_server.commit import CommitRule, Displacement
from mpitrain.collectives.rma.shared_vector import SharedVector
from mpitrain.kernels import norms
from mpitrain.theory import agn_warning


@dataclass(frozen=True)
class AGN(CenterMethod):
    """DOWNPOUR with commits that are divided by the number of local steps.

    It suits many workers and long periods.

    Args:
        period: The number tau of local steps between two exchanges; 10 to 40 in the papers.
        normalise: ``displacement`` to commit the mean of the local optimizer's steps, ``gradient`` to commit the mean
            of the steps that plain SGD would make.
    """

    period: int = integer(15, "tau, local steps between exchanges", low=1)
    normalise: str = choice("displacement", "the mean of what is committed", ("displacement", "gradient"))

    name: ClassVar[str] = "agn"
    summary: ClassVar[str] = "DOWNPOUR that commits the mean of its local steps instead of their sum"
    source: ClassVar[str] = "Hermans, Spanakis, Moeckel 2017, arXiv 1710.02368"
    short_run: ClassVar[Mapping[str, Any]] = MappingProxyType({"period": 5})

    @property
    def needs_gradient(self) -> bool:  # type: ignore[override]
        """Whether the method uses the gradient itself: if ``normalise`` is ``gradient``, it accumulates gradients."""
        return self.normalise == "gradient"

    def warnings(self, size: int, learning_rate: float) -> Iterator[str]:
        """Yield a warning about a period that is too short for the number of workers."""
        text = agn_warning(size, self.period)
        if text is not None:
            yield text

    def worker(self, replica: Replica) -> CenterWorker:
        """Make a worker. Collective."""
        if self.normalise == "displacement":
            return CenterWorker(self, replica, Displacement(replica.x.local, inverse_steps))
        return MeanGradientWorker(self, replica, AccumulatedSteps(replica.x.local))


def inverse_steps(shared: SharedVector, steps: int) -> float:
    """Return 1/``steps``. The number of local steps is tau, except at the last commit of a run."""
    return 1 / max(steps, 1)


class AccumulatedSteps(CommitRule):
    """The rule that commits v = -sum eta*g, summed since the last pull.

    Args:
        x: (n,) the model's parameters.

    Attributes:
        accumulated: (n,) v.
    """

    persistent: ClassVar[tuple[str, ...]] = ("accumulated",)

    def __init__(self, x: Any) -> None:
        self._x, self.accumulated = x, np.zeros_like(x)

    def limit(self, part: slice, clip: Clip, radius: float) -> None:
        """Scale v so that ||v|| <= radius."""
        v = self.accumulated[part]
        if (factor := clip.factor(norms.norm(v), radius)) < 1:
            v *= factor

    def __call__(self, part: slice, c: Any, shared: SharedVector, steps: int) -> int:
        """Compute c <- c + v/tau;  x <- c;  v <- 0"""
        return kernels.commit_gathered(self._x[part], self.accumulated[part], c, inverse_steps(shared, steps))


class MeanGradientWorker(CenterWorker):
    """A worker that accumulates the steps of plain SGD, whatever its local optimizer is.

    Args:
        method: The hyper-parameters.
        replica: The vectors and the communicator to work with.
        rule: The rule, which holds the accumulated steps.
    """

    def __init__(self, method: AGN, replica: Replica, rule: AccumulatedSteps) -> None:
        super().__init__(method, replica, rule)
        self._accumulated = rule.accumulated
        self._accumulate(ParamGroupSlice(slice(0, 0), 0.0))  # compiled before the first step

    def step(
        self,
        group_slices: Sequence[ParamGroupSlice],
        local_update: Callable[[], object] | None,
        loss: float | None = None,
        *,
        skips: bool = False,
        is_combined: bool = False,
    ) -> bool:
        """Accumulate the gradient, then make the step."""
        for group_slice in () if skips else group_slices:
            self._accumulate(group_slice)
        return super().step(group_slices, local_update, loss, skips=skips, is_combined=is_combined)

    def _accumulate(self, group_slice: ParamGroupSlice) -> None:
        """Compute v <- v - eta*(g + decay*x)"""
        part, eta, decay = group_slice.part, group_slice.learning_rate, group_slice.weight_decay
        kernels.gather_step(self._accumulated[part], self.g.local[part], self.x.local[part], eta, decay)
