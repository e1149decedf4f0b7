"""The model inside ``consensus()`` past torch's caches, state dicts of it, and the model after ``close``."""

import io

import numpy as np
import pytest
import torch
from torch import nn

from mpitrain import EASGD, AllReduceSGD, DistributedOptimizer, GossipSGD, UsageError, reestimate_batchnorm

# The first optimizer imports a large part of torch, which is slow where ranks share a core.
pytestmark = [pytest.mark.ranks(2), pytest.mark.time_limit(180)]

X = torch.linspace(-1, 1, 40).reshape(8, 5)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16)), nn.Tanh(), nn.Linear(16, 2))


def wrapped(model, method=None, **settings):
    """An optimizer whose consensus stays at the start while the rank moves."""
    base = torch.optim.SGD(model.parameters(), **{"lr": 0.2, **settings})
    return DistributedOptimizer(base, model, method or EASGD(moving_rate=0.0, period=1))


def descend(model, optimizer, n=3):
    for _ in range(n):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()


@torch.no_grad()
def shown(model):
    return model.eval()(X).float()


def test_an_open_autocast_region_does_not_hide_the_consensus(world):
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2))
    with wrapped(model) as optimizer:
        descend(model, optimizer)
        with optimizer.consensus(), torch.autocast("cpu", torch.bfloat16):
            wanted = model(X)
        with torch.autocast("cpu", torch.bfloat16):
            own = model(X)
            with optimizer.consensus():
                inside = model(X)
            after = model(X)
        assert torch.equal(inside, wanted)
        assert torch.equal(after, own)
        assert not torch.equal(own, wanted)


def test_an_open_autocast_region_does_not_hide_a_step(world):
    model = nn.Linear(5, 2)
    with wrapped(model) as optimizer:
        with torch.autocast("cpu", torch.bfloat16):
            descend(model, optimizer)
            inside = model(X)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(X), inside)


def test_cached_parametrizations_do_not_hide_the_consensus(world):
    parametrize = nn.utils.parametrize
    model = nn.Linear(5, 5)
    nn.utils.parametrizations.weight_norm(model)
    with wrapped(model) as optimizer:
        descend(model, optimizer)
        with optimizer.consensus():
            wanted = shown(model)
        with parametrize.cached():
            own = shown(model)
            with optimizer.consensus():
                assert torch.equal(shown(model), wanted)
            assert torch.equal(shown(model), own)
        assert not torch.equal(own, wanted)


def test_captured_parameters_show_the_consensus(world):
    model = nn.Linear(5, 2)
    captured = dict(model.named_parameters())
    with wrapped(model) as optimizer:
        descend(model, optimizer)
        with optimizer.consensus():
            wanted = shown(model)
            assert torch.equal(torch.func.functional_call(model, captured, X), wanted)
        assert not torch.equal(torch.func.functional_call(model, captured, X), wanted)


@pytest.mark.ranks(1)
def test_a_compiled_model_shows_the_consensus(world):
    model = nn.Linear(5, 2)
    compiled = torch.compile(model, backend="eager")
    with wrapped(model) as optimizer:
        descend(compiled, optimizer)
        own = compiled(X)
        with optimizer.consensus():
            assert torch.equal(compiled(X), model(X))
            assert not torch.equal(compiled(X), own)
            state = optimizer.consensus_state_dict(compiled)
            assert torch.equal(state["_orig_mod.weight"], model.weight)
        assert torch.equal(compiled(X), own)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad], ids=["inference", "no_grad"])
def test_training_goes_on_after_an_evaluation_without_gradients(world, mode):
    model = mlp()
    with wrapped(model) as optimizer:
        descend(model, optimizer)
        with mode(), optimizer.consensus():
            model(X)
        descend(model, optimizer)
        with mode():
            state = optimizer.consensus_state_dict()
        state["2.bias"].add_(1.0)  # an inference tensor would refuse this


