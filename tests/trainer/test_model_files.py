"""The model files of a run load in plain torch and give the loss that the run has reported."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from mpitrain import data
from mpitrain.records import durable
from mpitrain.trainer import model_files
from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.loop import train
from mpitrain.trainer.objective_options import Target
from mpitrain.trainer.ranking import Ranking
from mpitrain.trainer.run import Point
from mpitrain.trainer.study import OneProcess

DATA = "synthetic:n=64,test=40,shape=6,classes=3"
OPTIONS = {"data": DATA, "model": "trainer.test_model_files:model", "batch_size": 16, "quiet": True}


class Net(nn.Module):
    """A model with BatchNorm and tied weights."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b, self.out = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.out(self.b(self.norm(self.a(x))))


def model():
    return Net()


def loss_of(path):
    """Return the test loss of a file in plain torch."""
    net = Net()
    net.load_state_dict(load_file(path))
    net.eval()
    ((x, y),) = data.load(DATA, world=OneProcess()).test_batches(40)
    with torch.no_grad():
        return float(nn.functional.cross_entropy(net(x), y))


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("options", [{}, {"lr": 0.7}, {"defer_evaluation": True}], ids=["", "gets worse", "deferred"])
def test_the_final_and_the_best_model_are_written(world, mpi_tmp_path, options):
    folder = Path(mpi_tmp_path) / "run"
    found = train(TrainConfig("allreduce", **OPTIONS, steps=8, evaluate_every=2, out=str(folder), **options), world)
    if world.rank == 0:
        assert loss_of(folder / "model.safetensors") == pytest.approx(found["test_loss"], rel=1e-4)
        losses = [point["test_loss"] for point in found["evaluation"]]
        if options.get("defer_evaluation"):
            assert not (folder / "best-model.safetensors").exists()
        else:
            assert loss_of(folder / "best-model.safetensors") == pytest.approx(min(losses), rel=1e-4)
            with safe_open(folder / "best-model.safetensors", "pt") as file:
                assert int(file.metadata()["step"]) == found["evaluation"][int(np.argmin(losses))]["step"]
        if "lr" in options:
            assert min(losses) < losses[-1]
    world.barrier()


@pytest.mark.ranks(1)
def test_a_run_without_a_folder_writes_no_model(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(TrainConfig("easgd", **OPTIONS, steps=2), world)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_be_written_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(durable, "injected_errno", 28)
    evaluator = SimpleNamespace(evaluated={"a": torch.zeros(1)}, objective=SimpleNamespace(metric_name="accuracy"))
    hook = model_files.ModelFiles(evaluator, Ranking(None, higher_is_better=True), deferred=False)
    plan = SimpleNamespace(method=SimpleNamespace(name="easgd"), config=TrainConfig())
    point = Point(0.0, 0, 0, 0, 0.0, 0.0, test_loss=1.0)
    hook.on_evaluation(SimpleNamespace(folder=tmp_path, points=[point], plan=plan), point)
    assert "best-model.safetensors is missing" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_the_best_is_the_first_of_equal_ones_and_never_one_that_has_failed():
    def points(*values):
        return [Point(0.0, 0, 0, 0, 0.0, 0.0, test_loss=value, test_metric=value) for value in values]

    by_loss, by_metric = (Ranking(target, higher_is_better=True) for target in (None, Target("accuracy", 0.9)))
    assert by_loss.best(points(3, 1, 1, 2)) == 1
    assert by_metric.best(points(1, 3, 3, 2)) == 1
    assert by_loss.best(points(float("nan"), 2, float("nan"))) == 1
    assert by_loss.best(points(float("nan"), float("nan"))) == 0
