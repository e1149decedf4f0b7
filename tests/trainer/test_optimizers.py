"""Local optimizers by name: their settings, their equations and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mpitrain.errors import UsageError
from mpitrain.trainer import optimizers
from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.lion import Lion
from mpitrain.trainer.optimizers import Rates
from mpitrain.trainer.plan import RunPlan

RATES = Rates(lr=0.01, momentum=0.9, weight_decay=0.1)


class Own(torch.optim.SGD):
    """A user's optimizer, with settings of several types."""

    def __init__(self, params, lr, weight_decay=0.0, scale=1.0, shape=(1,), loud=False):
        if scale < 0:
            raise ValueError("scale is negative")
        super().__init__(params, lr=lr * scale, weight_decay=weight_decay)
        self.given = (scale, shape, loud)


def parameters():
    return [torch.nn.Parameter(torch.ones(3))]


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("sgd", {}, torch.optim.SGD(parameters(), 0.01, 0.9, weight_decay=0.1)),
        ("sgd", {"nesterov": "true"}, torch.optim.SGD(parameters(), 0.01, 0.9, 0, 0.1, True)),
        ("sgd", {"dampening": "0.5"}, torch.optim.SGD(parameters(), 0.01, 0.9, 0.5, 0.1)),
        ("adam", {}, torch.optim.Adam(parameters(), 0.01, weight_decay=0.1)),
        ("adam", {"amsgrad": "yes"}, torch.optim.Adam(parameters(), 0.01, weight_decay=0.1, amsgrad=True)),
        ("adamw", {"beta2": "0.95"}, torch.optim.AdamW(parameters(), 0.01, (0.9, 0.95), weight_decay=0.1)),
        ("adamw", {"beta1": "0", "eps": "1e-6"}, torch.optim.AdamW(parameters(), 0.01, (0.0, 0.999), 1e-6, 0.1)),
        ("lion", {"beta1": "0.95"}, Lion(parameters(), 0.01, (0.95, 0.99), 0.1)),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_name_and_its_settings_are_the_optimizer_of_torch(name, settings, expected):
    made = optimizers.create(name, settings).make(parameters(), RATES)
    assert type(made) is type(expected)
    assert made.defaults == expected.defaults


def test_lion_is_its_equation():
    draw, (eta, decay, beta1, beta2) = np.random.default_rng(0), (0.02, 0.3, 0.8, 0.6)
    x, m = draw.normal(size=5), np.zeros(5)
    parameter = torch.nn.Parameter(torch.tensor(x))
    optimizer = Lion([parameter], lr=eta, betas=(beta1, beta2), weight_decay=decay)
    for _ in range(6):
        g = draw.normal(size=5)
        parameter.grad = torch.tensor(g)
        optimizer.step()
        c = beta1 * m + (1 - beta1) * g
        x = x - eta * (np.sign(c) + decay * x)
        m = beta2 * m + (1 - beta2) * g
        np.testing.assert_allclose(parameter.detach().numpy(), x, rtol=1e-12)


def test_lion_leaves_out_parameters_without_a_gradient_and_takes_a_closure():
    used, unused = parameters() + parameters()
    optimizer = Lion([used, unused], lr=0.5)

    def closure():
        optimizer.zero_grad()
        loss = used.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3
    assert used.tolist() == [0.5] * 3
    assert unused.tolist() == [1] * 3


def test_an_optimizer_of_the_users_gets_literals_and_the_rates_it_knows():
    settings = {"scale": "2.5", "shape": "(3, 4)", "loud": "true"}
    made = optimizers.create("trainer.test_optimizers:Own", settings).make(parameters(), Rates(0.01, None, 0.1))
    assert type(made).__name__ == "Own"
    assert made.given == (2.5, (3, 4), True)
    assert (made.defaults["lr"], made.defaults["weight_decay"]) == (0.025, 0.1)


@pytest.mark.parametrize(
    ("path", "settings", "momentum", "message"),
    [
        ("trainer.test_optimizers:Own", {"skale": "2"}, None, "no setting 'skale': did you mean scale"),
        ("trainer.test_optimizers:Own", {"scale": "-2"}, None, "refuses its settings .scale is negative.: correct"),
        ("trainer.test_optimizers:Own", {}, 0.5, "has no momentum: remove --momentum"),
        ("trainer.test_optimizers:Nothing", {}, None, "has no function 'Nothing': check its name"),
        ("trainer.nothing:Own", {}, None, r"cannot be imported \(ModuleNotFoundError"),
        ("builtins:dict", {}, None, "no inspectable signature|not a torch.optim.Optimizer"),
    ],
)
def test_an_optimizer_of_the_users_that_does_not_fit_is_refused(path, settings, momentum, message):
    with pytest.raises(UsageError, match=message):
        optimizers.create(path, settings).make(parameters(), Rates(0.01, momentum, 0.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adamm"}, "unknown optimizer 'adamm': did you mean adamw?|did you mean adam?"),
        ({"optimizer": "rmsprop"}, "it must be one of sgd, adam, adamw, lion, or module:Class"),
        ({"optimizer": "adamw", "optimizer_settings": {"betta2": "0.9"}}, "'betta2': did you mean beta2"),
        ({"optimizer": "adamw", "optimizer_settings": {"beta2": "1"}}, "adamw: beta2 must be a number >= 0 and < 1"),
        ({"optimizer": "adamw", "optimizer_settings": {"beta2": "x"}}, "adamw: beta2 must be a number, not 'x'"),
        ({"optimizer": "adam", "momentum": 0.5}, "adam has no momentum: remove --momentum"),
        ({"optimizer": "lion", "algorithm": "eamsgd"}, "eamsgd makes the update itself: remove --optimizer"),
        ({"optimizer": "trainer.test_optimizers:Own", "algorithm": "parle"}, "parle makes the update itself"),
        ({"algorithm": "eamsgd", "optimizer_settings": {"nesterov": "true"}}, "remove --optimizer-set"),
        ({"momentum": 0.0, "optimizer_settings": {"nesterov": "true"}}, "nesterov needs a --momentum above 0"),
    ],
)
def test_an_option_that_cannot_be_honoured_is_refused_with_the_plan(options, message):
    with pytest.raises(UsageError, match=message):
        RunPlan.of(TrainConfig(**options))


def test_the_default_momentum_is_that_of_sgd_only():
    momenta = {name: RunPlan.of(TrainConfig(optimizer=name)).base_momentum for name in optimizers.KINDS}
    assert momenta == {"sgd": 0.9, "adam": 0.0, "adamw": 0.0, "lion": 0.0}
    assert RunPlan.of(TrainConfig(optimizer="m:C")).rates.momentum is None
    assert RunPlan.of(TrainConfig(optimizer="m:C", momentum=0.3)).rates.momentum == 0.3
