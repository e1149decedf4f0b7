"""The hook that moves the learning rate along the schedule of a run."""

from __future__ import annotations

from torch.optim.lr_scheduler import LambdaLR

from mpitrain.trainer.run import Hook, Run
from mpitrain.trainer.schedules import RateCurve


class LearningRate(Hook):
    """The hook that sets the learning rate before the first step, and after each step for the next one.

    The learning rate depends only on the number of steps of this rank, so a resumed run continues the schedule.

    Args:
        curve: The factor of the learning rate at each step.
    """

    def __init__(self, curve: RateCurve) -> None:
        self._curve = curve
        self._scheduler: LambdaLR | None = None

    def on_start(self, run: Run) -> None:
        """Set the learning rate of the first step."""
        groups = run.optimizer.param_groups
        for group in groups:
            group["lr"] = group["initial_lr"] = run.plan.config.lr
        self._scheduler = LambdaLR(run.optimizer, self._curve, last_epoch=run.position - 1)

    def on_step(self, run: Run) -> None:
        """Set the learning rate of the next step."""
        assert self._scheduler is not None
        self._scheduler.step()