def test_the_state_dict_is_that_of_the_model_inside_consensus(world):
    model = mlp()
    with wrapped(model) as optimizer:
        descend(model, optimizer)
        state = optimizer.consensus_state_dict()
        with optimizer.consensus():
            wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert list(state) == list(wanted)
        assert all(torch.equal(state[name], wanted[name]) for name in wanted)
        assert not torch.equal(state["2.weight"], model[2].weight)
        assert not any(tensor.requires_grad for tensor in state.values())


@pytest.mark.parametrize("inside", [False, True], ids=["method", "inside consensus"])
def test_a_state_dict_does_not_change_later(world, inside):
    model = mlp()
    with wrapped(model, EASGD(period=1)) as optimizer:
        descend(model, optimizer)
        if inside:
            with optimizer.consensus():
                state = model.state_dict()
                del state["0.1.running_mean"], state["0.1.running_var"], state["0.1.num_batches_tracked"]
        else:
            state = optimizer.consensus_state_dict()
        before = {name: tensor.clone() for name, tensor in state.items()}
        world.barrier()
        descend(model, optimizer)
        with optimizer.consensus():
            assert not torch.equal(model[2].weight, before["2.weight"])
        optimizer.consensus_vector()
        assert all(torch.equal(state[name], before[name]) for name in before)
        world.barrier()


@pytest.mark.parametrize("inside", [False, True], ids=["method", "inside consensus"])
def test_a_saved_submodule_has_its_own_size(world, inside):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(500, 500))
    with wrapped(model) as optimizer:
        file = io.BytesIO()
        if inside:
            with optimizer.consensus():
                torch.save(model[0].state_dict(), file)
        else:
            torch.save(optimizer.consensus_state_dict(model[0]), file)
        assert file.tell() < 10_000
        file.seek(0)
        assert torch.equal(torch.load(file)["weight"], model[0].weight)


def test_reestimated_buffers_are_kept_with_the_consensus(world):
    model = mlp()
    with wrapped(model) as optimizer:
        descend(model, optimizer)
        with optimizer.consensus():
            reestimate_batchnorm(model, [3 * X])
            inside = optimizer.consensus_state_dict()
            mean = model[0][1].running_mean.clone()
        assert torch.equal(inside["0.1.running_mean"], mean)
        assert torch.equal(optimizer.consensus_state_dict()["0.1.running_mean"], model[0][1].running_mean)
        assert not torch.equal(mean, model[0][1].running_mean)


def test_the_state_dict_of_another_model_is_refused(world):
    model = mlp()
    with wrapped(model) as optimizer, pytest.raises(UsageError, match="which the distributed model does not have"):
        optimizer.consensus_state_dict(nn.Linear(2, 2))


@pytest.mark.parametrize("in_groups", [False, True], ids=["ranks", "groups"])
@pytest.mark.parametrize(
    "method",
    [EASGD(period=2), AllReduceSGD(), AllReduceSGD(node_shared=True), GossipSGD()],
    ids=["easgd", "allreduce", "shared", "gossip"],
)
def test_a_closed_optimizer_leaves_the_consensus(world, method, in_groups):
    model = nn.Linear(5, 2)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = DistributedOptimizer(base, model, method, replica_size=world.size if in_groups else 1)
    descend(model, optimizer)
    world.barrier()
    wanted = optimizer.consensus_state_dict() if not in_groups or world.rank == 0 else None
    world.barrier()
    optimizer.close()
    if in_groups:
        wanted = world.comm.bcast(wanted)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())
    if not isinstance(method, GossipSGD):
        of_all = world.comm.allgather(model.weight.detach().numpy().tobytes())
        assert len(set(of_all)) == 1
    assert model.weight.grad is None
    size = model.weight.untyped_storage().nbytes()
    assert size == model.weight.numel() * 4  # memory of its own
    descend(model, base)


def test_a_closed_optimizer_leaves_each_rank_its_buffers(world):
    model = mlp()
    with wrapped(model) as optimizer:
        descend(model, optimizer)
        with torch.no_grad():
            model[0][1].running_mean.fill_(world.rank)
    assert np.array_equal(model[0][1].running_mean.numpy(), np.full(16, world.rank, np.float32))
