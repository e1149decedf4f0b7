"""The order of evaluations, from worse to better."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mpitrain.trainer.objective_options import LOSS, Target
from mpitrain.trainer.run import Point


class Ranking:
    """The order of evaluations by the value that ``--target`` names, or else by the test loss.

    Args:
        target: The value to reach; None for none.
        higher_is_better: Whether a larger value of the run's metric is better.
    """

    def __init__(self, target: Target | None, *, higher_is_better: bool) -> None:
        self._uses_loss = target is None or target.name == LOSS
        self._sign = -1.0 if self._uses_loss or not higher_is_better else 1.0
        self._goal = None if target is None else self._sign * target.value

    def value(self, point: Point) -> float:
        """Return a number that is larger for a better evaluation; NaN if the compared value is NaN."""
        return self._sign * (point.test_loss if self._uses_loss else point.test_metric)

    def reaches_target(self, point: Point) -> bool:
        """Return whether an evaluation reaches the target, if there is one."""
        return self._goal is not None and self.value(point) >= self._goal

    def best(self, points: Sequence[Point]) -> int:
        """Return the index of the best evaluation, the first of equal ones."""
        values = [self.value(point) for point in points]
        return max(range(len(values)), key=lambda k: (not math.isnan(values[k]), values[k], -k))
