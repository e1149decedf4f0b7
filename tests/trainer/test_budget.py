"""When a run ends, is evaluated and saved: numbers in, decisions out."""

from __future__ import annotations

import pytest

from mpitrain.trainer.budget import MAX_SECONDS_BETWEEN_COUNTS, Budget, Calendar
from mpitrain.trainer.config import TrainConfig


def calendar(*, steps_per_epoch=11, **options):
    budget = Budget(TrainConfig(**options), steps_per_epoch=steps_per_epoch, n_ranks=4, synchronous=False)
    return Calendar(TrainConfig(**options), budget, steps_per_epoch=steps_per_epoch)


def budget(*, synchronous=False, n_ranks=4, steps_per_epoch=11, **options):
    return Budget(
        TrainConfig(**options), steps_per_epoch=steps_per_epoch, n_ranks=n_ranks, synchronous=synchronous
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "steps", "gradients"),
    [
        ({"epochs": 2.0}, 22, 88),
        ({"epochs": 0.01}, 1, 4),
        ({"steps": 7}, 7, 28),
        ({"gradients": 30, "synchronous": True}, 8, 30),
        ({"gradients": 30}, None, 30),
        ({"minutes": 2.0}, None, None),
    ],
)
def test_every_budget_is_steps_of_each_rank_where_each_can_count_them(options, steps, gradients):
    made = budget(**options)
    assert (made.steps, made.gradients) == (steps, gradients)
    if steps is not None:
        assert [made.is_over(step) for step in (steps - 1, steps, steps + 1)] == [False, True, True]


def test_rank_0_ends_a_budget_that_no_rank_can_count_alone():
    minutes, gradients = budget(minutes=2.0), budget(gradients=30)
    assert [minutes.is_over_for_all(seconds, 0.0, lambda: 10**9) for seconds in (119.9, 120.0)] == [False, True]
    assert [gradients.is_over_for_all(1e9, 0.0, lambda n=n: n) for n in (29, 30, 31)] == [False, True, True]
    assert not budget(steps=3).is_over_for_all(1e9, 0.0, lambda: 10**9)
    assert not minutes.is_over(10**9)


def end_and_counts(goal, made_at, step_seconds):
    """Return when rank 0 could see that the goal is reached, when it sees it, and how often it counts."""
    over, counts, k, reached = budget(gradients=goal), [], 0, None

    def count():
        counts.append(k)
        return made_at(k * step_seconds)

    while not over.is_over_for_all(0.0, 1000.0 + k * step_seconds, count):
        if reached is None and made_at(k * step_seconds) >= goal:
            reached = k
        k += 1
    return (k if reached is None else reached) * step_seconds, k * step_seconds, len(counts)


@pytest.mark.parametrize("step_seconds", [0.0002, 0.003, 0.04, 0.5])
@pytest.mark.parametrize("others", [0, 3, 500])
@pytest.mark.parametrize("seconds", [0.01, 0.3, 30.0])
def test_gradients_are_counted_seldom_and_their_end_is_seen_at_the_first_step_after_it(step_seconds, others, seconds):
    pace = (1 + others) / step_seconds
    reached, seen, n_counts = end_and_counts(round(pace * seconds) + 1, lambda t: int(pace * t), step_seconds)
    assert seen == reached
    assert n_counts < 40 + seconds / MAX_SECONDS_BETWEEN_COUNTS


def test_ranks_that_become_faster_are_noticed_soon():
    reached, seen, _ = end_and_counts(100_000, lambda t: 10 * t if t < 60 else 600 + 1e6 * (t - 60), 0.001)
    assert seen < reached + MAX_SECONDS_BETWEEN_COUNTS + 0.002
    reached, seen, _ = end_and_counts(1000, lambda t: 0 if t < 0.05 else 1e5 * (t - 0.05), 0.001)
    assert seen < reached + 0.05 + 0.002  # no longer than has been counted: the first steps of others take long


def test_evaluations_and_checkpoints_come_every_epoch_unless_asked_otherwise_and_never_at_the_end():
    epochs = calendar(epochs=2.0)
    assert [step for step in range(1, 23) if epochs.evaluation_is_due(step, 0.0)] == [11]
    assert [step for step in range(1, 23) if epochs.checkpoint_is_due(step)] == [11]
    asked = calendar(steps=9, evaluate_every=2, checkpoint_every=3)
    assert [step for step in range(1, 10) if asked.evaluation_is_due(step, 0.0)] == [2, 4, 6, 8]
    assert [step for step in range(1, 10) if asked.checkpoint_is_due(step)] == [3, 6]
    assert not any(calendar(steps=9, checkpoint_every=0).checkpoint_is_due(step) for step in range(1, 10))
    timed = calendar(steps=9, evaluate_seconds=0.5)
    assert [timed.evaluation_is_due(1, seconds) for seconds in (0.4, 0.5)] == [False, True]
