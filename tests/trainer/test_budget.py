"""When a run is over, evaluated and saved: numbers in, decisions out."""

from __future__ import annotations

import pytest

from mpitrain.trainer.budget import Budget
from mpitrain.trainer.config import TrainConfig


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


def test_rank_0_ends_what_nobody_can_count_alone():
    minutes, gradients = budget(minutes=2.0), budget(gradients=30)
    assert [minutes.is_over_for_all(seconds, lambda: 10**9) for seconds in (119.9, 120.0)] == [False, True]
    assert [gradients.is_over_for_all(1e9, lambda n=n: n) for n in (29, 30, 31)] == [False, True, True]
    assert not budget(steps=3).is_over_for_all(1e9, lambda: 10**9)
    assert not minutes.is_over(10**9)


def test_evaluations_and_checkpoints_come_every_epoch_unless_asked_otherwise_and_never_at_the_end():
    epochs = budget(epochs=2.0)
    assert [step for step in range(1, 23) if epochs.evaluates(step, 0.0)] == [11]
    assert [step for step in range(1, 23) if epochs.saves(step)] == [11]
    asked = budget(steps=9, evaluate_every=2, checkpoint_every=3)
    assert [step for step in range(1, 10) if asked.evaluates(step, 0.0)] == [2, 4, 6, 8]
    assert [step for step in range(1, 10) if asked.saves(step)] == [3, 6]
    assert not any(budget(steps=9, checkpoint_every=0).saves(step) for step in range(1, 10))
    timed = budget(steps=9, evaluate_seconds=0.5)
    assert [timed.evaluates(1, seconds) for seconds in (0.4, 0.5)] == [False, True]
