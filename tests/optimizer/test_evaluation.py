"""The distance of the workers from a vector, and the elastic energy."""

import numpy as np
import pytest
import torch
from torch import nn

from mpitrain import EASGD, DistributedOptimizer, GossipSGD
from mpitrain.optimizer import evaluation

pytestmark = [pytest.mark.ranks(2, 3), pytest.mark.time_limit(180)]


def at(world, model, optimizer, values):
    """Let each rank hold its value everywhere. Collective."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(values[world.rank])
    world.barrier()


def test_spread_is_the_root_mean_square_distance_and_the_energy_of_the_springs(world):
    model = nn.Linear(15, 1, bias=True).double()  # 16 parameters, on two 64-byte boundaries
    base = torch.optim.SGD(
        [{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "lr": 0.5}, {"params": [], "lr": 0.2}]
    )
    method = EASGD(moving_rate=0.3, period=1)
    with DistributedOptimizer(base, model, method, world=world) as optimizer:
        values = [2.0, -1.0, 4.0, 0.5][: world.size]
        at(world, model, optimizer, values)
        vector = optimizer.consensus_vector() * 0 + 1.0
        vector[15] = 0  # padding between the tensors, and after the last
        vector[17:] = 0
        squares = [16 * (value - 1.0) ** 2 for value in values]
        distance, energy = optimizer.spread(vector)
        assert distance == pytest.approx(np.sqrt(np.mean(squares)))
        rho = method.elastic_coefficient(world.size, 0.5)
        assert rho > 0
        assert energy == pytest.approx(rho / 2 * sum(squares))
        world.barrier()


def test_of_many_workers_some_are_measured_evenly(world, monkeypatch):
    monkeypatch.setattr(evaluation, "MOST_MEASURED", 2)
    model = nn.Linear(16, 1, bias=False).double()
    with DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, GossipSGD(), world=world
    ) as optimizer:
        values = [1.0, 2.0, 3.0, 4.0][: world.size]
        at(world, model, optimizer, values)
        measured = values if world.size <= 2 else values[::2]
        distance, energy = optimizer.spread(np.zeros(16))
        assert distance == pytest.approx(np.sqrt(np.mean([16 * value**2 for value in measured])))
        assert energy == 0
        world.barrier()
