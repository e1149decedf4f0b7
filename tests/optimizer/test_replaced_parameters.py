"""A model that is changed after its optimizer was made trains as in one process, or the change is refused."""

import math

import pytest
import torch
from torch import nn

from mpitrain import EAMSGD, EASGD, AllReduceSGD, DiLoCo, DistributedOptimizer, UsageError

pytestmark = [pytest.mark.ranks(2), pytest.mark.time_limit(120)]

X = torch.linspace(-1, 1, 60, dtype=torch.float64).reshape(12, 5)
METHODS = {"allreduce": AllReduceSGD(), "easgd": EASGD(period=2)}


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5)).double()


def sgd(model, **settings):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, **settings})


def train(model, optimizer, steps=1):
    for _ in range(steps):
        optimizer.zero_grad()
        (model(X) - X.sin()).square().mean().backward()
        optimizer.step()


def set_data(model):
    model[0].weight.data = torch.ones(7, 5, dtype=torch.float64)


@torch.no_grad()
def set_memory(model):
    model[0].weight.set_(torch.ones(7, 5, dtype=torch.float64))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("change", [nn.Module.half, set_data, set_memory], ids=["half", "data", "set_"])
def test_moved_parameters_are_refused_at_the_next_evaluation_and_not_undone(world, change, method):
    model = mlp()
    optimizer = DistributedOptimizer(sgd(model), model, METHODS[method])
    train(model, optimizer)
    change(model)
    changed = model[0].weight.detach().clone()
    for evaluate in (lambda: optimizer.consensus().__enter__(), optimizer.consensus_state_dict):
        with pytest.raises(UsageError, match=r"moved or converted after.*before it") as error:
            evaluate()
        assert "\n" not in str(error.value)
    torch.testing.assert_close(model[0].weight.detach(), changed, rtol=0, atol=0)
    world.barrier()
    optimizer.close()


@pytest.mark.parametrize("method", METHODS)
def test_close_leaves_the_consensus_in_the_type_that_the_model_was_converted_to(world, method):
    model = mlp()
    optimizer = DistributedOptimizer(
        sgd(model, lr=0.1 * (1 + world.rank * (method == "easgd"))), model, METHODS[method]
    )
    train(model, optimizer, 3)
    world.barrier()
    wanted = {name: value.half() for name, value in optimizer.consensus_state_dict().items()}
    model.half()
    optimizer.close()
    found = model.state_dict()
    assert {value.dtype for value in found.values()} == {torch.float16}
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def load_assigned(model):
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def replace_layer(model):
    model[2] = nn.Linear(7, 5).double()


def normalize_weight(model):
    nn.utils.parametrizations.weight_norm(model[2])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("change", [load_assigned, replace_layer, normalize_weight], ids=lambda change: change.__name__)
def test_parameters_that_are_new_in_the_model_are_refused(world, change, method):
    model = mlp()
    optimizer = DistributedOptimizer(sgd(model), model, METHODS[method])
    train(model, optimizer, 2)
    change(model)
    with pytest.raises(UsageError, match=r"parameter [02]\.\S+ that it did not have .*assign=True") as error:
        optimizer.consensus_state_dict()
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="did not have"):
        train(model, optimizer, 2)  # steps 3 and 4
    world.barrier()
    optimizer.close()


def test_weights_tied_afterwards_train_as_in_one_process(world):
    models = mlp(), mlp()
    alone, ours = (nn.Sequential(model[0], nn.Linear(7, 7).double(), nn.Linear(7, 7).double()) for model in models)
    ours.load_state_dict(alone.state_dict())
    base = sgd(alone, weight_decay=0.0)
    with DistributedOptimizer(sgd(ours, weight_decay=0.0), ours, AllReduceSGD()) as optimizer:
        for model, one in ((alone, base), (ours, optimizer)):
            model[2].weight = model[1].weight
            for _ in range(4):
                one.zero_grad()
                model(X).square().mean().backward()
                one.step()
        for name, value in optimizer.consensus_state_dict().items():
            torch.testing.assert_close(value, alone.state_dict()[name], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("clips", [False, True], ids=["plain", "clipped"])
@pytest.mark.parametrize("make", [sgd, lambda model: torch.optim.AdamW(model.parameters())], ids=["sgd", "adamw"])
@pytest.mark.parametrize("method", [AllReduceSGD(), AllReduceSGD(overlap=True)], ids=["allreduce", "overlap"])
def test_a_parameter_that_is_frozen_during_training_stays_as_in_one_process(world, method, make, clips):
    alone, ours = mlp(), mlp()
    base = make(alone)
    with DistributedOptimizer(make(ours), ours, method) as optimizer:
        for t in range(8):
            for model, one in ((alone, base), (ours, optimizer)):
                model[0].requires_grad_(not 3 <= t < 6)
                one.zero_grad()
                (model(X) - X.sin()).square().mean().backward()
                if clips:
                    if one is optimizer:
                        optimizer.clip_grad_norm_(0.1)
                    else:
                        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                one.step()
        for wanted, found in zip(alone.parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", [AllReduceSGD(node_shared=True), EAMSGD()], ids=["node_shared", "eamsgd"])
def test_a_parameter_cannot_be_frozen_where_the_method_makes_the_update(world, method):
    model = mlp()
    optimizer = DistributedOptimizer(sgd(model, momentum=0.0, weight_decay=0.0), model, method)
    train(model, optimizer)
    model[0].requires_grad_(False)
    with pytest.raises(UsageError, match=r"requires_grad was set to False after .*learning rate to 0") as error:
        train(model, optimizer)
    assert "\n" not in str(error.value)
    model[0].requires_grad_(True)
    world.barrier()
    train(model, optimizer)
    optimizer.close()


@pytest.mark.parametrize("method", [*METHODS.values(), DiLoCo(period=3)], ids=[*METHODS, "diloco"])
def test_tensors_taken_from_the_model_outlive_the_optimizer(world, method):
    model = mlp()
    optimizer = DistributedOptimizer(sgd(model, lr=0.1), model, method)
    train(model, optimizer, 2)
    kept = model.state_dict()
    row, gradient = model[0].weight[1].detach(), model[0].weight.grad
    wanted = {name: value.clone() for name, value in kept.items()}
    world.barrier()
    optimizer.close()
    for name, value in wanted.items():
        torch.testing.assert_close(kept[name], value, rtol=0, atol=0)
    torch.testing.assert_close(row, wanted["0.weight"][1], rtol=0, atol=0)
    assert math.isfinite(gradient.sum())
    kept["0.weight"].zero_()  # may be changed, and is not the model's
    assert model[0].weight.any()


def test_close_copies_nothing_that_nobody_has_kept(world, monkeypatch):
    moved = []
    monkeypatch.setattr(torch.UntypedStorage, "share_memory_", moved.append)
    model = mlp().float()
    optimizer = DistributedOptimizer(sgd(model), model, AllReduceSGD())
    optimizer.zero_grad()
    model(X.float()).sum().backward()
    optimizer.step()
    optimizer.close()
    assert not moved
