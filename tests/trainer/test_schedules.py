"""The learning rate at every step: the curves of torch, the warm-up, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch.optim import lr_scheduler

from mpitrain.errors import UsageError
from mpitrain.trainer import schedules
from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.plan import RunPlan
from mpitrain.trainer.schedules import RateCurve

T = 30


def half(step, total, power=1):
    return 0.5**power if step < total / 2 else 0.25


def below_zero(step, total):
    return -1.0


def curve_of_torch(make):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, rates = make(optimizer), []
    for _ in range(T):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("name", "settings", "of_torch"),
    [
        ("constant", {}, lambda optimizer: lr_scheduler.ConstantLR(optimizer, factor=1.0)),
        ("cosine", {}, lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T)),
        ("cosine", {"final": "0.1"}, lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T, eta_min=0.1)),
        ("linear", {}, lambda optimizer: lr_scheduler.LinearLR(optimizer, 1.0, 0.0, T)),
        ("linear", {"final": "0.2"}, lambda optimizer: lr_scheduler.LinearLR(optimizer, 1.0, 0.2, T)),
        ("step", {}, lambda optimizer: lr_scheduler.StepLR(optimizer, T // 3, 0.1)),
        ("step", {"step_size": "7", "gamma": "0.5"}, lambda optimizer: lr_scheduler.StepLR(optimizer, 7, 0.5)),
    ],
)
def test_a_schedule_has_the_curve_of_torch(name, settings, of_torch):
    curve = RateCurve(schedules.create(name, settings), warmup=0, total=T)
    assert [curve(step) for step in range(T)] == pytest.approx(curve_of_torch(of_torch), rel=1e-9, abs=1e-12)


def test_the_warm_up_rises_to_the_learning_rate_and_the_schedule_follows():
    curve = RateCurve(schedules.create("cosine", {}), warmup=4, total=14)
    assert [curve(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert curve(9) == pytest.approx(0.5)  # in the middle of the remaining 10
    assert curve(13) == pytest.approx((1 + math.cos(0.9 * math.pi)) / 2)
    assert curve(14) == curve(1000) == 0.0  # a rank that makes more steps than its share


def test_a_run_without_a_number_of_steps_has_warm_up_and_steps_of_given_length():
    curve = RateCurve(schedules.create("step", {"step_size": "3"}), warmup=2, total=None)
    assert [curve(step) for step in range(9)] == pytest.approx([0.5, 1, 1, 1, 1, 0.1, 0.1, 0.1, 0.01])


def test_a_function_of_the_users_is_called_with_step_total_and_settings():
    curve = RateCurve(schedules.create("trainer.test_schedules:half", {"power": "3"}), warmup=2, total=12)
    assert [curve(step) for step in (0, 1, 2, 6, 7, 11)] == [0.5, 1.0, 0.125, 0.125, 0.25, 0.25]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("trainer.test_schedules:half", {"powr": "3"}, "no setting 'powr': did you mean power"),
        ("trainer.test_schedules:halve", {}, "has no function 'halve'"),
        ("trainer.test_schedules:below_zero", {}, "returned -1.0 at step 0: return a factor of 0 or more"),
    ],
)
def test_a_function_that_does_not_fit_is_refused(name, settings, message):
    with pytest.raises(UsageError, match=message):
        RateCurve(schedules.create(name, settings), warmup=0, total=10)(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "cosin"}, "unknown schedule 'cosin': did you mean cosine"),
        ({"schedule": "step", "schedule_settings": {"gama": "0.5"}}, "step has no setting 'gama': did you mean gamma"),
        ({"schedule": "step", "schedule_settings": {"gamma": "2"}}, "step: gamma must be a number > 0 and <= 1"),
        ({"schedule_settings": {"final": "0"}}, "constant has no setting 'final'"),
        ({"schedule": "cosine", "minutes": 1.0}, "--schedule cosine needs the number of steps: give --steps"),
        ({"schedule": "step", "minutes": 1.0}, "--schedule step needs the number of steps"),
        ({"warmup": -1}, "--warmup must be 0 or more, not -1"),
    ],
)
def test_a_schedule_that_cannot_be_followed_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        RunPlan.of(TrainConfig(**options))


def test_a_warm_up_as_long_as_the_run_is_refused():
    plan = RunPlan.of(TrainConfig(warmup=10, steps=10))
    with pytest.raises(UsageError, match="--warmup 10 leaves nothing of a run of 10 steps"):
        plan.rate_curve(plan.budget(steps_per_epoch=5, n_ranks=2), n_ranks=2)


@pytest.mark.parametrize(
    ("algorithm", "budget", "total"),
    [
        ("allreduce", {"steps": 40}, 40),
        ("easgd", {"epochs": 3.0}, 15),
        ("allreduce", {"gradients": 41}, 21),
        ("gosgd", {"gradients": 41}, 21),  # on average
    ],
)
def test_the_clock_is_the_steps_of_a_rank(algorithm, budget, total):
    plan = RunPlan.of(TrainConfig(algorithm, schedule="linear", **budget))
    curve = plan.rate_curve(plan.budget(steps_per_epoch=5, n_ranks=2), n_ranks=2)
    assert curve.total == total
    assert curve(total // 3) == pytest.approx(1 - total // 3 / total)


def test_a_constant_learning_rate_costs_nothing():
    plan = RunPlan.of(TrainConfig(steps=3))
    assert plan.rate_curve(plan.budget(steps_per_epoch=5, n_ranks=1), n_ranks=1) is None
