"""What a method's worker is made from."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from mpitrain import AllReduceSGD, DistributedOptimizer

pytestmark = [pytest.mark.ranks(1, 2), pytest.mark.time_limit(180)]


@dataclass(frozen=True)
class Recording(AllReduceSGD):
    """A method that records what its worker was made from, and the losses of its steps."""

    needs_loss: ClassVar[bool] = True
    replicas: ClassVar[list] = []
    losses: ClassVar[list] = []

    def worker(self, replica):
        self.replicas.append(replica)
        worker = super().worker(replica)
        step = worker.step
        worker.step = lambda slices, update, loss=None, **more: (
            self.losses.append(loss),
            step(slices, update, loss, **more),
        )[1]
        return worker


@pytest.fixture
def recorded():
    Recording.replicas.clear()
    Recording.losses.clear()
    return Recording


def test_a_worker_gets_seed_layers_and_the_fitness_of_any_parameters(world, recorded):
    model = nn.Linear(3, 2).double()
    base = torch.optim.SGD(model.parameters(), lr=0.1)

    def sum_of_parameters():
        return sum(float(p.detach().sum()) for p in model.parameters())

    with DistributedOptimizer(base, model, recorded(), seed=7, fitness=sum_of_parameters) as optimizer:
        (replica,) = recorded.replicas
        assert replica.seed == 7
        assert replica.layers == (slice(0, 6), slice(8, 10))
        assert replica.x.local[0] == model.weight[0, 0]
        own = sum_of_parameters()
        assert replica.fitness(np.full(16, 2.0)) == 2.0 * 8
        assert replica.fitness(replica.x.local) == own == sum_of_parameters()
        world.barrier()
        assert optimizer.n_parameters == 8


def test_a_worker_gets_the_loss_of_each_step(world, recorded):
    model = nn.Linear(3, 2)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with DistributedOptimizer(base, model, recorded()) as optimizer:
        optimizer.step(torch.tensor(0.25))
        optimizer.step(closure=lambda: torch.tensor(0.5))
    assert recorded.losses == [0.25, 0.5]
