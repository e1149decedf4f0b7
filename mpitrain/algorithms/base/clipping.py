"""A bound on the distance by which one worker may move a shared vector, or a peer, in one exchange.

    x <- o + (x - o)*min(1, r/||x - o||)        the displacement x - o is scaled to the Euclidean norm r

With ``clip_displacement`` = C the center of elastic averaging and of a parameter server moves by at most C in an
exchange of one worker, and a gossiping worker by at most C per vector received. If a vector lies in shards, a shard
with m of the n elements has the bound C*sqrt(m/n), so that the whole vector has the bound C. Displacements within the
bound do not change. The method then has its usual fixed points, and its usual rates of convergence near them.

This is for finite values that are far too large, such as the gradients of a damaged batch or of a rank with a wrong
learning rate. It is no defence against an adversary, who can move the center by C in every exchange.

Source: the projection of centered clipping, Karimireddy, He, Jaggi, Learning from history for Byzantine robust
optimization, 2021, https://arxiv.org/abs/2012.10333, with the method's own reference in the place of the center.
"""

from __future__ import annotations

import math
from typing import Any

from mpitrain import kernels
from mpitrain.algorithms.base.settings import number
from mpitrain.collectives.communicator import Communicator
from mpitrain.kernels import norms
from mpitrain.log import ANY_RANK, logger


def clip_displacement() -> Any:
    """Declare the setting ``clip_displacement``."""
    return number(None, "C, largest Euclidean norm by which an exchange moves the other side", above=0, optional=True)


class Clip:
    """The bound on the displacements by one worker, and a count of the displacements that exceed it.

    Args:
        bound: The bound C.
        comm: The communicator of the workers. Its ``statistics.n_clipped`` counts the scaled displacements.
    """

    def __init__(self, bound: float, comm: Communicator) -> None:
        self.bound, self._statistics = bound, comm.statistics

    @classmethod
    def of(cls, method: Any, comm: Communicator) -> Clip | None:
        """Return the bound of a method, or None if it has none."""
        bound = getattr(method, "clip_displacement", None)
        return None if bound is None else cls(bound, comm)

    def share_of(self, part: Any, n: int) -> float:
        """Return the bound C*sqrt(m/n) of a shard (m,) of ``n`` elements."""
        return self.bound * math.sqrt(len(part) / max(n, 1))

    def limit(self, x: Any, origin: Any, radius: float) -> None:
        """Move ``x`` (m,) towards ``origin`` (m,) until their distance is at most ``radius``. Local."""
        factor = self.factor(norms.distance(x, origin), radius)
        if factor < 1:
            kernels.elastic_displacement(x, origin, factor, 0.0)  # x <- factor*(x - origin)
            kernels.scaled_add(x, origin, 1.0)

    def factor(self, distance: float, radius: float) -> float:
        """Return min(1, radius/distance), which limits a displacement of length ``distance`` to ``radius``.

        A factor below 1 is counted and logged. If ``distance`` is NaN, the factor is 1: methods handle non-finite
        values elsewhere.
        """
        if not distance > radius:
            return 1.0
        self._statistics.n_clipped += 1
        n = self._statistics.n_clipped
        if math.log10(n).is_integer():  # the first, the tenth, the hundredth
            text = "a displacement of norm %.3g exceeds clip_displacement: scaled to %.3g (number %d on this rank)"
            logger.warning(text, distance, radius, n, extra=ANY_RANK)
        return radius / distance
