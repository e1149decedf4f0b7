"""Training on a GPU and on the host, by every transport: synchronous methods agree up to float32 rounding.

The oracle is the same run in float64 on the host. A float32 run differs from it by rounding, on the host as on a GPU.
The two sum in different orders, so their errors are of the same size but not equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mpitrain
from mpitrain.algorithms.base.method import Method

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.ranks(1, 2, 4),
    pytest.mark.time_limit(180),
    pytest.mark.usefixtures("exact"),
]

STEPS = 10
INPUTS, HIDDEN, CLASSES, BATCH = 20, 64, 5, 16
LARGEST_ERROR_RATIO = 8.0
"""GPU error over host error. The host's error is about 1e-6 of the distance trained; one update is 1/STEPS of it."""

METHODS: dict[str, Method] = {
    "allreduce": mpitrain.AllReduceSGD(),
    "easgd": mpitrain.EASGD(synchronous=True, period=2),
    "easgd, center first": mpitrain.EASGD(synchronous=True, period=2, order="center_first"),
    "eamsgd": mpitrain.EAMSGD(synchronous=True, period=2, momentum=0.9),
    "localsgd": mpitrain.LocalSGD(period=3),
    "slowmo": mpitrain.SlowMo(period=3),
    "diloco": mpitrain.DiLoCo(period=3),
    "dasgd": mpitrain.DaSGD(period=3),
    "dpsgd": mpitrain.DPSGD(),
    "sgp": mpitrain.StochasticGradientPush(),
    "admm": mpitrain.ADMM(mode="sync"),
    "lsgd": mpitrain.LSGD(period=2, synchronous=True),
}


def train(world: Any, method: Method, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Train, and return this rank's parameters before and after. Collective."""
    torch.manual_seed(0)
    # A smooth activation: rounding could switch a ReLU, which would not be a rounding error.
    model = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES)).to(world.device, dtype)
    momentum = 0.0 if method.owns_update else 0.9
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum, weight_decay=0.01)
    before = numbers(model)
    with mpitrain.DistributedOptimizer(base, model, method, world=world, seed=3) as optimizer:
        for t in range(STEPS):
            generator = torch.Generator().manual_seed(1000 * world.rank + t)
            x = torch.randn(BATCH, INPUTS, generator=generator).to(world.device, dtype)
            y = torch.randint(CLASSES, (BATCH,), generator=generator).to(world.device)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step(loss)
        world.barrier()
    return before, numbers(model)


def numbers(model: nn.Module) -> np.ndarray:
    return np.concatenate([p.detach().cpu().double().numpy().ravel() for p in model.parameters()])


@pytest.mark.parametrize("transport", ["auto", "ipc", "staged"])
@pytest.mark.parametrize("name", METHODS)
def test_a_run_on_a_gpu_matches_the_run_on_the_host(world_on: Callable[..., Any], name: str, transport: str) -> None:
    host = world_on("cpu")
    before, exact = train(host, METHODS[name], torch.float64)
    _, rounded = train(host, METHODS[name], torch.float32)
    _, found = train(world_on("cuda", transport), METHODS[name], torch.float32)
    way, error = np.linalg.norm(exact - before), np.linalg.norm(rounded - exact)
    assert 0 < error < 1e-4 * way  # the yardstick is rounding
    assert np.linalg.norm(found - exact) < LARGEST_ERROR_RATIO * error


@pytest.mark.parametrize("transport", ["auto", "ipc"])
@pytest.mark.parametrize("name", METHODS)
def test_every_transport_matches_staging(world_on: Callable[..., Any], name: str, transport: str) -> None:
    _, staged = train(world_on("cuda", "staged"), METHODS[name], torch.float64)
    before, found = train(world_on("cuda", transport), METHODS[name], torch.float64)
    assert np.linalg.norm(found - staged) < 1e-12 * np.linalg.norm(staged - before)


@pytest.mark.parametrize("transport", ["ipc", "staged"])
@pytest.mark.parametrize(
    "method",
    [mpitrain.EASGD(period=1), mpitrain.EAMSGD(period=2, momentum=0.9), mpitrain.GossipSGD(), mpitrain.ADPSGD()],
    ids=lambda method: method.name,
)
def test_asynchronous_methods_train_on_a_gpu(world_on: Callable[..., Any], method: Method, transport: str) -> None:
    """Exchange order is arbitrary: parameters stay finite and move about as far as on the host."""
    before, there = train(world_on("cpu"), method, torch.float32)
    _, found = train(world_on("cuda", transport), method, torch.float32)
    assert np.isfinite(found).all()
    way = np.linalg.norm(there - before)
    assert 0.3 * way < np.linalg.norm(found - before) < 3 * way


@pytest.mark.parametrize("transport", ["ipc", "staged"])
def test_a_checkpoint_resumes_the_run(world_on: Callable[..., Any], transport: str) -> None:
    world = world_on("cuda", transport)

    def steps(optimizer: Any, model: nn.Module, first: int, last: int) -> None:
        for t in range(first, last):
            generator = torch.Generator().manual_seed(1000 * world.rank + t)
            optimizer.zero_grad()
            model(torch.randn(BATCH, INPUTS, generator=generator).to(world.device)).square().mean().backward()
            optimizer.step()

    def made() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = nn.Linear(INPUTS, CLASSES).to(world.device)
        base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        method = mpitrain.EASGD(synchronous=True, period=2)
        return model, mpitrain.DistributedOptimizer(base, model, method, world=world)

    model, optimizer = made()
    steps(optimizer, model, 0, 5)
    state = optimizer.state_dict()
    assert state["parameters"].device.type == "cpu"
    steps(optimizer, model, 5, 9)
    world.barrier()
    wanted = numbers(model)
    optimizer.close()
    model, optimizer = made()
    optimizer.load_state_dict(state)
    steps(optimizer, model, 5, 9)
    world.barrier()
    np.testing.assert_allclose(numbers(model), wanted, rtol=1e-6, atol=1e-8)
    optimizer.close()
