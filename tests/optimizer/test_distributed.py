"""``DistributedOptimizer`` works with everything that works with the torch optimizer it wraps.

With the same data on every rank, all-reduce SGD equals the wrapped optimizer, up to the rounding of the mean.
"""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from mpitrain import EAMSGD, EASGD, AllReduceSGD, DistributedOptimizer, GossipSGD, UsageError, reestimate_batchnorm

# The first optimizer imports a large part of torch, which is slow where ranks share a core.
pytestmark = [pytest.mark.ranks(1, 2), pytest.mark.time_limit(180)]

X = torch.from_numpy(np.random.default_rng(0).normal(size=(12, 5)))
Y = X[:, :1].sin() + X[:, 1:2]


def mlp(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).to(dtype)


def loss_of(model, x=X, y=Y):
    dtype = next(model.parameters()).dtype
    return ((model(x.to(dtype)) - y.to(dtype)) ** 2).mean()


def pair(make_base, dtype=torch.float64):
    """Return a model with a plain optimizer, and a copy with a distributed one."""
    plain, twin = mlp(dtype), mlp(dtype)
    return (plain, make_base(plain)), (twin, DistributedOptimizer(make_base(twin), twin, AllReduceSGD()))


def sgd(model, **more):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, **more})


def train(model, optimizer, steps=6, each=lambda model, optimizer: None):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        each(model, optimizer)
        optimizer.step()


def assert_equal_models(a, b, rtol=1e-11):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=1e-13)


BASES = {
    "sgd": sgd,
    "momentum": lambda m: sgd(m, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda m: sgd(m, momentum=0.9, nesterov=True),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01),
    "groups": lambda m: torch.optim.SGD(
        [{"params": m[0].parameters(), "lr": 0.2, "weight_decay": 0.1}, {"params": m[2].parameters()}], lr=0.05
    ),
}


@pytest.mark.parametrize("base", BASES)
def test_with_the_same_data_on_all_ranks_it_equals_the_wrapped_optimizer(world, base):
    (plain, optimizer), (twin, distributed) = pair(BASES[base])
    train(plain, optimizer)
    with distributed:
        assert isinstance(distributed, torch.optim.Optimizer)
        train(twin, distributed)
        assert_equal_models(plain, twin)


SCHEDULERS = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.1),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=10),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=6),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_learning_rate_schedulers_act_on_both(world, scheduler):
    (plain, optimizer), (twin, distributed) = pair(lambda m: sgd(m, momentum=0.9))
    with warnings.catch_warnings(), distributed:
        warnings.simplefilter("error")  # torch warns when a scheduler has seen no step
        ours, theirs = SCHEDULERS[scheduler](distributed), SCHEDULERS[scheduler](optimizer)
        for _ in range(6):
            train(plain, optimizer, 1)
            train(twin, distributed, 1)
            ours.step()
            theirs.step()
            assert distributed.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
            assert distributed.param_groups[0]["momentum"] == optimizer.param_groups[0]["momentum"]
        assert_equal_models(plain, twin)


def test_a_scheduler_continues_after_a_state_is_loaded(world):
    model = mlp()
    with DistributedOptimizer(sgd(model), model, EAMSGD(momentum=0.5, period=1)) as optimizer:
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        train(model, optimizer, 1)
        scheduler.step()
        optimizer.load_state_dict(optimizer.state_dict())
        train(model, optimizer, 1)
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == 0.025


@pytest.mark.parametrize("method", [EASGD(period=1), EAMSGD(momentum=0.0, period=1)])
def test_groups_have_their_own_learning_rates_and_decays(world, method):
    model = mlp()
    before = [p.detach().clone() for p in model.parameters()]
    base = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.2, "weight_decay": 0.5}, {"params": model[2].parameters()}], lr=0.0
    )
    with DistributedOptimizer(base, model, method) as optimizer:
        optimizer.zero_grad(set_to_none=False)  # only the decay changes parameters: the exchange is not due yet
        optimizer.step()
        for p, old in zip(model[0].parameters(), before[:2], strict=True):
            torch.testing.assert_close(p.detach(), old * (1 - 0.2 * 0.5))
        for p, old in zip(model[2].parameters(), before[2:], strict=True):
            assert torch.equal(p, old)


