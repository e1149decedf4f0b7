"""ADAG: a commit is damped, element by element, by how far the center has moved since its worker's last pull.

    D = (x - o)/tau                            AGN's commit, or x - o
    c <- c + D / ((c - o)^2/gamma + 1)         all of it element by element

Staleness is here a distance, c - o, and not a count: a commit that finds the center where it was pulled passes in full,
and with one worker this is AGN. gamma -> infinity is AGN, too; gamma -> 0 stops every coordinate that has moved.

Where the factor is computed, ``placement``:

    A  worker sends D and o, server scales         three vectors travel in the thesis
    B  server remembers the o of each worker       two travel, and the server keeps p vectors
    C  worker pulls c, scales, pushes              two travel; c may move between the pull and the push

There is no server process here: in A and B the worker, which keeps o in its own memory, visits the center and computes
under its lock. They are the same arithmetic and the same two vectors, c fetched and returned between nodes, none on a
node. C visits twice, and scales by the older of the two c.

Source: Hermans, On scalable deep learning and parallelizing gradient descent, 2017, CERN-THESIS-2017-103, ADAG (the
class Experimental of dist-keras; its class ADAG is AGN).

Deviations: the thesis prints a norm and uses it weight by weight; here it is element-wise. Its first form has the
learning rate for gamma, its second ((c - o)/gamma)^2, which is gamma^2 here. In C the worker goes on from the c it has
pulled plus its own commit, so that it never steps back behind itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from mpitrain import kernels
from mpitrain.algorithms.base.method import Replica, setting
from mpitrain.algorithms.parameter_server.center import CenterMethod, DisplacementWorker


@dataclass(frozen=True)
class ADAG(CenterMethod):
    """AGN for high learning rates and many workers: what others have just changed is hardly changed again.

    Args:
        period: tau, local steps between two exchanges.
        gamma: How far, squared, the center may have moved in a coordinate before a commit to it is halved; smaller is
            more careful.
        placement: Where the factor is computed: ``A`` or ``B``, which are the same here, at the center; ``C``, at the
            worker, with a second visit.
        normalise: Divide the commit by its number of local steps, as AGN does.
    """

    period: int = setting(15, "tau, local steps between exchanges", low=1)
    gamma: float = setting(1e-4, "gamma, squared distance of the center at which a commit is halved", low=1e-30)
    placement: str = setting("A", "where commits are scaled: A, B the center, C the worker", choices=("A", "B", "C"))
    normalise: bool = setting(True, "divide commits by their number of local steps, as AGN does")

    name: ClassVar[str] = "adag"
    summary: ClassVar[str] = "AGN that damps a commit where the center has moved since the pull"
    source: ClassVar[str] = "Hermans 2017, CERN-THESIS-2017-103"
    communication: ClassVar[str] = "2/tau (commit and pull); C visits twice"
    needs_gradient: ClassVar[bool] = False
    short_run: ClassVar[Mapping[str, Any]] = MappingProxyType({"period": 5})

    def worker(self, replica: Replica) -> ADAGWorker:
        """Collective."""
        return (ScalingWorker if self.placement == "C" else ADAGWorker)(self, replica)


class ADAGWorker(DisplacementWorker):
    """Placements A and B: scaled at the center, by the center as it is."""

    def commit_rate(self) -> float:
        """1/tau if the commit is normalised."""
        return 1 / max(self._steps, 1) if self._method.normalise else 1.0

    def visit(self, part: slice, c: Any) -> int:
        """c <- c + D / ((c - o)^2/gamma + 1);  x, o <- c"""
        return kernels.adag_commit(
            self.x.local[part], self._origin[part], c, self.commit_rate(), 1 / self._method.gamma
        )


class ScalingWorker(ADAGWorker):
    """Placement C: scaled at the worker, by the center as it was pulled just before."""

    def __init__(self, method: ADAG, replica: Replica) -> None:
        super().__init__(method, replica)
        for compiled in (self._scale, self._push):
            compiled(slice(0, 0), self._origin[:0].astype(self._dtype))

    def commit(self) -> None:
        """Pull, scale, push. Local."""
        self._center.update(self._scale, pushes=False)
        self._center.update(self._push, pulls=False)
        self._steps = 0

    def _scale(self, part: slice, c: Any) -> int:
        """o <- c;  x holds the commit until it is pushed"""
        return kernels.adag_scale(self.x.local[part], self._origin[part], c, self.commit_rate(), 1 / self._method.gamma)

    def _push(self, part: slice, c: Any) -> int:
        """c <- c + D;  x, o <- o + D"""
        return kernels.adag_push(self.x.local[part], self._origin[part], c)
