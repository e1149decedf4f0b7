"""When a run is over, and when it is evaluated and saved on the way: decisions from numbers."""

from __future__ import annotations

from collections.abc import Callable

from mpitrain.trainer.config import TrainConfig


class Budget:
    """What one run may use.

    Args:
        config: The run's.
        steps_per_epoch: Of each rank.
        n_ranks: How many share the gradients.
        synchronous: Whether all ranks make the same number of steps.

    Attributes:
        steps: Of each rank, where each can tell by itself that it is done; else None, and rank 0 says when.
        gradients: Of all ranks together, where that is known.
        seconds: Of training, where that is the budget.
    """

    def __init__(self, config: TrainConfig, *, steps_per_epoch: int, n_ranks: int, synchronous: bool) -> None:
        self._config, self._steps_per_epoch = config, steps_per_epoch
        self.steps = config.steps
        if config.epochs is not None:
            self.steps = max(round(config.epochs * steps_per_epoch), 1)
        elif config.gradients is not None and synchronous:
            self.steps = -(-config.gradients // n_ranks)
        self.gradients = config.gradients or (self.steps and self.steps * n_ranks)
        self.seconds = None if config.minutes is None else 60 * config.minutes

    def is_over(self, step: int) -> bool:
        """Whether a rank that has made ``step`` steps is done."""
        return self.steps is not None and step >= self.steps

    def is_over_for_all(self, seconds: float, count_gradients: Callable[[], int]) -> bool:
        """Whether a budget that only rank 0 watches is used up; gradients are counted only if they are that budget."""
        if self.seconds is not None:
            return seconds >= self.seconds
        return self.steps is None and self.gradients is not None and count_gradients() >= self.gradients

    def evaluates(self, step: int, seconds_since_last: float) -> bool:
        """Whether rank 0 evaluates after this step; the end is evaluated when all have come to it."""
        if self.is_over(step):
            return False
        if self._config.evaluate_seconds is not None:
            return seconds_since_last >= self._config.evaluate_seconds
        return step % (self._config.evaluate_every or self._steps_per_epoch) == 0

    def saves(self, step: int) -> bool:
        """Whether there is a checkpoint after this step; the end is saved when all have come to it."""
        every = self._config.checkpoint_every
        return every != 0 and not self.is_over(step) and step % (every or self._steps_per_epoch) == 0
