"""When a run is over, and when it is evaluated and saved on the way: decisions from numbers."""

from __future__ import annotations

from collections.abc import Callable

from mpitrain.trainer.config import TrainConfig

LONGEST_WITHOUT_A_COUNT_SECONDS = 0.1
"""However far the end seems to be: ranks may become faster."""


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
        self._countdown = Countdown(self.gradients) if self.steps is None and self.gradients is not None else None

    def is_over(self, step: int) -> bool:
        """Whether a rank that has made ``step`` steps is done."""
        return self.steps is not None and step >= self.steps

    def is_over_for_all(self, seconds: float, now: float, count_gradients: Callable[[], int]) -> bool:
        """Whether a budget that only rank 0 watches is used up.

        Args:
            seconds: Of training.
            now: By a clock that never stands still: what others make while rank 0 evaluates counts.
            count_gradients: Called only if they are that budget, and as many as are left may have been made by now.
        """
        if self.seconds is not None:
            return seconds >= self.seconds
        return self._countdown is not None and self._countdown.is_over(now, count_gradients)

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


class Countdown:
    """Tells when all ranks together have made ``goal`` gradients, counting seldom.

    To count takes a message to and from every rank of other nodes, and it is rank 0 that waits for them. After a count
    there is no other one before what is left could be made at twice the pace of all counts or of the last two, nor for
    longer than counting has gone on: the first steps are slow.
    """

    def __init__(self, goal: int) -> None:
        self._goal = goal
        self._counts: list[tuple[float, int]] = []  # the first and the last one: when, how many
        self._next = 0.0

    def is_over(self, now: float, count: Callable[[], int]) -> bool:
        """Whether they have been made, as far as this has looked. Local."""
        if self._counts and now < self._next:
            return False
        made = count()
        wait = LONGEST_WITHOUT_A_COUNT_SECONDS
        for when, before in self._counts:
            if made > before:
                wait = min(wait, (self._goal - made) * (now - when) / (2 * (made - before)))
        first = self._counts[0] if self._counts else (now, made)
        self._next = now + min(wait, now - first[0])
        self._counts = [first, (now, made)]
        return made >= self._goal
