"""What is evaluated is the model that is trained: its parameters, and everything else that it holds."""

import numpy as np
import pytest
import torch
from torch import nn

from mpitrain.data import load
from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.evaluation import Evaluator
from mpitrain.trainer.loop import train
from mpitrain.trainer.objective import Objective
from mpitrain.trainer.study import OneProcess


class Centered(nn.Module):
    """Subtracts a running mean of its own, which begins far from that of the digits."""

    def __init__(self, persistent, dtype):
        super().__init__()
        self.register_buffer("mean", torch.full((64,), 50.0, dtype=dtype), persistent=persistent)
        self.out = nn.Linear(64, 10, dtype=dtype)

    def forward(self, x):
        x = x.flatten(1)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.out(x - self.mean)


def centered():
    return Centered(persistent=True, dtype=torch.float32)


def centered_in_secret():
    return Centered(persistent=False, dtype=torch.float64)


def narrow():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).bfloat16()


MODELS = ["centered", "centered_in_secret", "narrow"]


@pytest.mark.ranks(2)
@pytest.mark.time_limit(180)
@pytest.mark.parametrize("deferred", [False, True], ids=["at once", "deferred"])
@pytest.mark.parametrize("model", MODELS)
def test_a_model_with_a_mean_of_its_own_and_models_of_every_type_are_evaluated_as_trained(world, model, deferred):
    config = TrainConfig(
        "allreduce", model=f"trainer.test_evaluation:{model}", epochs=3, quiet=True, defer_evaluation=deferred
    )
    assert train(config, world)["test_accuracy"] > 0.5  # 0.1 with the buffer of the start


class Constant(nn.Module):
    """Answers the class that a counter names, whatever the parameters."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.n_calls = 0

    def forward(self, x):
        logits = torch.zeros(len(x), 4)
        logits[:, self.n_calls] = 9.0
        return logits * self.weight


def test_an_evaluation_sees_the_present_attributes_and_changes_none():
    model, data = Constant(), load("synthetic:n=64,test=101,shape=6,classes=4,separation=2", world=OneProcess())
    fractions = [np.mean(data.test_labels == k) for k in range(2)]
    assert fractions[0] != fractions[1]
    evaluator = Evaluator(model, data, "cpu", Objective(TrainConfig(), data))
    vector = evaluator.empty_vector()
    vector[...] = 1
    assert evaluator.evaluate(vector)[1] == fractions[0]
    kept = evaluator.snapshot()
    model.n_calls = 1
    model.train()
    assert evaluator.evaluate(vector)[1] == fractions[1]
    assert model.training
    with evaluator.of_another(kept):
        assert evaluator.evaluate(vector)[1] == fractions[0]
    assert evaluator.evaluate(vector)[1] == fractions[1]
