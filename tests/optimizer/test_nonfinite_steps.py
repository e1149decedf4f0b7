"""A gradient that is not finite on one rank: the step is left out, and the ranks stay in step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mpitrain import (
    AllReduceSGD,
    DiLoCo,
    DistributedOptimizer,
    EntropySGD,
    LocalSGD,
    PostLocalSGD,
    RobustSGD,
    SafeguardSGD,
)

AVERAGING = {
    "shared": (AllReduceSGD(), "momentum"),
    "own": (AllReduceSGD(), "adam"),
    "overlap": (AllReduceSGD(overlap=True), "momentum"),
    "postlocal": (PostLocalSGD(switch_step=100), "momentum"),
    "entropysgd": (EntropySGD(period=2), "plain"),
}
AGGREGATING = {rule: RobustSGD(rule=rule) for rule in ("mean", "median", "krum", "centered_clipping")} | {
    "safeguard": SafeguardSGD()
}
ALL = -1
BASES = {
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    "plain": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
}


def train(world, method, base, steps, *, poison=None, factor=1.0, scaler=None):
    """Return this rank's parameters after ``steps``, the numbers of its samples, and its optimizer's n_nonfinite."""
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    with DistributedOptimizer(BASES[base](model.parameters()), model, method, world=world) as optimizer:
        for step in steps:
            x = torch.from_numpy(np.random.default_rng([world.rank, step]).normal(size=(4, 5)).astype(np.float32))
            optimizer.zero_grad()
            loss = model(x).square().mean()
            if poison in ((world.rank, step), (ALL, step)):
                model.bias.register_hook(lambda g: g * torch.tensor([factor, torch.nan, 1.0]))
            (loss if scaler is None else scaler.scale(loss)).backward()
            for parameter in model.parameters():
                if parameter._backward_hooks:
                    parameter._backward_hooks.clear()
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
        return torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()]), int(
            optimizer.statistics.n_nonfinite
        )


@pytest.mark.ranks(2)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("case", AVERAGING)
def test_all_ranks_leave_out_the_step_of_a_nan_and_say_so_once(world, caplog, case, scaled):
    method, base = AVERAGING[case]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if scaled else None
    found, n_nonfinite = train(world, method, base, [0, 1, 2, 3, 4], poison=(world.size - 1, 2), scaler=scaler)
    said = [record for record in caplog.records if "not finite" in record.message]
    if case == "entropysgd":  # the step counts, for the inner loop, and moves nothing
        assert torch.isfinite(found).all()
    else:
        wanted, none = train(world, method, base, [0, 1, 3, 4])
        torch.testing.assert_close(found, wanted, rtol=1e-6 if scaled else 0, atol=1e-7 if scaled else 0)
        assert none == 0
    assert n_nonfinite >= 1
    if scaler is not None:
        assert scaler.get_scale() == 2.0**9
    else:
        causes = world.rank == world.size - 1 and case != "overlap"  # where only the mean is left
        assert len(said) == (world.rank == 0 or causes)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("method", [LocalSGD(period=2), DiLoCo(period=3)], ids=["localsgd", "diloco"])
def test_a_scaler_that_leaves_out_a_local_step_keeps_the_ranks_in_step(world, method):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    found, n_nonfinite = train(world, method, "momentum", range(6), poison=(0, 1), scaler=scaler)
    ends = world.comm.allgather(found.numpy())
    assert all(np.array_equal(end, ends[0]) for end in ends)
    assert np.isfinite(ends[0]).all()
    assert scaler.get_scale() == (2.0**9 if world.rank == 0 else 2.0**10)
    assert (n_nonfinite > 0) == (world.rank == 0)


@pytest.mark.ranks(3)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("case", AGGREGATING)
def test_a_robust_step_leaves_out_the_rank_with_a_nan_and_is_made_by_all_ranks(world, case, scaled):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if scaled else None
    found, _ = train(world, AGGREGATING[case], "momentum", range(4), poison=(0, 2), scaler=scaler)
    assert torch.isfinite(found).all()
    other, _ = train(world, AGGREGATING[case], "momentum", range(4), poison=(0, 2), factor=100.0, scaler=scaler)
    assert torch.equal(found, other)  # not a part of that gradient is used
    assert all(np.array_equal(other, found.numpy()) for other in world.comm.allgather(found.numpy()))
    skipped, _ = train(world, AGGREGATING[case], "momentum", [0, 1, 3])
    assert not torch.allclose(found, skipped, rtol=0, atol=1e-4)


@pytest.mark.ranks(3)
@pytest.mark.parametrize("case", AGGREGATING)
def test_a_robust_step_without_any_finite_gradient_is_left_out(world, case):
    found, n_nonfinite = train(world, AGGREGATING[case], "momentum", range(5), poison=(ALL, 2))
    wanted, _ = train(world, AGGREGATING[case], "momentum", [0, 1, 3, 4])
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert world.comm.allreduce(n_nonfinite) >= world.size