def test_clipping_clips(world):
    def clip(model, _):
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        assert norm > 0.01

    (plain, optimizer), (twin, distributed) = pair(sgd)
    train(plain, optimizer, each=clip)
    with distributed:
        train(twin, distributed, each=clip)
        assert_equal_models(plain, twin)


def test_gradients_accumulate_until_they_are_zeroed(world):
    (plain, optimizer), (twin, distributed) = pair(sgd)

    def again(model, _):
        loss_of(model, X[:4], Y[:4]).backward()

    train(plain, optimizer, each=again)
    with distributed:
        train(twin, distributed, each=again)
        assert_equal_models(plain, twin)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_of_the_model_works_as_well(world, set_to_none):
    (plain, optimizer), (twin, distributed) = pair(sgd)
    train(plain, optimizer)
    with distributed:
        for _ in range(6):
            twin.zero_grad(set_to_none=set_to_none)
            loss_of(twin).backward()
            distributed.step()
        assert_equal_models(plain, twin)


@pytest.mark.parametrize(("method", "moves"), [(AllReduceSGD(), True), (EASGD(period=1000), False)])
def test_a_parameter_without_a_gradient_decays_where_the_method_works_with_gradients(world, method, moves):
    model = mlp()
    unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    model.register_parameter("unused", unused)
    with DistributedOptimizer(sgd(model, weight_decay=0.5), model, method) as optimizer:
        train(model, optimizer, 2)
        assert (unused < 1).all() == moves


def test_closure_is_called_with_gradients_and_its_loss_returned(world):
    (plain, optimizer), (twin, distributed) = pair(sgd)

    def closure_of(model, optimizer):
        def closure():
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            return loss

        return closure

    with distributed:
        for _ in range(3):
            wanted, got = (
                optimizer.step(closure_of(plain, optimizer)),
                distributed.step(closure=closure_of(twin, distributed)),
            )
            torch.testing.assert_close(got, wanted)
        assert_equal_models(plain, twin)


def test_step_returns_the_loss(world):
    model = mlp()
    with DistributedOptimizer(sgd(model), model, AllReduceSGD()) as optimizer:
        optimizer.zero_grad()
        assert optimizer.step() is None
        assert optimizer.step(0.25) == 0.25


@pytest.mark.parametrize("method", [AllReduceSGD(), EASGD(period=2), EASGD(period=1, synchronous=True), GossipSGD()])
@pytest.mark.parametrize("base", ["momentum", "adamw"])
def test_state_round_trip_is_bit_exact(world, method, base):
    model = mlp(torch.float32)
    with DistributedOptimizer(BASES[base](model), model, method, seed=3) as optimizer:
        # One rank after the other: asynchronous methods then have a fixed order as well.
        def run(steps):
            for _ in range(steps):
                for rank in [None] if method.is_synchronous else range(world.size):
                    if rank in (None, world.rank):
                        train(model, optimizer, 1)
                    world.barrier()
            with optimizer.consensus():
                found = [p.detach().clone() for p in model.parameters()]
            world.barrier()
            return found + [p.detach().clone() for p in model.parameters()]

        run(3)
        saved = optimizer.state_dict()
        world.barrier()
        first = run(4)
        for _ in range(2):
            optimizer.load_state_dict(saved)
            again = run(4)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_state_of_eamsgd_goes_into_a_fresh_optimizer(world):
    method, model, fresh = EAMSGD(momentum=0.9, period=2, synchronous=True), mlp(), mlp(seed=9)
    with (
        DistributedOptimizer(sgd(model), model, method) as optimizer,
        DistributedOptimizer(sgd(fresh), fresh, method) as other,
    ):
        train(model, optimizer, 5)
        other.load_state_dict(optimizer.state_dict())
        train(model, optimizer, 5)
        train(fresh, other, 5)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


def test_state_of_another_rank_or_number_of_ranks_is_refused(world):
    model = mlp()
    with DistributedOptimizer(sgd(model), model, EASGD()) as optimizer:
        state = optimizer.state_dict()
        for changed, words in (
            ({"rank": world.rank + 1}, f"that of rank {world.rank + 1}, but this is rank {world.rank}"),
            ({"ranks": world.size + 1}, f"of {world.size + 1} ranks, but this run has {world.size}"),
        ):
            refused(words, lambda changed=changed: optimizer.load_state_dict(state | changed))
        optimizer.load_state_dict(state)


