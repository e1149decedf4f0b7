"""When a run ends, and when it is evaluated and saved on the way: decisions from numbers."""

from __future__ import annotations

from collections.abc import Callable

from mpitrain.trainer.config import TrainConfig

MAX_SECONDS_BETWEEN_COUNTS = 0.1
"""A limit however far the end seems to be: ranks may become faster."""


class Budget:
    """The end of one run.

    Args:
        config: The options of the run.
        steps_per_epoch: Steps of each rank in an epoch.
        n_ranks: Ranks that share the gradients.
        synchronous: Whether all ranks make the same number of steps.

    Attributes:
        steps: Steps of each rank, where a rank can tell by itself that it is done; else None, and rank 0 says when.
        gradients: Gradients of all ranks in total, where the number is known in advance.
        seconds: Seconds of training, where that is the budget.
    """

    def __init__(self, config: TrainConfig, *, steps_per_epoch: int, n_ranks: int, synchronous: bool) -> None:
        self.steps = config.steps
        if config.epochs is not None:
            self.steps = max(round(config.epochs * steps_per_epoch), 1)
        elif config.gradients is not None and synchronous:
            self.steps = -(-config.gradients // n_ranks)
        self.gradients = config.gradients or (self.steps and self.steps * n_ranks)
        self.seconds = None if config.minutes is None else 60 * config.minutes
        self._countdown = Countdown(self.gradients) if self.steps is None and self.gradients is not None else None

    def steps_of_rank(self, n_ranks: int) -> int | None:
        """Return the steps of a rank in the run, on average where ranks make different numbers; None with a time."""
        if self.steps is not None or self.gradients is None:
            return self.steps
        return -(-self.gradients // n_ranks)

    def is_over(self, step: int) -> bool:
        """Return whether a rank that has made ``step`` steps is done."""
        return self.steps is not None and step >= self.steps

    def is_over_for_all(self, seconds: float, now: float, count_gradients: Callable[[], int]) -> bool:
        """Return whether a budget that only rank 0 watches is used up.

        Args:
            seconds: Seconds of training.
            now: A clock that never stands still: gradients that others compute while rank 0 evaluates count.
            count_gradients: Called only if gradients are the budget and the remaining ones may have been made by now.
        """
        if self.seconds is not None:
            return seconds >= self.seconds
        return self._countdown is not None and self._countdown.is_over(now, count_gradients)


class Calendar:
    """The moments of evaluations and checkpoints during a run; its end is evaluated and saved in any case.

    Args:
        config: The options of the run.
        budget: The end of the run.
        steps_per_epoch: Steps of each rank in an epoch, which is the default interval.
    """

    def __init__(self, config: TrainConfig, budget: Budget, *, steps_per_epoch: int) -> None:
        self._budget = budget
        self._evaluate_seconds = config.evaluate_seconds
        self._evaluate_every = config.evaluate_every or steps_per_epoch
        self._checkpoint_every = steps_per_epoch if config.checkpoint_every is None else config.checkpoint_every

    @property
    def saves(self) -> bool:
        """Whether the run writes checkpoints at all."""
        return self._checkpoint_every != 0

    def evaluation_is_due(self, step: int, seconds_since_last: float) -> bool:
        """Return whether rank 0 evaluates after this step."""
        if self._budget.is_over(step):
            return False
        if self._evaluate_seconds is not None:
            return seconds_since_last >= self._evaluate_seconds
        return step % self._evaluate_every == 0

    def checkpoint_is_due(self, step: int) -> bool:
        """Return whether there is a checkpoint after this step."""
        return self.saves and not self._budget.is_over(step) and step % self._checkpoint_every == 0


class Countdown:
    """A test of whether all ranks in total have made ``goal`` gradients, which counts them seldom.

    A count takes a message to and from every rank of other nodes, and rank 0 waits for them. After a count the next one
    follows no sooner than the remaining gradients could be made at twice the pace of all counts or of the last two, but
    after no more time than counting has gone on for: the first steps are slow.
    """

    def __init__(self, goal: int) -> None:
        self._goal = goal
        self._counts: list[tuple[float, int]] = []  # time and gradients of the first and the last count
        self._next = 0.0

    def is_over(self, now: float, count: Callable[[], int]) -> bool:
        """Return whether the goal is reached, as far as is known. Local."""
        if self._counts and now < self._next:
            return False
        made = count()
        wait = MAX_SECONDS_BETWEEN_COUNTS
        for when, before in self._counts:
            if made > before:
                wait = min(wait, (self._goal - made) * (now - when) / (2 * (made - before)))
        first = self._counts[0] if self._counts else (now, made)
        self._next = now + min(wait, now - first[0])
        self._counts = [first, (now, made)]
        return made >= self._goal
