"""Steps of torch.optim.SGD by one kernel per tensor: the same parameters and the same state as torch's."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from mpitrain.optimizer.flat import FlatParameters
from mpitrain.optimizer.fused_sgd import FusedSGD, is_plain_sgd
from mpitrain.optimizer.layout import FlatLayout

SETTINGS = [
    {},
    {"weight_decay": 0.02},
    {"momentum": 0.9},
    {"momentum": 0.8, "weight_decay": 0.02},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.02},
]
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14}


def mlp(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def groups(model, **settings):
    return torch.optim.SGD(
        [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.02}], lr=0.1, **settings
    )


def fused(model, base):
    layout = FlatLayout(base.param_groups)
    x, g = np.zeros((2, layout.n), layout.dtype)
    FlatParameters(layout, x, g)
    return FusedSGD(base, layout, x)


def steps(model, n, step, seed=0, first=0):
    for t in range(first, first + n):
        x = torch.from_numpy(np.random.default_rng([seed, t]).normal(size=(4, 5))).to(model[0].weight.dtype)
        model.zero_grad()
        (model(x) ** 2).sum().backward()
        if t == 2:
            model[2].bias.grad = None  # torch does not update such a parameter
        step()


def assert_equal(a, b, dtype):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_steps_equal_torchs(settings, dtype):
    plain, twin = mlp(dtype), mlp(dtype)
    optimizer, base = groups(plain, **settings), groups(twin, **settings)
    ours = fused(twin, base)
    steps(plain, 8, optimizer.step)
    steps(twin, 8, ours.step)
    assert_equal(plain, twin, dtype)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_torch_can_take_over_and_give_back(settings):
    plain, twin = mlp(torch.float64), mlp(torch.float64)
    optimizer, base = groups(plain, **settings), groups(twin, **settings)
    ours = fused(twin, base)
    steps(plain, 8, optimizer.step)
    for t, step in enumerate([ours.step, ours.step, base.step, ours.step, base.step, base.step, ours.step, ours.step]):
        steps(twin, 1, step, first=t)
    assert_equal(plain, twin, torch.float64)


def test_settings_may_change_at_any_step():
    plain, twin = mlp(torch.float64), mlp(torch.float64)
    optimizer, base = groups(plain), groups(twin)
    ours = fused(twin, base)
    for k, (rate, momentum) in enumerate([(0.1, 0.0), (0.05, 0.9), (0.01, 0.5)]):
        for one in (optimizer, base):
            for group in one.param_groups:
                group["lr"], group["momentum"] = rate, momentum
        steps(plain, 3, optimizer.step, seed=k)
        steps(twin, 3, ours.step, seed=k)
    assert_equal(plain, twin, torch.float64)


def test_a_parameter_frozen_later_does_not_affect_the_others():
    plain, twin = mlp(torch.float64), mlp(torch.float64)
    optimizer, base = groups(plain, momentum=0.9), groups(twin, momentum=0.9)
    ours = fused(twin, base)
    for model, step in ((plain, optimizer.step), (twin, ours.step)):
        steps(model, 2, step)
        model[0].weight.requires_grad_(False)
        steps(model, 3, step, first=3)
    assert_equal(plain, twin, torch.float64)


def test_state_goes_into_a_plain_optimizer_and_back():
    settings = {"momentum": 0.9}
    plain, twin, third = mlp(torch.float64), mlp(torch.float64), mlp(torch.float64)
    optimizer, base, other = (groups(model, **settings) for model in (plain, twin, third))
    ours, again = fused(twin, base), fused(third, other)
    steps(plain, 5, optimizer.step)
    steps(twin, 5, ours.step)
    steps(third, 1, again.step, seed=9)  # so that it has a velocity of its own
    third.load_state_dict(copy.deepcopy(twin.state_dict()))
    other.load_state_dict(copy.deepcopy(base.state_dict()))
    steps(plain, 5, optimizer.step, seed=1)
    steps(third, 5, again.step, seed=1)
    assert_equal(plain, third, torch.float64)


class Noisy(torch.optim.SGD):
    """A user's subclass of SGD."""


def hooked(base, register):
    getattr(base, register)(lambda *_: None)
    return base


def scheduled(base):
    torch.optim.lr_scheduler.StepLR(base, 3)
    return base


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), True),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1), True),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1), False),
        (lambda p: torch.optim.SGD(p, lr=0.1, maximize=True), False),
        (lambda p: torch.optim.SGD(p, lr=0.1, differentiable=True), False),
        (lambda p: Noisy(p, lr=0.1), False),
        (lambda p: torch.optim.AdamW(p, lr=0.1), False),
        (lambda p: hooked(torch.optim.SGD(p, lr=0.1), "register_step_pre_hook"), False),
        (lambda p: hooked(torch.optim.SGD(p, lr=0.1), "register_step_post_hook"), False),
        (lambda p: scheduled(torch.optim.SGD(p, lr=0.1)), True),
    ],
    ids=["plain", "all", "dampening", "maximize", "differentiable", "subclass", "adamw", "pre", "post", "scheduler"],
)
def test_sgd_is_plain_only_if_the_kernels_compute_the_same(make, wanted):
    assert is_plain_sgd(make(mlp(torch.float32).parameters())) is wanted