def test_state_of_a_torch_optimizer_is_refused(world):
    model = mlp()
    base = sgd(model)
    with DistributedOptimizer(base, model, EASGD()) as optimizer:
        refused("not a state of a DistributedOptimizer", lambda: optimizer.load_state_dict(base.state_dict()))


def test_state_goes_through_a_file_of_torch(world, tmp_path):
    model = mlp()
    with DistributedOptimizer(BASES["adamw"](model), model, EASGD(period=1)) as optimizer:
        train(model, optimizer, 2)
        file = tmp_path / f"{world.rank}.pt"
        torch.save(optimizer.state_dict(), file)
        world.barrier()
        own = [p.detach().clone() for p in model.parameters()]
        train(model, optimizer, 2)
        world.barrier()
        optimizer.load_state_dict(torch.load(file, weights_only=True))
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), own, strict=True))


def test_state_of_another_model_is_refused(world):
    model, larger = mlp(), nn.Linear(5, 100).double()
    with DistributedOptimizer(sgd(larger), larger, EASGD()) as optimizer:
        state = optimizer.state_dict()
    with DistributedOptimizer(sgd(model), model, EASGD()) as optimizer:
        refused("another model", lambda: optimizer.load_state_dict(state))


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        (AllReduceSGD(), torch.bfloat16),
        (EASGD(period=1), torch.bfloat16),
        (EAMSGD(momentum=0.5, period=1), torch.float64),
        (GossipSGD(), torch.float32),
    ],
    ids=["allreduce-bfloat16", "easgd-bfloat16", "eamsgd-float64", "gossip-float32"],
)
def test_models_of_every_type_train(world, method, dtype):
    model = mlp(dtype)
    before = loss_of(model).item()
    with DistributedOptimizer(sgd(model, lr=0.05), model, method) as optimizer:
        # In step: a rank that gossips ahead of the others is pulled back to their start, and hardly moves.
        train(model, optimizer, 150, each=lambda model, optimizer: world.barrier())
        world.barrier()
        with optimizer.consensus():
            after = loss_of(model).item()
        assert next(model.parameters()).dtype == dtype
        assert after < 0.1 * before
        world.barrier()


def test_the_model_holds_the_consensus_inside_and_its_parameters_outside(world):
    model = mlp()
    with DistributedOptimizer(sgd(model), model, EASGD(moving_rate=0.0, period=1)) as optimizer:
        center = [p.detach().clone() for p in model.parameters()]
        train(model, optimizer, 3)
        own = [p.detach().clone() for p in model.parameters()]
        with optimizer.consensus():
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), center, strict=True))
        with pytest.raises(KeyError), optimizer.consensus():
            raise KeyError
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), own, strict=True))
        train(model, optimizer, 1)


def test_buffers_changed_inside_consensus_are_restored(world):
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    model.register_buffer("mask", torch.ones(3), persistent=False)
    mask = model.mask
    with DistributedOptimizer(sgd(model), model, EASGD()) as optimizer:
        train(model, optimizer, 2)
        own = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with optimizer.consensus():
            reestimate_batchnorm(model, [3 * X])
            model.mask = torch.zeros(3)
            assert not torch.equal(model[1].running_mean, own["1.running_mean"])
        assert all(torch.equal(buffer, own[name]) for name, buffer in model.named_buffers())
        assert model.mask is mask


def test_a_closed_optimizer_leaves_the_consensus_and_the_counters(world):
    model = mlp()
    with DistributedOptimizer(sgd(model), model, EASGD(period=1)) as optimizer:
        train(model, optimizer, 2)
        world.barrier()
        center = optimizer.consensus_state_dict()
    optimizer.close()  # a second time does nothing
    assert all(torch.equal(tensor, center[name]) for name, tensor in model.state_dict().items())
    assert optimizer.statistics.n_exchanges == 2
    train(model, sgd(model), 2)
    assert not torch.equal(next(model.parameters()), center["0.weight"])
    copy.deepcopy(model).load_state_dict(model.state_dict())


