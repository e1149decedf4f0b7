"""The wrapped optimizer and its wrapper have one set of groups and states, whoever replaces them."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from mpitrain import EAMSGD, EASGD, AllReduceSGD, DistributedOptimizer, UsageError

# The first optimizer imports a large part of torch, which is slow where ranks share a core.
pytestmark = [pytest.mark.ranks(1, 2), pytest.mark.time_limit(180)]

METHODS = {
    "allreduce": AllReduceSGD(),
    "shared": AllReduceSGD(node_shared=True),
    "easgd": EASGD(period=100),
    "eamsgd": EAMSGD(momentum=0.0, period=100),
}


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).double()


def sgd(model, **settings):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, **settings})


def descend(model, optimizer, n=1):
    for _ in range(n):
        optimizer.zero_grad()
        model(torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(4, 5)).square().sum().backward()
        optimizer.step()


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def load_state(base):
    base.load_state_dict(copy.deepcopy(base.state_dict()))


def replace_groups(base):
    base.param_groups = [{**group} for group in base.param_groups]


@pytest.mark.parametrize("replace", [load_state, replace_groups], ids=["load_state_dict", "param_groups"])
@pytest.mark.parametrize("method", METHODS)
def test_groups_that_were_replaced_in_the_base_are_those_of_the_wrapper(world, method, replace):
    model = mlp()
    base = sgd(model)
    with DistributedOptimizer(base, model, METHODS[method]) as optimizer:
        descend(model, optimizer)
        replace(base)
        assert optimizer.param_groups is base.param_groups
        optimizer.param_groups[0]["lr"] = 0.0
        before = values(model)
        descend(model, optimizer)
        assert all(torch.equal(a, b) for a, b in zip(before, values(model), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_groups_that_are_replaced_in_the_wrapper_are_those_of_the_base(world, method):
    model = mlp()
    base = sgd(model)
    with DistributedOptimizer(base, model, METHODS[method]) as optimizer:
        optimizer.param_groups = [{**base.param_groups[0], "lr": 0.0}]
        before = values(model)
        descend(model, optimizer)
        assert base.param_groups[0]["lr"] == 0.0
        assert all(torch.equal(a, b) for a, b in zip(before, values(model), strict=True))


def add_group(model, base):
    base.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=torch.float64))]})


def append(model, base):
    base.param_groups[0]["params"].append(nn.Parameter(torch.ones(2, dtype=torch.float64)))


def exchange(model, base):
    base.param_groups[0]["params"][0] = nn.Parameter(torch.ones(7, 5, dtype=torch.float64))


def regroup(model, base):
    first, *others = base.param_groups[0]["params"]
    base.param_groups[0]["params"] = [*others, first]


@pytest.mark.parametrize("change", [add_group, append, exchange, regroup], ids=lambda change: change.__name__)
@pytest.mark.parametrize("method", METHODS)
def test_other_parameters_in_the_base_are_refused_at_the_next_step(world, method, change):
    model = mlp()
    base = sgd(model)
    with DistributedOptimizer(base, model, METHODS[method]) as optimizer:
        change(model, base)
        with pytest.raises(UsageError, match=r"before the DistributedOptimizer is made|hold other parameters") as error:
            descend(model, optimizer)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("replace", ["load", "clear", "assign"])
@pytest.mark.parametrize("method", ["allreduce", "easgd"])
def test_momentum_that_was_replaced_in_the_base_is_used(world, method, replace):
    def act(base, saved):
        if replace == "load":
            base.load_state_dict(copy.deepcopy(saved))
        elif replace == "clear":
            base.state.clear()
        else:
            for state in base.state.values():
                state["momentum_buffer"] = torch.full_like(state["momentum_buffer"], 0.5)

    alone, ours = mlp(), mlp()
    plain, base = sgd(alone, lr=0.01, momentum=0.9), sgd(ours, lr=0.01, momentum=0.9)
    with DistributedOptimizer(base, ours, METHODS[method]) as optimizer:
        descend(alone, plain, 2)
        descend(ours, optimizer, 2)
        saved, of_ours = copy.deepcopy(plain.state_dict()), copy.deepcopy(base.state_dict())
        descend(alone, plain, 3)
        descend(ours, optimizer, 3)
        act(plain, saved)
        act(base, of_ours)
        descend(alone, plain, 3)
        descend(ours, optimizer, 3)
        for wanted, found in zip(values(alone), values(ours), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-13)


def test_shared_parameters_do_not_ignore_the_momentum_of_the_base(world):
    model = mlp()
    base = sgd(model, momentum=0.9)
    descend(model, base, 2)
    with pytest.raises(UsageError, match=r"has momentum, which node_shared would not use.*node_shared=False") as error:
        DistributedOptimizer(base, model, METHODS["shared"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("made_on", ["base before", "base after", "wrapper"])
@pytest.mark.parametrize("method", METHODS)
def test_a_scheduler_works_wherever_it_is_made(world, method, made_on):
    alone, ours = mlp(), mlp()
    plain, base = sgd(alone), sgd(ours)
    theirs = torch.optim.lr_scheduler.StepLR(plain, 1, gamma=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns when a scheduler has seen no step
        scheduler = torch.optim.lr_scheduler.StepLR(base, 1, gamma=0.5) if made_on == "base before" else None
        with DistributedOptimizer(base, ours, METHODS[method]) as optimizer:
            if scheduler is None:
                on = optimizer if made_on == "wrapper" else base
                scheduler = torch.optim.lr_scheduler.StepLR(on, 1, gamma=0.5)
            for _ in range(4):
                descend(alone, plain)
                descend(ours, optimizer)
                theirs.step()
                scheduler.step()
                assert optimizer.param_groups[0]["lr"] == base.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
            for wanted, found in zip(values(alone), values(ours), strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("method", ["shared", "eamsgd"])
def test_hooks_that_would_not_be_called_are_refused(world, method):
    model = mlp()
    base = sgd(model)
    with DistributedOptimizer(base, model, METHODS[method]) as optimizer:
        descend(model, optimizer)
        base.register_step_pre_hook(lambda *_: None)
        with pytest.raises(UsageError, match="makes the update itself, so hooks of the base optimizer"):
            descend(model, optimizer)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": pickle.dumps,
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_the_optimizer_is_refused(world, how):
    model = mlp()
    with DistributedOptimizer(sgd(model), model, EASGD()) as optimizer:
        with pytest.raises(UsageError, match=r"cannot be copied or pickled.*optimizer\.state_dict\(\)") as error:
            COPIES[how](optimizer)
        assert "\n" not in str(error.value)
        copy.deepcopy(optimizer.state_dict())
        copied = copy.deepcopy(model)
        descend(model, optimizer)
        assert not torch.equal(copied[0].weight, model[0].weight)
