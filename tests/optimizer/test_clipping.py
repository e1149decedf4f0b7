"""The norm of the gradient that a step uses is clipped: with p ranks as with one process and the p-fold batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from mpitrain import (
    EASGD,
    AllReduceSGD,
    Average,
    DistributedOptimizer,
    EntropySGD,
    LocalSGD,
    PostLocalSGD,
    RobustSGD,
    UsageError,
)

pytestmark = pytest.mark.time_limit(180)

STEPS, BATCH, MAX_NORM = 6, 4, 0.4
BASES = {
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.3, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda groups: torch.optim.SGD(groups, lr=0.3, momentum=0.9, nesterov=True),
    "plain": lambda groups: torch.optim.SGD(groups, lr=0.3),
    "adam": lambda groups: torch.optim.AdamW(groups, lr=0.03, eps=1e-2),
}
AS_ONE_PROCESS = {
    "own": (AllReduceSGD(), "momentum", {}),
    "adam": (AllReduceSGD(), "adam", {}),
    "node_shared": (AllReduceSGD(node_shared=True), "momentum", {}),
    "node_shared nesterov": (AllReduceSGD(node_shared=True), "nesterov", {}),
    "node_shared plain": (AllReduceSGD(node_shared=True), "plain", {}),
    "overlap": (AllReduceSGD(overlap=True), "momentum", {}),
    "postlocal": (PostLocalSGD(switch_step=100), "momentum", {}),
    "mean of robust": (RobustSGD(rule="mean"), "momentum", {}),
    "averaged": (AllReduceSGD(), "momentum", {"average": Average("polyak")}),
    "one group": (EASGD(period=100), "momentum", {"replica_size": 0}),
}


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def groups_of(model):
    return [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.1}]


def batch(rank, step, passes=1):
    """Return mini-batches whose gradients are clipped in some of the steps and in others not."""
    generator, size = np.random.default_rng([rank, step]), 0.2 if step % 2 else 1.0
    return [torch.from_numpy(size * generator.normal(size=(BATCH, 5)).astype(np.float32)) for _ in range(passes)]


def loss_of(model, x, scale=1.0):
    return scale * (model(x) - x[:, :3]).square().mean()


def numbers(model):
    return torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])


def gradient(model):
    return torch.cat([p.grad.reshape(-1) for p in model.parameters()])


def one_process(size, base, *, order=2.0, passes=1):
    """Return the parameters and the norms of one process with the batches of all ranks, clipped by torch."""
    model = mlp()
    optimizer, norms = BASES[base](groups_of(model)), []
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in zip(*(batch(rank, step, passes) for rank in range(size)), strict=True):
            loss_of(model, torch.cat(part)).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM, order)))
        optimizer.step()
    return numbers(model), norms


def distributed(world, method, base, more, *, order=2.0, passes=1, scaler=None, zeros=False):
    """Return the parameters and the norms of this rank."""
    model, norms = mlp(), []
    more = {**more, **({"replica_size": world.size} if more.get("replica_size") == 0 else {})}
    with DistributedOptimizer(BASES[base](groups_of(model)), model, method, world=world, **more) as optimizer:
        for step in range(STEPS):
            optimizer.zero_grad(set_to_none=not zeros)
            for x in batch(world.rank, step, passes):
                loss = loss_of(model, x)
                (loss if scaler is None else scaler.scale(loss)).backward()
            if scaler is not None:
                scaler.unscale_(optimizer)
            norms.append(float(optimizer.clip_grad_norm_(MAX_NORM, order)))
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
        return numbers(model), norms


@pytest.mark.ranks(3)
@pytest.mark.parametrize("case", AS_ONE_PROCESS)
def test_clipping_the_mean_equals_one_process_with_all_batches(world, case):
    method, base, more = AS_ONE_PROCESS[case]
    wanted, norms = one_process(world.size, base)
    assert min(norms) < MAX_NORM < max(norms)
    found, found_norms = distributed(world, method, base, more)
    assert found_norms == pytest.approx(norms, rel=1e-5)
    assert all(other == found_norms for other in world.comm.allgather(found_norms))
    if "average" not in more:
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.ranks(4)
def test_groups_of_ranks_clip_the_mean_of_all(world):
    wanted, norms = one_process(world.size, "momentum")
    found, found_norms = distributed(world, AllReduceSGD(), "momentum", {"replica_size": 2})
    assert found_norms == pytest.approx(norms, rel=1e-5)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("node_shared", [False, True], ids=["own", "node_shared"])
@pytest.mark.parametrize(
    ("order", "how"),
    [(1.0, "once"), (3.0, "once"), (math.inf, "once"), (2.0, "accumulated"), (2.0, "scaled"), (2.0, "zeros")],
)
def test_orders_accumulation_and_scaling_work_as_in_one_process(world, order, node_shared, how):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if how == "scaled" else None
    passes = 3 if how == "accumulated" else 1
    wanted, norms = one_process(world.size, "momentum", order=order, passes=passes)
    found, found_norms = distributed(
        world,
        AllReduceSGD(node_shared=node_shared),
        "momentum",
        {},
        order=order,
        passes=passes,
        scaler=scaler,
        zeros=how == "zeros",
    )
    assert found_norms == pytest.approx(norms, rel=1e-5)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("node_shared", [False, True], ids=["own", "node_shared"])
def test_clipping_averages_once_and_the_last_bound_holds(world, node_shared):
    model = mlp()
    base = BASES["plain"](model.parameters())
    with DistributedOptimizer(base, model, AllReduceSGD(node_shared=node_shared), world=world) as optimizer:
        before = numbers(model)
        loss_of(model, batch(world.rank, 0)[0]).backward()
        first = optimizer.clip_grad_norm_(1e-2)
        n_exchanges = optimizer.statistics.n_exchanges
        assert first > 1e-2
        assert float(optimizer.clip_grad_norm_(1e-3)) == pytest.approx(1e-2, rel=1e-3)
        assert float(optimizer.clip_grad_norm_(1.0)) == pytest.approx(1e-3, rel=2e-3)
        if not node_shared:
            assert optimizer.statistics.n_exchanges == n_exchanges
            assert float(gradient(model).norm()) == pytest.approx(1e-3, rel=2e-3)
        optimizer.step()
        if not node_shared:
            assert optimizer.statistics.n_exchanges == n_exchanges
        assert float((numbers(model) - before).norm()) == pytest.approx(0.3e-3, rel=3e-3)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("node_shared", [False, True], ids=["own", "node_shared"])
def test_a_clipped_gradient_that_is_zeroed_leaves_no_trace(world, node_shared):
    ends = []
    for gives_up in (False, True):
        model = mlp()
        base = BASES["momentum"](model.parameters())
        with DistributedOptimizer(base, model, AllReduceSGD(node_shared=node_shared), world=world) as optimizer:
            if gives_up:
                loss_of(model, batch(world.rank, 1)[0], scale=50.0).backward()
                optimizer.clip_grad_norm_(1e-3)
                optimizer.zero_grad()
            loss_of(model, batch(world.rank, 0)[0]).backward()
            optimizer.step()
            ends.append(numbers(model))
    assert torch.equal(*ends)


@pytest.mark.ranks(2)
def test_a_backward_pass_after_clipping_adds_to_the_clipped_mean(world):
    def accumulate(model, x, y, clip):
        loss_of(model, x, scale=50.0).backward()
        clip()
        loss_of(model, y).backward()

    plain = mlp()
    optimizer = BASES["plain"](plain.parameters())
    x, y = (torch.cat([batch(rank, step)[0] for rank in range(world.size)]) for step in (0, 1))
    accumulate(plain, x, y, lambda: nn.utils.clip_grad_norm_(plain.parameters(), 0.1))
    optimizer.step()
    model = mlp()
    with DistributedOptimizer(BASES["plain"](model.parameters()), model, AllReduceSGD(), world=world) as optimizer:
        x, y = (batch(world.rank, step)[0] for step in (0, 1))
        accumulate(model, x, y, lambda: optimizer.clip_grad_norm_(0.1))
        optimizer.step()
        torch.testing.assert_close(numbers(model), numbers(plain), rtol=0, atol=1e-6)
    shared = mlp()
    with DistributedOptimizer(
        BASES["plain"](shared.parameters()), shared, AllReduceSGD(node_shared=True), world=world
    ) as optimizer:
        accumulate(shared, x, y, lambda: optimizer.clip_grad_norm_(0.1))
        with pytest.raises(UsageError, match="clip last"):
            optimizer.step()


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    "method", [EASGD(period=100, grad_point="post"), LocalSGD(period=2), PostLocalSGD(switch_step=0)], ids=str
)
def test_local_steps_clip_the_gradient_of_the_rank_as_torch_does(world, method):
    ends = []
    for own in (False, True):
        model = mlp()
        base = BASES["momentum"](groups_of(model))
        with DistributedOptimizer(base, model, method, world=world) as optimizer:
            for step in range(STEPS):
                optimizer.zero_grad()
                loss_of(model, batch(world.rank, step)[0]).backward()
                if own:
                    norm = optimizer.clip_grad_norm_(0.1)
                else:
                    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                ends.append((own, float(norm)))
                optimizer.step()
                world.barrier()
            ends.append((own, *numbers(model).tolist()))
    half = len(ends) // 2
    for plain, clipped in zip(ends[:half], ends[half:], strict=True):
        np.testing.assert_allclose(clipped[1:], plain[1:], rtol=1e-5, atol=1e-6)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("node_shared", [False, True], ids=["own", "node_shared"])
def test_a_nan_on_one_rank_is_everybodys_norm_and_leaves_out_the_step(world, node_shared):
    model = mlp()
    base = BASES["momentum"](model.parameters())
    with DistributedOptimizer(base, model, AllReduceSGD(node_shared=node_shared), world=world) as optimizer:
        for step in range(3):
            before = numbers(model)
            optimizer.zero_grad()
            loss_of(model, batch(world.rank, step)[0]).backward()
            if step == 1 and world.rank == world.size - 1:
                model[2].bias.grad[1] = math.inf
            norm = optimizer.clip_grad_norm_(MAX_NORM)
            assert bool(torch.isfinite(norm)) == (step != 1)
            if step == 1:
                with pytest.raises(RuntimeError, match="not finite"):
                    optimizer.clip_grad_norm_(MAX_NORM, error_if_nonfinite=True)
            optimizer.step()
            assert torch.equal(numbers(model), before) == (step == 1)
            assert torch.isfinite(numbers(model)).all()


@pytest.mark.ranks(2)
def test_entropy_sgd_clips_the_mean(world):
    model = mlp()
    base = BASES["plain"](model.parameters())
    with DistributedOptimizer(base, model, EntropySGD(period=2), world=world) as optimizer:
        loss_of(model, batch(world.rank, 0)[0], scale=50.0).backward()
        optimizer.clip_grad_norm_(0.5)
        found = gradient(model)
        assert float(found.norm()) == pytest.approx(0.5, rel=1e-4)
        assert all(np.array_equal(other, found.numpy()) for other in world.comm.allgather(found.numpy()))


@pytest.mark.parametrize("arguments", [(-1.0,), (math.nan,), (1.0, 0.0), (1.0, -2.0)], ids=str)
def test_meaningless_arguments_are_refused(world, arguments):
    model = mlp()
    optimizer = DistributedOptimizer(BASES["plain"](model.parameters()), model, AllReduceSGD(), world=world)
    with optimizer, pytest.raises(UsageError, match="max_norm >= 0 and norm_type > 0"):
        optimizer.clip_grad_norm_(*arguments)
    optimizer.close()
