"""The hook that ends a run early: at a target, or when evaluations no longer improve."""

from __future__ import annotations

from collections.abc import Sequence

from mpitrain.trainer.ranking import Ranking
from mpitrain.trainer.run import Hook, Point, Run


class EarlyStopping(Hook):
    """The hook that ends a run after an evaluation. The lead, the first rank alive, orders it; all ranks follow.

    The decision depends only on the evaluations so far, so a resumed run or a new lead decides in the same way.

    Args:
        ranking: The target, and which evaluations are better.
        patience: The run ends after this number of consecutive evaluations without a new best one; None for no limit.
    """

    def __init__(self, ranking: Ranking, patience: int | None) -> None:
        self._ranking, self._patience = ranking, patience

    def on_evaluation(self, run: Run, point: Point) -> None:
        """End the run if the target or the patience is reached."""
        self._check(run)

    def on_lead(self, run: Run) -> None:
        """Decide again on the evaluations of the lead that has died."""
        self._check(run)

    def _check(self, run: Run) -> None:
        reason = self.reason(run.points)
        if reason and not run.is_ending:
            run.request_stop(reason)

    def reason(self, points: Sequence[Point]) -> str:
        """Return the reason to end the run after these evaluations; an empty text if it continues."""
        if not points:
            return ""
        if self._ranking.reaches_target(points[-1]):
            return "target"
        since_best = len(points) - 1 - self._ranking.best(points)
        return "patience" if self._patience is not None and since_best >= self._patience else ""
