"""Gradients of many perceptrons at once."""

import numpy as np
import pytest
import torch
from torch import nn

from mpitrain import data, models
from mpitrain.models.mlp import MLP
from mpitrain.trainer.gradients import ModelGradient
from mpitrain.trainer.stacked_perceptron import linear_layers
from mpitrain.trainer.study import OneProcess

MODELS = {
    "mlp": lambda: MLP(shape=(1, 8, 8), n_classes=10, hidden=(16, 12)),
    "one layer": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
    "no bias": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 7, bias=False), nn.ReLU(), nn.Linear(7, 10)),
    "no ReLU": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 7), nn.Linear(7, 10)),
}


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", world=OneProcess(), sampling="independent")


def gradient_of(name, digits, k):
    torch.manual_seed(0)
    samplers = [data.Sampler(digits.n_train, 8, rank=rank, size=k, seed=0) for rank in range(k)]
    return ModelGradient(MODELS[name](), digits, samplers)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_and_losses_are_those_of_the_backward_pass(name, digits):
    k = 5
    one, many = gradient_of(name, digits, k), gradient_of(name, digits, k)
    assert many.largest_batch > 1
    xs = [
        many.start + np.float32(0.1 * rank) * np.cos(np.arange(many.start.size, dtype=np.float32)) for rank in range(k)
    ]
    ranks = [3, 0, 4, 1, 2]
    out = np.full((k, many.start.size), np.nan, np.float32)
    for _ in range(2):
        many.batch(ranks, [xs[rank] for rank in ranks], out)
        for rank, row in zip(ranks, out, strict=True):
            np.testing.assert_allclose(row, one(rank, xs[rank]), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(many.losses, one.losses, rtol=1e-5)


OTHERS = {
    "cnn7": lambda: models.build("cnn7", shape=(3, 32, 32), n_classes=10, seed=0),
    "dropout": lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 2)),
    "BatchNorm": lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)),
    "ReLU last": lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
    "ReLU first": lambda: nn.Sequential(nn.ReLU(), nn.Linear(4, 4)),
    "frozen": lambda: nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 2)),
    "shared": lambda: (lambda layer: nn.Sequential(layer, nn.ReLU(), layer))(nn.Linear(4, 4)),
    "a subclass": lambda: type("Residual", (MLP,), {"forward": lambda self, x: x})(shape=(4,), n_classes=2),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_are_left_to_torch(name):
    assert linear_layers(OTHERS[name](), [slice(0, 1)] * 20) is None
