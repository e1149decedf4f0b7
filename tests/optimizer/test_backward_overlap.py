"""All-reduce during the backward pass: the same mean, also for what users do between ``backward`` and ``step``."""

import numpy as np
import pytest
import torch
from support.on_gpus import gpus
from support.on_ranks import ranks
from torch import nn

from mpitrain import AllReduceSGD, DistributedOptimizer
from mpitrain.algorithms.synchronous.allreduce import blocks_from_the_end


@pytest.mark.parametrize(
    ("sizes", "at_least", "expected"),
    [
        ([], 4, [(0, 0)]),
        ([3], 4, [(0, 3)]),
        ([4, 4, 4], 4, [(8, 12), (4, 8), (0, 4)]),
        ([4, 1, 1, 2, 9], 4, [(8, 17), (4, 8), (0, 4)]),
        ([1, 1, 1], 4, [(0, 3)]),
        ([100, 1], 4, [(0, 101)]),
    ],
)
def test_blocks_cover_the_vector_from_its_end(sizes, at_least, expected):
    ends = np.cumsum(sizes, dtype=int)
    layers = [slice(int(end) - size, int(end)) for end, size in zip(ends, sizes, strict=True)]
    blocks = blocks_from_the_end(layers, sum(sizes), at_least)
    assert [(block.start, block.stop) for block in blocks] == expected


class Net(nn.Module):
    """Layers of several sizes; odd batches alone use one of them, and one is used twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.twice, self.sometimes, self.last = (
            nn.Linear(a, b, dtype=torch.float64) for a, b in ((6, 9), (9, 9), (9, 9), (9, 4))
        )

    def forward(self, x, t):
        x = torch.tanh(self.twice(torch.tanh(self.twice(torch.tanh(self.first(x))))))
        return self.last(self.sometimes(x) if t % 2 else x)


def batch(rank, t):
    generator = torch.Generator().manual_seed(100 * rank + t)
    return torch.randn(5, 6, generator=generator, dtype=torch.float64), torch.randint(4, (5,), generator=generator)


def train(comm, overlap, *, passes=1, clip=None, set_to_none=True, steps=6):
    """Return the parameters after some steps, and every step's gradients after ``backward``. Collective."""
    model, seen = Net(), []
    base = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=0.01)
    with DistributedOptimizer(base, model, AllReduceSGD(overlap=overlap), world=comm.world) as optimizer:
        for t in range(steps):
            optimizer.zero_grad(set_to_none)
            for k in range(passes):
                x, y = batch(comm.rank, t * passes + k)
                nn.functional.cross_entropy(model(x, t), y).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            if overlap:
                seen.append(np.concatenate([p.grad.numpy().ravel() for p in model.parameters()]))
            optimizer.step()
        found = np.concatenate([p.detach().numpy().ravel() for p in model.parameters()])
    return found, seen


@pytest.fixture(params=[1, 2])
def comm(request, monkeypatch):
    """Communicators of one node and of two, with blocks of one or two layers. Collective."""
    monkeypatch.setattr(blocks_from_the_end, "__defaults__", (50,))
    with ranks(request.param) as communicator:
        yield communicator


@pytest.mark.ranks(2, 4)
@pytest.mark.time_limit(180)
@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_the_mean_is_in_place_when_backward_returns(comm, passes, set_to_none):
    wanted, _ = train(comm, overlap=False, passes=passes)
    found, seen = train(comm, overlap=True, passes=passes, set_to_none=set_to_none)
    np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-12)
    for gradients in seen:
        of_all = comm.world.comm.allgather(gradients)
        assert all(np.array_equal(gradient, of_all[0]) for gradient in of_all)
    # The local gradients differ between ranks, so equal ones are means.
    assert np.abs(seen[0]).max() > 0


@pytest.mark.ranks(2)
@pytest.mark.time_limit(180)
def test_clipping_clips_the_mean(comm):
    found, seen = train(comm, overlap=True, clip=0.1)
    for gradients in seen:
        assert np.linalg.norm(gradients) <= 0.1 + 1e-9
    of_all = comm.world.comm.allgather(found)
    assert all(np.array_equal(vector, of_all[0]) for vector in of_all)


@pytest.mark.ranks(3)
@pytest.mark.time_limit(180)
@pytest.mark.parametrize("where", [(1, "ipc"), (1, "staged"), (2, "staged")], ids=str)
def test_on_gpus_the_mean_is_the_same(world, where, monkeypatch):
    monkeypatch.setattr(blocks_from_the_end, "__defaults__", (50,))
    with ranks(where[0]) as comm:
        wanted, _ = train(comm, overlap=False)
    with gpus(*where) as comm:
        found, _ = train(comm, overlap=True)
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.ranks(2)
@pytest.mark.time_limit(180)
def test_sums_begin_before_the_backward_pass_has_ended(comm):
    """The sum over the last layer's block has begun when the first layer's gradient is computed."""
    model, order = Net(), []
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with DistributedOptimizer(base, model, AllReduceSGD(overlap=True), world=comm.world) as optimizer:
        communicator = optimizer._parts.replica.comm
        start = communicator.start
        communicator.start = lambda fn: (order.append("sum"), start(fn))[1]
        model.first.weight.register_hook(lambda _: order.append("first layer"))
        x, y = batch(comm.rank, 0)
        nn.functional.cross_entropy(model(x, 1), y).backward()
        assert order.index("sum") < order.index("first layer")
        assert order.count("sum") > 2
        optimizer.step()
