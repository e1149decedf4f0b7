"""The plan of a comparison: every mistake is found before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from mpitrain.algorithms import METHODS
from mpitrain.errors import UsageError


@pytest.fixture
def configurations(load: Callable[[str], ModuleType]) -> Callable[..., dict[str, Any]]:
    plan = load("benchmarks.comparison.plan")
    return lambda *words: {
        name: one.config for name, one in plan.configurations(plan.parser().parse_args(words)).items()
    }


@pytest.fixture
def scheduled(load: Callable[[str], ModuleType]) -> Callable[..., Any]:
    """The configuration of the only method after its calendar is known."""

    def scheduled(*words: str) -> Any:
        plan = load("benchmarks.comparison.plan")
        (one,) = plan.configurations(plan.parser().parse_args(words)).values()
        return plan.with_calendar(one, n_evaluations=18, n_train=960, n_ranks=2)

    return scheduled


def test_all_is_the_registry(configurations: Callable[..., dict[str, Any]]) -> None:
    assert list(configurations("--algorithms", "all")) == list(METHODS)


def test_each_method_has_its_own_learning_rate_and_settings(configurations: Callable[..., dict[str, Any]]) -> None:
    names = ",".join(METHODS)
    configs = configurations("--algorithms", names, "--lr", "0.2", "--momentum", "0.5", "--set", "easgd.period=3")
    for name, method in METHODS.items():
        assert configs[name].lr == pytest.approx(0.2 * method.learning_rate_factor)
        assert configs[name].momentum == (None if method.owns_update else 0.5)
        recommended = {key: str(value) for key, value in method.short_run.items()}
        assert dict(configs[name].settings) == recommended | ({"period": "3"} if name == "easgd" else {})
    assert configurations("--algorithms", "gossip,easgd", "--lr-of", "easgd=0.7")["easgd"].lr == 0.7


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--algorithms", "easgd,nosuch"], "nosuch"),
        (["--algorithms", "easgd", "--set", "gossip.period=2"], "gossip is not compared"),
        (["--algorithms", "easgd", "--set", "easgd.nosuch=2"], "nosuch"),
        (["--set", "period=2"], "easgd.period=10"),
        (["--lr-of", "easgd.period=2"], "easgd=0.01"),
        (["--lr-of", "easgd=fast"], "must be a number"),
        (["--seeds", "0"], "--seeds"),
        (["--test-samples", "0"], "--test-samples"),
        (["--target", "95"], "--target"),
        (["--seconds", "0"], "--seconds"),
        (["--gradients", "-1"], "--gradients"),
    ],
)
def test_wrong_options_are_reported(configurations: Callable[..., dict[str, Any]], words: list[str], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        configurations(*words)


GIVEN = {
    "data": "synthetic",
    "model": "cnn7",
    "model_settings": "width=3",
    "batch_size": 7,
    "lr": 0.3,
    "momentum": 0.5,
    "weight_decay": 0.01,
    "straggler": "1:4",
    "sampling": "sharded",
    "augment": True,
    "device": "cuda",
    "epochs": 2.0,
    "gradients": 77,
    "inject": "nan:rank=1,step=3",
}


def test_every_shared_option_reaches_the_configuration(
    load: Callable[[str], ModuleType], configurations: Callable[..., dict[str, Any]]
) -> None:
    assert GIVEN.keys() == set(load("benchmarks.comparison.plan").SHARED)
    for name, value in GIVEN.items():
        flag = {"model_settings": "--model-set"}.get(name, f"--{name.replace('_', '-')}")
        config = configurations("--algorithms", "allreduce", flag, *([] if value is True else [str(value)]))
        expected = {"straggler": (1, 4.0), "inject": (value,), "model_settings": {"width": "3"}}.get(name, value)
        assert getattr(config["allreduce"], name) == expected != getattr(configurations()["allreduce"], name)


def test_a_comparison_without_a_budget_has_its_own_number_of_epochs(
    configurations: Callable[..., dict[str, Any]],
) -> None:
    assert {config.epochs for config in configurations().values()} == {30.0}


@pytest.mark.parametrize(
    ("words", "gradients", "every"),
    [
        ([], 900, 25),  # rank 0 makes 900/2 steps
        (["--gradients", "360"], 360, 10),
        (["--gradients", "360", "--straggler", "1:4"], 360, 16),  # rank 0: 4 of 5
        (["--gradients", "360", "--straggler", "0:4"], 360, 4),  # rank 0: 1 of 5
    ],
)
def test_rank_0_evaluates_as_often_as_asked(
    scheduled: Callable[..., Any], words: list[str], gradients: int, every: int
) -> None:
    config = scheduled("--algorithms", "easgd", *words)
    assert (config.epochs, config.gradients, config.evaluate_every) == (None, gradients, every)


def test_ranks_in_lockstep_share_the_steps(scheduled: Callable[..., Any]) -> None:
    config = scheduled("--algorithms", "allreduce", "--gradients", "360", "--straggler", "0:4")
    assert config.evaluate_every == 10


def test_a_time_is_divided_into_equal_parts(scheduled: Callable[..., Any]) -> None:
    config = scheduled("--algorithms", "easgd", "--seconds", "36")
    assert (config.minutes, config.evaluate_seconds) == (pytest.approx(0.6), pytest.approx(2))