USES = {
    "step": lambda o: o.step(),
    "zero_grad": lambda o: o.zero_grad(),
    "consensus": lambda o: o.consensus().__enter__(),
    "consensus_vector": lambda o: o.consensus_vector(),
    "spread": lambda o: o.spread(np.zeros(1)),
    "metrics": lambda o: o.metrics(),
    "state_dict": lambda o: o.state_dict(),
    "load_state_dict": lambda o: o.load_state_dict({}),
    "n_parameters": lambda o: o.n_parameters,
}


@pytest.mark.parametrize("method", [AllReduceSGD(), EASGD()])
def test_a_closed_optimizer_refuses_to_be_used(world, method):
    model = mlp()
    with DistributedOptimizer(sgd(model), model, method) as optimizer:
        train(model, optimizer, 1)
    for use in USES.values():
        refused("this optimizer is closed", lambda use=use: use(optimizer))


def test_step_and_close_are_refused_inside_consensus(world):
    model = mlp()
    with DistributedOptimizer(sgd(model), model, EASGD()) as optimizer:
        with optimizer.consensus():
            refused(r"step\(\) inside `with optimizer.consensus", lambda: train(model, optimizer, 1))
            refused(r"consensus\(\) inside consensus", lambda: optimizer.consensus().__enter__())
            refused(r"close\(\) inside", optimizer.close)
        train(model, optimizer, 1)


def test_parameters_belong_to_one_open_optimizer(world):
    model = mlp()
    base = sgd(model)
    with DistributedOptimizer(base, model, EASGD()) as optimizer:
        for again in (base, sgd(model), optimizer):
            refused("already has these parameters", lambda again=again: DistributedOptimizer(again, model, EASGD()))
        train(model, optimizer, 1)
    DistributedOptimizer(base, model, EASGD()).close()


