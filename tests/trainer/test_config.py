"""The options of a run and their ranges."""

from __future__ import annotations

import dataclasses
import json

import pytest

from mpitrain.errors import UsageError
from mpitrain.trainer.config import BUDGETS, DEFAULT_EPOCHS, TrainConfig
from mpitrain.trainer.plan import RunPlan


def test_without_a_budget_there_is_the_default_one():
    assert TrainConfig().epochs == DEFAULT_EPOCHS
    assert TrainConfig(steps=3).epochs is None


@pytest.mark.parametrize("a", BUDGETS)
@pytest.mark.parametrize("b", BUDGETS)
def test_there_is_one_budget(a, b):
    if a == b:
        assert getattr(TrainConfig(**{a: 1}), a) == 1
    else:
        with pytest.raises(UsageError, match="give one of --epochs, --steps, --gradients and --minutes"):
            TrainConfig(**{a: 1, b: 1})


@pytest.mark.parametrize("name", [*BUDGETS, "batch_size", "evaluate_every", "clip_norm"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_values_that_must_be_above_zero(name, value):
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} must be more than 0, not"):
        TrainConfig(**{name: value})


@pytest.mark.parametrize("name", ["lr", "weight_decay", "checkpoint_every", "seed"])
def test_values_that_may_be_zero(name):
    assert getattr(TrainConfig(**{name: 0}), name) == 0
    for value in (-1, float("nan")):
        with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} must be 0 or more, not"):
            TrainConfig(**{name: value})


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_momentum_is_below_one(value):
    with pytest.raises(UsageError, match="--momentum must be at least 0 and below 1"):
        TrainConfig(momentum=value)


@pytest.mark.parametrize("factor", [0.5, float("nan"), float("inf")])
def test_a_straggler_is_slower(factor):
    with pytest.raises(UsageError, match="needs a factor of 1 or more"):
        TrainConfig(straggler=(0, factor))


def test_a_run_that_diverges_stops_or_goes_on():
    with pytest.raises(UsageError, match="unknown value 'ignore': it must be one of stop, skip"):
        TrainConfig(on_nonfinite="ignore")


def test_sampling_is_one_of_three():
    with pytest.raises(
        UsageError, match="unknown sampling 'random': it must be one of independent, sharded, dirichlet:ALPHA"
    ):
        TrainConfig(sampling="random")


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(),
        TrainConfig(settings={"period": "3"}, steps=5, momentum=0.5, straggler=(2, 4.0), out="runs/a"),
        TrainConfig(algorithm="gossip", minutes=0.5, augment=True, sampling="sharded", checkpoint_every=0),
    ],
)
def test_a_stored_configuration_is_the_same(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"config": config.to_json()}))
    assert TrainConfig.of_run(tmp_path) == config


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_new_budget_replaces_the_old_one(budget, tmp_path):
    config = TrainConfig(steps=5)
    (tmp_path / "config.json").write_text(json.dumps({"config": config.to_json()}))
    expected = dataclasses.replace(config, **{**dict.fromkeys(BUDGETS), budget: 7})
    assert TrainConfig.of_run(tmp_path, **{budget: 7}) == expected


def test_momentum_is_the_methods_where_the_method_makes_the_update():
    assert RunPlan.of(TrainConfig(algorithm="eamsgd", momentum=0.5)).method.momentum == 0.5
    assert RunPlan.of(TrainConfig(algorithm="eamsgd", momentum=0.5)).base_momentum == 0
    assert RunPlan.of(TrainConfig(algorithm="eamsgd", settings={"momentum": "0.7"})).method.momentum == 0.7
    easgd, default = (RunPlan.of(TrainConfig(algorithm="easgd", momentum=value)) for value in (0.5, None))
    assert easgd.method == default.method
    assert (easgd.base_momentum, default.base_momentum) == (0.5, 0.9)
    with pytest.raises(UsageError, match=r"--momentum or --set momentum=\.\.\., not both"):
        RunPlan.of(TrainConfig(algorithm="eamsgd", momentum=0.5, settings={"momentum": "0.7"}))


def test_an_average_is_named():
    assert RunPlan.of(TrainConfig()).average is None
    assert RunPlan.of(TrainConfig(average="moving:0.5")).average.rate == 0.5
    with pytest.raises(UsageError, match=r"average: unknown kind .median.: it must be one of polyak, moving"):
        RunPlan.of(TrainConfig(average="median"))


def test_settings_outside_a_proven_region_are_warned_of():
    assert RunPlan.of(TrainConfig(settings={"moving_rate": "0.2"})).warnings(n_workers=4) == []
    (text,) = RunPlan.of(TrainConfig(settings={"moving_rate": "0.5"})).warnings(n_workers=4)
    assert "moving_rate" in text
    assert "0.225" in text  # 0.9/p would be inside


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"algorithm": "allreduce", "settings": {"node_shared": "true"}}, "half updated"),
        ({"algorithm": "allreduce", "settings": {"overlap": "true"}}, "overlap"),
        ({"algorithm": "slowmo", "replica_size": 2}, "replica group"),
        ({"algorithm": "slowmo", "average": "polyak"}, "average"),
        ({"algorithm": "easgd", "settings": {"synchronous": "true"}}, "center"),
    ],
    ids=["node_shared", "overlap", "replica_size", "average", "center"],
)
def test_what_needs_each_rank_cannot_continue_after_a_death(options, reason):
    RunPlan.of(TrainConfig(**options))
    with pytest.raises(UsageError, match=f"on_failure=continue is not possible here: .*{reason}"):
        RunPlan.of(TrainConfig(on_failure="continue", **options))


def test_ranks_that_continue_have_parameters_of_their_own():
    assert RunPlan.of(TrainConfig(algorithm="allreduce")).method.node_shared
    assert not RunPlan.of(TrainConfig(algorithm="allreduce", on_failure="continue")).method.node_shared
