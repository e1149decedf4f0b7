"""States are loaded where they belong, and are copies."""

import numpy as np
import pytest
import torch
from torch import nn

from mpitrain import EASGD, AllReduceSGD, Average, DistributedOptimizer, UsageError
from mpitrain.optimizer.state import Owner

OWNER = Owner("easgd", rank=1, ranks=4, replica_size=2, node_shared=False)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"rank": 2}, "that of rank 2, but this is rank 1"),
        ({"ranks": 3}, "of 3 ranks, but this run has 4"),
        ({"algorithm": "gossip"}, "of gossip, and this optimizer runs easgd"),
        ({"replica_size": 1}, "replica_size 1, and this is 2"),
        ({"node_shared": True}, "keeps the momentum with the method, and this optimizer in the base optimizer"),
    ],
    ids=str,
)
def test_a_state_of_another_owner_is_refused(other, words):
    OWNER.check(vars(OWNER))
    with pytest.raises(UsageError, match=words) as error:
        OWNER.check(vars(OWNER) | other)
    assert "\n" not in str(error.value)


def test_a_state_that_names_no_rank_may_be_any_ranks():
    OWNER.check({"algorithm": "easgd", "replica_size": 2})


def test_a_state_of_something_else_is_refused():
    with pytest.raises(UsageError, match="not a state of a DistributedOptimizer"):
        OWNER.check({"state": {}, "param_groups": []})


def model_of(base, method, **options):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    return model, DistributedOptimizer(base(model.parameters()), model, method, **options)


def descend(model, optimizer, n=1):
    for _ in range(n):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()


def momentum_sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


@pytest.mark.ranks(1, 2)
@pytest.mark.time_limit(180)
class TestOnRanks:
    def test_momentum_in_another_place_is_refused(self, world):
        method = AllReduceSGD(node_shared=True)
        model, shared = model_of(momentum_sgd, method)
        descend(model, shared)
        state = shared.state_dict()
        shared.close()
        hooked = momentum_sgd(model.parameters())
        hooked.register_step_pre_hook(lambda *_: None)  # torch makes the step
        with (
            DistributedOptimizer(hooked, model, method) as optimizer,
            pytest.raises(UsageError, match="momentum with the method, and this optimizer in the base optimizer"),
        ):
            optimizer.load_state_dict(state)

    def test_a_state_without_the_average_is_refused(self, world):
        model, plain = model_of(momentum_sgd, EASGD(period=1))
        state = plain.state_dict()
        plain.close()
        base = momentum_sgd(model.parameters())
        with DistributedOptimizer(base, model, EASGD(period=1), average=Average()) as optimizer:
            with pytest.raises(UsageError, match="or without the average"):
                optimizer.load_state_dict(state)
            assert optimizer.param_groups is base.param_groups
            assert optimizer.state is base.state

    @pytest.mark.parametrize("base", [momentum_sgd, torch.optim.AdamW], ids=["sgd", "adamw"])
    def test_a_state_is_a_copy_whether_saved_or_loaded(self, world, base):
        def values(state):
            arrays = [state["parameters"], *(v for v in state["method"].values() if isinstance(v, torch.Tensor))]
            tensors = [t for s in state["base"]["state"].values() for t in s.values() if isinstance(t, torch.Tensor)]
            return [tensor.numpy().copy() for tensor in (*arrays, *tensors)]

        model, optimizer = model_of(base, EASGD(period=1))
        with optimizer:
            descend(model, optimizer, 2)
            state = optimizer.state_dict()
            before = values(state)
            world.barrier()
            descend(model, optimizer, 2)
            world.barrier()
            optimizer.load_state_dict(state)
            descend(model, optimizer, 2)
            assert all(np.array_equal(a, b) for a, b in zip(values(state), before, strict=True))
            assert any(array.any() for array in before)
            world.barrier()
