"""ADAG: a commit is damped, element by element, where the center has moved since its worker's last pull.

    D = (x - o)/tau                            AGN's commit, or x - o
    c <- c + D / ((c - o)^2/gamma + 1)         element by element

The staleness is a distance here, c - o, not a count: if the center has not moved since the pull, the commit passes in
full, and with one worker this is AGN. gamma -> infinity is AGN, too; gamma -> 0 stops every coordinate that has moved.

``placement`` says where the factor is computed:

    A  the worker sends D and o, the server scales     three vectors are sent in the thesis
    B  the server keeps the o of each worker           two are sent, and the server keeps p vectors
    C  the worker pulls c, scales, pushes              two are sent; c may move between the pull and the push

There is no server process here: in A and B the worker, which keeps o in its own memory, visits the center and computes
under its lock. A and B are therefore the same. Between nodes, an exchange transfers two vectors (c is fetched and
returned); on a node, it transfers none. In C the worker visits the center twice, and scales by the c of its first
visit.

Source: Hermans, On scalable deep learning and parallelizing gradient descent, 2017, CERN-THESIS-2017-103, ADAG (the
class Experimental of dist-keras; its class ADAG is AGN).

Deviations: the thesis prints a norm and uses it weight by weight; here it is element-wise. Its first form has the
learning rate for gamma, its second ((c - o)/gamma)^2, which is gamma^2 here. In C the worker continues from the c that
it has pulled plus its own commit, so that it does not lose its own steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from mpitrain import kernels
from mpitrain.algorithms.base.replica import Replica
from mpitrain.algorithms.base.settings import boolean, choice, integer, number
from mpitrain.algorithms.parameter_server.center import CenterMethod, CenterWorker
from mpitrain.algorithms.parameter_server.commit import Displacement
from mpitrain.collectives.rma.shared_vector import SharedVector


@dataclass(frozen=True)
class ADAG(CenterMethod):
    """AGN (``parameter_server.agn``) that damps a commit in the coordinates that other workers have just changed.

    It suits high learning rates and many workers.

    Args:
        period: The number tau of local steps between two exchanges.
        gamma: The damping constant. A commit is divided by 1 + d^2/gamma in each coordinate, where d is the distance
            that the center has moved in this coordinate since the worker's last pull. Smaller values damp more.
        placement: The place where the damping factor is computed. With ``A`` or ``B``, which are the same here, it is
            the center. With ``C``, it is the worker, which visits the center twice per exchange.
        normalise: Whether to divide the commit by its number of local steps, as AGN does.
    """

    period: int = integer(15, "tau, local steps between exchanges", low=1)
    gamma: float = number(1e-4, "gamma, squared distance of the center at which a commit is halved", low=1e-30)
    placement: str = choice("A", "where commits are scaled: A, B the center, C the worker", ("A", "B", "C"))
    normalise: bool = boolean(True, "divide commits by their number of local steps, as AGN does")

    name: ClassVar[str] = "adag"
    summary: ClassVar[str] = "AGN that damps a commit where the center has moved since the pull"
    source: ClassVar[str] = "Hermans 2017, CERN-THESIS-2017-103"
    communication: ClassVar[str] = "2/tau (commit and pull); C visits twice"
    needs_gradient: ClassVar[bool] = False
    short_run: ClassVar[Mapping[str, Any]] = MappingProxyType({"period": 5})

    def worker(self, replica: Replica) -> CenterWorker:
        """Make a worker. Collective."""
        kind = ScalingWorker if self.placement == "C" else CenterWorker
        return kind(self, replica, DampedDisplacement(replica.x.local, self))


class DampedDisplacement(Displacement):
    """The rule that damps a displacement in the coordinates in which the center has moved since the last pull.

    Args:
        x: (n,) the model's parameters.
        method: The hyper-parameters.
    """

    def __init__(self, x: Any, method: ADAG) -> None:
        super().__init__(x)
        self._normalise, self._inverse_gamma = method.normalise, 1 / method.gamma

    def __call__(self, part: slice, c: Any, shared: SharedVector, steps: int) -> int:
        """Compute c <- c + D / ((c - o)^2/gamma + 1);  x, o <- c"""
        return kernels.adag_commit(self.x[part], self.origin[part], c, self._share(steps), self._inverse_gamma)

    def scale(self, part: slice, c: Any, steps: int) -> int:
        """Compute the commit x <- D / ((c - o)^2/gamma + 1), and set o <- c."""
        return kernels.adag_scale(self.x[part], self.origin[part], c, self._share(steps), self._inverse_gamma)

    def push_scaled(self, part: slice, c: Any) -> int:
        """Push the commit, which is in x: c <- c + x; then x, o <- o + x."""
        return kernels.adag_push(self.x[part], self.origin[part], c)

    def _share(self, steps: int) -> float:
        """Return 1/tau if commits are normalised."""
        return 1 / max(steps, 1) if self._normalise else 1.0


class ScalingWorker(CenterWorker):
    """A worker with placement C: it scales its commit itself, using the center that it has pulled just before.

    Args:
        method: The hyper-parameters.
        replica: The vectors and the communicator to work with.
        rule: The rule by which this worker commits.
    """

    def __init__(self, method: ADAG, replica: Replica, rule: DampedDisplacement) -> None:
        super().__init__(method, replica, rule)
        self._damped = rule
        for compiled in (self._scale, rule.push_scaled):
            compiled(slice(0, 0), self._empty)

    def commit(self) -> None:
        """Pull, scale, push. Local."""
        self._center.update(self._scale, pushes=False)
        self._center.update(self._damped.push_scaled, pulls=False)
        self._steps = 0

    def _scale(self, part: slice, c: Any) -> int:
        self.limit(part)
        return self._damped.scale(part, c, self._steps)