@pytest.mark.parametrize("base", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize("method", [AllReduceSGD(), EASGD(period=1)])
def test_a_direct_step_of_the_base_warns_once(world, base, method):
    model = mlp()
    made = BASES[base](model)
    with warnings.catch_warnings(), DistributedOptimizer(made, model, method) as optimizer:
        warnings.simplefilter("error")
        train(model, optimizer, 2)
        with pytest.raises(UserWarning, match=r"exchanges nothing; call step\(\) of the DistributedOptimizer"):
            train(model, made, 1)
        train(model, made, 1)
        train(model, optimizer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, made, 1)


def test_after_close_the_base_steps_without_a_warning(world):
    model = mlp()
    base = sgd(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with DistributedOptimizer(base, model, EASGD(period=1)) as optimizer:
            train(model, optimizer, 1)
        train(model, base, 1)


@pytest.mark.parametrize("base", ["momentum", "adamw"])
def test_the_base_forgets_a_gradient_that_was_not_finite(world, base):
    model = mlp()
    made = BASES[base](model)
    with DistributedOptimizer(made, model, EASGD(period=1)) as optimizer:
        for t in range(4):
            optimizer.zero_grad()
            (loss_of(model) * (float("nan") if t == 1 else 1.0)).backward()
            optimizer.step()
            world.barrier()
        for tensor in (*model.parameters(), *(v for state in made.state.values() for v in state.values())):
            assert torch.isfinite(tensor).all()


def refused(match, make):
    with pytest.raises(UsageError, match=match) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "base",
    [
        lambda m: sgd(m, momentum=0.9),
        lambda m: sgd(m, maximize=True),
        lambda m: torch.optim.Adam(m.parameters()),
    ],
)
def test_eamsgd_needs_plain_sgd(world, base):
    model = mlp()
    refused(
        r"eamsgd makes the update itself.*torch\.optim\.SGD", lambda: DistributedOptimizer(base(model), model, EAMSGD())
    )


def test_arguments_of_another_kind_are_refused(world):
    model, base = mlp(), sgd(mlp())
    refused("the base optimizer comes first, then the model", lambda: DistributedOptimizer(model, base, EASGD()))
    refused("base must be a torch optimizer", lambda: DistributedOptimizer(model.parameters(), model, EASGD()))
    refused("model must be a torch.nn.Module", lambda: DistributedOptimizer(base, model.parameters(), EASGD()))
    refused("such as mpitrain.EASGD.., not 'easgd'", lambda: DistributedOptimizer(base, model, "easgd"))
    refused("not the class EASGD: write EASGD..", lambda: DistributedOptimizer(base, model, EASGD))


def test_parameters_of_another_model_are_refused(world):
    refused("the model does not have", lambda: DistributedOptimizer(sgd(mlp()), mlp(), EASGD()))


def test_models_that_cannot_be_exchanged_are_refused(world):
    frozen, mixed = mlp().requires_grad_(False), mlp()
    mixed[2].half()
    refused("no trainable parameter", lambda: DistributedOptimizer(sgd(frozen), frozen, EASGD()))
    refused("several types", lambda: DistributedOptimizer(sgd(mixed), mixed, EASGD()))


def test_a_model_converted_afterwards_is_refused_at_the_next_step(world):
    model = mlp(torch.float32)
    with DistributedOptimizer(sgd(model), model, EASGD()) as optimizer:
        train(model, optimizer, 1)
        model.double()
        refused("moved or converted after", lambda: train(model, optimizer, 1))


@pytest.mark.parametrize("base", [sgd, lambda m: torch.optim.Adam(m.parameters())])
def test_a_layer_unfrozen_afterwards_is_refused_at_the_next_step(world, base):
    model = mlp()
    model[0].requires_grad_(False)
    with DistributedOptimizer(base(model), model, AllReduceSGD()) as optimizer:
        train(model, optimizer, 1)
        model[0].requires_grad_(True)
        refused(r"0\.weight requires a gradient", lambda: train(model, optimizer, 1))
        model[0].requires_grad_(False)
        train(model, optimizer, 1)


def test_a_layer_frozen_with_a_gradient_does_not_change(world):
    model = mlp()
    loss_of(model).backward()
    model[0].requires_grad_(False)
    before = model[0].weight.detach().clone()
    with DistributedOptimizer(torch.optim.Adam(model.parameters()), model, EASGD(period=1)) as optimizer:
        train(model, optimizer, 2)
        assert torch.equal(model[0].weight, before)


def test_groups_added_afterwards_are_refused(world):
    model = mlp()
    with DistributedOptimizer(torch.optim.SGD(model[0].parameters(), lr=0.1), model, EASGD()) as optimizer:
        more = {"params": list(model[2].parameters())}
        refused("before the DistributedOptimizer", lambda: optimizer.add_param_group(more))
        train(model, optimizer, 1)


@pytest.mark.parametrize("method", [AllReduceSGD(), EASGD(period=1)])
def test_groups_added_to_the_base_are_refused_at_the_next_step(world, method):
    model = mlp()
    base = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with DistributedOptimizer(base, model, method) as optimizer:
        base.add_param_group({"params": list(model[2].parameters())})
        refused("before the DistributedOptimizer", lambda: train(model, optimizer, 1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda base: base.register_step_post_hook(lambda *_: None), "hooks of the base optimizer"),
        (lambda base: base.param_groups[0].update(maximize=True), "dampening, maximize or differentiable were set"),
    ],
    ids=["hook", "maximize"],
)
def test_sgd_whose_step_the_worker_makes_must_stay_plain(world, change, words):
    model = mlp()
    base = sgd(model)
    with DistributedOptimizer(base, model, AllReduceSGD(node_shared=True)) as optimizer:
        train(model, optimizer, 1)
        change(base)
        refused(words, lambda: train(model, optimizer, 1))


def test_hooks_of_the_base_are_called_in_later_steps(world):
    model, n_calls = mlp(), []
    base = sgd(model, momentum=0.9)
    with DistributedOptimizer(base, model, EASGD(period=1)) as optimizer:
        train(model, optimizer, 1)
        base.register_step_post_hook(lambda *_: n_calls.append(1))
        train(model, optimizer, 2)
        assert len(n_calls) == 2


def test_an_optimizer_that_needs_a_closure_is_refused(world):
    model = mlp()
    refused("LBFGS", lambda: DistributedOptimizer(torch.optim.LBFGS(model.parameters()), model, EASGD()))
