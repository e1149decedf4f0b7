"""When a run ends, and when it is evaluated and saved on the way: decisions from numbers."""

from __future__ import annotations

from collections.abc import Callable

from mpitrain.trainer.config import TrainConfig

MAX_SECONDS_BETWEEN_COUNTS = 0.1
"""A limit however far the end seems to be: ranks may become faster."""


class Budget:
    """The budget of a run, which determines its end.

    Args:
        config: The options of the run.
        steps_per_epoch: The number of steps of each rank in an epoch.
        n_ranks: The number of ranks that share the gradients.
        synchronous: Whether all ranks make the same number of steps.

    Attributes:
        steps: The number of steps of each rank; None if only the lead, the first rank alive, can tell that the run is
            over.
        gradients: The number of gradients of all ranks in total; None if it is not known in advance.
        seconds: The seconds of training; None if the budget is not a time.
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
        """Return the number of steps of a rank in the run, on average over the ranks; None if the budget is a time."""
        if self.steps is not None or self.gradients is None:
            return self.steps
        return -(-self.gradients // n_ranks)

    def is_over(self, step: int) -> bool:
        """Return whether a rank that has made ``step`` steps is done."""
        return self.steps is not None and step >= self.steps

    def is_over_for_all(self, seconds: float, now: float, count_gradients: Callable[[], int]) -> bool:
        """Return whether the budget is used up; False if each rank can tell by itself (``is_over``). Local; lead only.

        Args:
            seconds: The seconds of training.
            now: The time on a clock that runs during evaluations too, since other ranks compute gradients then.
            count_gradients: A function that returns the number of gradients. It is called only if the budget may be
                used up.
        """
        if self.seconds is not None:
            return seconds >= self.seconds
        return self._countdown is not None and self._countdown.is_over(now, count_gradients)


class Calendar:
    """The steps after which a run is evaluated and saved. The end of the run is evaluated and saved in any case.

    Args:
        config: The options of the run.
        budget: The end of the run.
        steps_per_epoch: The steps of each rank in an epoch; the default interval is one epoch.
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
        """Return whether an evaluation follows this step."""
        if self._budget.is_over(step):
            return False
        if self._evaluate_seconds is not None:
            return seconds_since_last >= self._evaluate_seconds
        return step % self._evaluate_every == 0

    def checkpoint_is_due(self, step: int) -> bool:
        """Return whether a checkpoint follows this step."""
        return self.saves and not self._budget.is_over(step) and step % self._checkpoint_every == 0


class Countdown:
    """A test of whether all ranks together have made ``goal`` gradients, with as few counts as possible.

    A count costs a message to every rank of the other nodes and back, and rank 0 waits for the replies. The test
    therefore estimates the least time that the remaining gradients will take, and does not count again before that time
    has passed. It assumes twice the faster of two past paces: the average pace, and the pace between the last two
    counts. The first steps are slow, which would make the estimate too long. The time to the next count is therefore at
    most the time since the first one, and at most ``MAX_SECONDS_BETWEEN_COUNTS``.
    """

    def __init__(self, goal: int) -> None:
        self._goal = goal
        self._counts: list[tuple[float, int]] = []  # time and gradients of the first and the last count
        self._next = 0.0

    def is_over(self, now: float, count: Callable[[], int]) -> bool:
        """Return whether the newest count has reached the goal. Local."""
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
