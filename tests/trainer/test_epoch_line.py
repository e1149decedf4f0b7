"""The lines of a run: durations, the time that remains, and what is in them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mpitrain.errors import UsageError
from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.epoch_line import details, duration, epoch_line, remaining_seconds, start_line
from mpitrain.trainer.objective_options import metric_in_words
from mpitrain.trainer.plan import RunPlan
from mpitrain.trainer.run import Point


def run_of(metric="accuracy", **options):
    """Return what the lines read of a run on three ranks."""
    model = torch.nn.Linear(1000, 2)
    model.bias.requires_grad_(False)
    return SimpleNamespace(
        plan=RunPlan.of(TrainConfig(**options)),
        world=SimpleNamespace(size=3),
        optimizer=SimpleNamespace(n_parameters=2002, param_groups=[{"params": [], "lr": 0.05, "momentum": 0.9}]),
        batches=SimpleNamespace(dataset=SimpleNamespace(n_train=60_000), steps_per_epoch=625),
        passes=SimpleNamespace(objective=SimpleNamespace(metric_name=metric)),
        budget=SimpleNamespace(seconds=None, gradients=18_750),
        model=model,
        learning_rate=0.0125,
    )


POINT = Point(12.34, 5, 15, 0, 2.0, 0.0, test_loss=0.5, test_accuracy=0.25, test_metric=0.875)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1:00"), (125, "2:05"), (3600, "1:00:00"), (90_061, "25:01:01")],
)
def test_a_duration_is_read_at_a_glance(seconds, text):
    assert duration(seconds) == text


def test_the_remaining_time_follows_from_the_pace():
    assert remaining_seconds(done=30, total=120, seconds=10) == 30
    assert remaining_seconds(done=130, total=120, seconds=10) == 0
    assert remaining_seconds(done=0, total=120, seconds=1) is None


def test_an_evaluation_is_a_line():
    assert epoch_line(run_of(), POINT, 0.4567, 125.0) == (
        "epoch    2.0     12.3 s  train loss 0.4567  test loss 0.5000  test accuracy 87.50%  lr 0.0125  ETA 2:05"
    )
    assert epoch_line(run_of("mae"), POINT, 0.4567, None).endswith("test mae 0.875  lr 0.0125")


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [("top5", 0.5, "top5 50.00%"), ("perplexity", 17.1234, "perplexity 17.12"), ("m.n:own", 2.0, "own 2")],
)
def test_a_metric_has_its_name_and_its_unit(name, value, text):
    assert metric_in_words(name, value) == text


def test_the_start_of_a_run_is_a_line():
    options = {"algorithm": "easgd", "optimizer": "adamw", "batch_size": 10, "batch_sizes": {"2": "12"}}
    assert start_line(run_of(**options)) == (
        "mlp: 2,002 parameters; easgd on 3 ranks, adamw, lr 0.05; 60,000 training samples, 32 per step"
    )


def test_the_details_are_all_that_was_decided():
    options = {"schedule": "cosine", "schedule_settings": {"final": "0.1"}, "warmup": 7, "precision": "bfloat16"}
    found = list(details(run_of(settings={"period": "3"}, **options)))
    assert any(line.startswith("method: easgd (") and "period=3" in line for line in found)
    assert "optimizer: sgd (lr=0.05, momentum=0.9)" in found
    assert "schedule: cosine (final=0.1), warm-up 7 steps" in found
    assert "precision: bfloat16; loss: cross_entropy; metric: accuracy" in found
    assert "budget: 18,750 gradients; an epoch has 625 steps of each rank" in found
    assert found[-2:] == [
        "parameter weight: (2, 1000), 2,000 numbers",
        "parameter bias: (2,), 2 numbers, frozen",
    ]


def test_a_run_is_quiet_or_verbose():
    with pytest.raises(UsageError, match="give --quiet or --verbose, not both"):
        TrainConfig(quiet=True, verbose=True)
