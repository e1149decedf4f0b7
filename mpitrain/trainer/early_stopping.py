"""The hook that ends a run early: at a target, or when evaluations no longer improve."""

from __future__ import annotations

from collections.abc import Sequence

from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.objective import Objective
from mpitrain.trainer.objective_options import LOSS, Target
from mpitrain.trainer.run import Hook, Point, Run


def early_stopping(config: TrainConfig, objective: Objective) -> list[Hook]:
    """Return the hook, if the options ask for it."""
    if config.target is None and config.patience is None:
        return []
    target = None if config.target is None else Target.parse(config.target)
    return [EarlyStopping(target, config.patience, higher_is_better=objective.higher_is_better)]


class EarlyStopping(Hook):
    """The end of a run at an evaluation, ordered by the lead and followed by all ranks.

    The decision is a function of the evaluations so far: a resumed run and a new lead continue to count.

    Args:
        target: The value to reach; None for none.
        patience: Evaluations in a row without a new best; None for no limit.
        higher_is_better: Whether a larger value of the run's metric is better.
    """

    def __init__(self, target: Target | None, patience: int | None, *, higher_is_better: bool) -> None:
        self._target, self._patience = target, patience
        self._uses_loss = target is None or target.name == LOSS
        self._sign = -1.0 if self._uses_loss or not higher_is_better else 1.0

    def on_evaluation(self, run: Run, point: Point) -> None:
        """End the run if the evaluations so far say so."""
        self._check(run)

    def on_lead(self, run: Run) -> None:
        """Continue to decide with the evaluations of the lead that has died."""
        self._check(run)

    def _check(self, run: Run) -> None:
        reason = self.reason(run.points)
        if reason and not run.is_ending:
            run.request_stop(reason)

    def reason(self, points: Sequence[Point]) -> str:
        """Return why the run ends after these evaluations; nothing if it goes on."""
        values = [self._sign * (point.test_loss if self._uses_loss else point.test_metric) for point in points]
        if not values:
            return ""
        if self._target is not None and values[-1] >= self._sign * self._target.value:
            return "target"
        if self._patience is None:
            return ""
        best = 0
        for k, value in enumerate(values):
            if value > values[best] or values[best] != values[best]:  # a NaN is no best
                best = k
        return "patience" if len(values) - 1 - best >= self._patience else ""
