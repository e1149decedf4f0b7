"""States are loaded where they belong, and are copies."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from mpitrain import EASGD, AllReduceSGD, Average, DistributedOptimizer, LocalSGD, UsageError
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

    @pytest.mark.parametrize("kind", ["center", "mean"])
    def test_a_list_of_the_states_of_another_number_of_ranks_is_loaded(self, world, kind):
        """The states of 3 ranks: that of this rank, changed, three times."""
        method = EASGD(period=1) if kind == "center" else LocalSGD(period=2)
        model, before = model_of(momentum_sgd, method)
        descend(model, before, 3)
        state, states = world.comm.bcast(before.state_dict()), []
        before.close()
        for rank in range(3):
            states.append(copy.deepcopy(state) | {"rank": rank, "ranks": 3})
            states[rank]["parameters"] *= 1 + rank
            for entries in states[rank]["base"]["state"].values():
                entries["momentum_buffer"] *= rank
        model, after = model_of(momentum_sgd, method)
        after.load_state_dict(states)
        found = after.state_dict()
        expected = state["method"]["center"] if kind == "center" else 2 * state["parameters"]
        torch.testing.assert_close(found["parameters"], expected, rtol=1e-6, atol=0)
        for parameter, entries in state["base"]["state"].items() if kind == "mean" else ():
            mean = found["base"]["state"][parameter]["momentum_buffer"]
            torch.testing.assert_close(mean, entries["momentum_buffer"])
        assert bool(found["base"]["state"]) == (kind == "mean")
        descend(model, after)
        with pytest.raises(UsageError, match="before the first step"):
            after.load_state_dict(states)
        with pytest.raises(UsageError, match="load a list of the states of all 3 ranks"):
            after.load_state_dict(states[0])
        after.close()
        model, after = model_of(momentum_sgd, method)
        with pytest.raises(UsageError, match=r"0 of 3 is that of rank 2 of 3: .* in the order of the ranks"):
            after.load_state_dict(states[::-1])
        after.close()

    def test_a_list_of_the_states_of_as_many_ranks_gives_each_its_own(self, world):
        model, before = model_of(momentum_sgd, EASGD(period=1))
        descend(model, before, 2 + world.rank)
        before.wait()
        world.barrier()
        states = world.allgather(before.state_dict())
        before.close()
        model, after = model_of(momentum_sgd, EASGD(period=1))
        after.load_state_dict(states)
        assert torch.equal(after.state_dict()["parameters"], states[world.rank]["parameters"])
        after.close()

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
