"""A replica group is one worker: every member has the parameters of one rank with all their samples."""

import dataclasses
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support import small_models
from support.quadratic import simulate
from torch import nn

from mpitrain import EAMSGD, EASGD, GPUASGD, LSGD, AllReduceSGD, Average, DistributedOptimizer, GossipSGD, UsageError
from mpitrain.optimizer.replica_group import check_replica_size
from mpitrain.records.checkpoint import latest, load
from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.loop import train

# The first optimizer imports a large part of torch, which is slow where ranks share a core.
pytestmark = pytest.mark.time_limit(180)

STEPS, BATCH = 12, 3


def numbers(model):
    return np.concatenate([p.detach().double().numpy().ravel() for p in model.parameters()])


def mlp(seed, dtype):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).to(dtype)


class Point(nn.Module):
    """Parameters x whose gradient is h*(x - b)."""

    def __init__(self, start):
        super().__init__()
        self.x = nn.Parameter(torch.tensor(start))

    def descend(self, optimizer, h, b):
        optimizer.zero_grad()
        loss = (0.5 * h * (self.x - b) ** 2).sum()
        loss.backward()
        optimizer.step(loss)


def sgd(model, **more):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, **more})


# ---- one worker ------------------------------------------------------------------------------------------------------


ONE_WORKER = {
    "allreduce": (AllReduceSGD(), {"momentum": 0.9, "weight_decay": 0.01}),
    "easgd": (EASGD(moving_rate=0.3, period=2), {"momentum": 0.9, "nesterov": True}),
    "easgd, synchronous": (EASGD(moving_rate=0.3, period=2, synchronous=True), {"weight_decay": 0.01}),
    "eamsgd": (EAMSGD(momentum=0.5, moving_rate=0.3, period=3), {"weight_decay": 0.01}),
    "gpu-asgd": (GPUASGD(period=3, warm_start_steps=4), {"momentum": 0.9}),
    "lsgd": (LSGD(period=2), {"momentum": 0.9}),
}


@pytest.mark.ranks(3)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("name", ONE_WORKER)
def test_a_group_equals_one_rank_with_all_samples(world, name, dtype, tolerance):
    method, base = ONE_WORKER[name]
    k = world.size
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(STEPS, k * BATCH, 6))).to(dtype)
    y = torch.from_numpy(rng.integers(4, size=(STEPS, k * BATCH)))
    ours, whole = mlp(world.rank, dtype), mlp(0, dtype)  # all begin as rank 0 does
    own, everything = slice(world.rank * BATCH, (world.rank + 1) * BATCH), slice(None)
    alone = world.split(world.rank)
    with (
        DistributedOptimizer(sgd(ours, **base), ours, method, world=world, replica_size=k) as group,
        DistributedOptimizer(sgd(whole, **base), whole, method, world=alone) as one,
    ):
        for t in range(STEPS):
            for model, optimizer, part in ((ours, group, own), (whole, one, everything)):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x[t, part]), y[t, part])
                loss.backward()
                optimizer.step(loss)
        np.testing.assert_allclose(numbers(ours), numbers(whole), rtol=tolerance, atol=tolerance)
        with group.consensus(), one.consensus():
            np.testing.assert_allclose(numbers(ours), numbers(whole), rtol=tolerance, atol=tolerance)
        assert len({theirs.tobytes() for theirs in world.comm.allgather(numbers(ours))}) == 1
    alone.free()


@pytest.mark.ranks(3)
def test_a_group_has_one_average_of_the_iterates(world):
    model = Point(np.zeros(7))
    average = Average("polyak", source="workers")
    seen = []
    with DistributedOptimizer(
        sgd(model), model, AllReduceSGD(), world=world, replica_size=world.size, average=average
    ) as optimizer:
        for _ in range(5):
            model.descend(optimizer, 1.0, 1.0 + world.rank)
            seen.append(numbers(model))
        np.testing.assert_allclose(optimizer.consensus_vector()[:7], np.mean(seen, 0), rtol=1e-12)
        world.barrier()


# ---- several workers -------------------------------------------------------------------------------------------------


H, B = np.array([0.5, 1.0, 2.0, 0.8]), np.array([1.0, -2.0, 0.5, 3.0])


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    "method",
    [
        EASGD(moving_rate=0.2, period=3, synchronous=True),
        EAMSGD(momentum=0.5, moving_rate=0.2, period=2, synchronous=True, grad_point="post"),
        AllReduceSGD(),
        LSGD(period=2, global_period=4, group_size=1, synchronous=True),
    ],
    ids=lambda method: method.name,
)
@pytest.mark.parametrize("k", [1, 2])
def test_groups_equal_simulated_workers(world, method, k):
    p, start = world.size // k, np.random.default_rng(1).normal(size=20)
    h, b = H[: world.size].reshape(p, k), B[: world.size].reshape(p, k)

    def gradient(worker, x):
        return np.mean([h[worker, i] * (x - b[worker, i]) for i in range(k)], axis=0)

    def loss(worker, x):
        return float(np.mean([0.5 * h[worker, i] * ((x - b[worker, i]) ** 2).sum() for i in range(k)]))

    simulated = simulate(method, p, start=start, eta=0.1, gradient=gradient)
    simulated.loss = loss
    simulated.run(STEPS)
    model = Point(start)
    with DistributedOptimizer(sgd(model), model, method, world=world, replica_size=k) as optimizer:
        for _ in range(STEPS):
            model.descend(optimizer, H[world.rank], B[world.rank])
        np.testing.assert_allclose(numbers(model), simulated.x()[world.rank // k], rtol=1e-12, atol=1e-13)
        world.barrier()
        np.testing.assert_allclose(optimizer.consensus_vector()[:20], simulated.consensus(), rtol=1e-12, atol=1e-13)
        if world.rank % k == 0:
            assert optimizer.metrics() == simulated.workers[world.rank // k].metrics()
        else:
            assert tuple(optimizer.metrics()) == method.metrics
            assert np.isnan(list(optimizer.metrics().values())).all()
        world.barrier()


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    "method", [EASGD(period=1), EAMSGD(momentum=0.5, period=1), GossipSGD(), LSGD(period=1)], ids=lambda m: m.name
)
def test_groups_of_an_asynchronous_method_do_not_wait_for_each_other(world, method):
    k = 2 if world.size == 4 else world.size
    model = Point(np.ones(100))
    with DistributedOptimizer(sgd(model), model, method, world=world, replica_size=k) as optimizer:
        for step in range(5 * (1 + world.rank // k)):  # a different number of steps in each group
            model.descend(optimizer, 1.0, 0.0)
            if world.rank == world.size - 1 and step % 2:  # a member alone, while the others train
                assert np.isfinite(optimizer.consensus_vector()).all()
        of_all = optimizer.group.comm.allgather(numbers(model))
        assert all(np.array_equal(vector, of_all[0]) for vector in of_all)


@pytest.mark.ranks(4)
def test_a_member_is_answered_while_its_head_waits_in_a_barrier(world):
    model = Point(np.full(50, 2.0))
    with DistributedOptimizer(sgd(model), model, EASGD(period=1), world=world, replica_size=2) as optimizer:
        model.descend(optimizer, 1.0, 0.0)
        world.barrier()
        if world.rank == world.size - 1:
            time.sleep(0.05)  # the others are in the barrier below
            for _ in range(3):
                assert optimizer.consensus_vector()[:50] == pytest.approx(np.full(50, 2.0), abs=0.3)
        world.barrier()
        of_all = world.comm.allgather(optimizer.consensus_vector().tobytes())  # and all at once
        assert len(set(of_all)) == 1


@pytest.mark.ranks(4)
def test_bytes_sent_inside_a_group_are_counted(world):
    n, k = 64, 2 if world.size == 4 else world.size
    model = Point(np.ones(n))
    with DistributedOptimizer(sgd(model), model, EASGD(period=2), world=world, replica_size=k) as optimizer:
        for _ in range(6):
            model.descend(optimizer, 1.0, 0.0)
        size = 8 * n
        of_gradients = 6 * (2 * (k - 1) * size // k)
        of_the_method = 3 * 2 * size  # center pulled and pushed at every second step
        of_parameters = 6 * size
        expected = of_gradients + (of_the_method if world.rank % k == 0 else of_parameters)
        assert optimizer.statistics.bytes_sent == expected
        world.barrier()


@pytest.mark.ranks(3)
def test_a_group_leaves_out_the_step_of_a_nonfinite_gradient(world):
    model = Point(np.ones(8))
    with DistributedOptimizer(sgd(model), model, EASGD(period=1), world=world, replica_size=world.size) as optimizer:
        model.descend(optimizer, np.nan if world.rank == world.size - 1 else 1.0, 0.0)
        assert (numbers(model) == 1.0).all()
        assert (optimizer.consensus_vector() == 1.0).all()
        model.descend(optimizer, 1.0, 0.0)
        assert np.isfinite(numbers(model)).all()
        world.barrier()


# ---- states ----------------------------------------------------------------------------------------------------------


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    "method", [EASGD(moving_rate=0.3, period=2), EAMSGD(momentum=0.5, period=2), LSGD(period=2)], ids=lambda m: m.name
)
def test_every_member_saves_and_loads_its_part(world, method):
    k = world.size  # one worker: the same order of events at every run
    base = {} if method.owns_update else {"momentum": 0.9}
    model, again = Point(np.ones(9)), Point(np.zeros(9))
    with (
        DistributedOptimizer(sgd(model, **base), model, method, world=world, replica_size=k) as whole,
        DistributedOptimizer(sgd(again, **base), again, method, world=world, replica_size=k) as resumed,
    ):
        for _ in range(5):
            model.descend(whole, H[world.rank], B[world.rank])
        resumed.load_state_dict(whole.state_dict())
        for one, optimizer in ((model, whole), (again, resumed)):
            for _ in range(4):
                one.descend(optimizer, H[world.rank], B[world.rank])
        assert np.array_equal(numbers(again), numbers(model))
        assert np.array_equal(resumed.consensus_vector(), whole.consensus_vector())
        world.barrier()


@pytest.mark.ranks(2)
def test_a_state_of_other_groups_is_refused(world):
    model, other = Point(np.ones(9)), Point(np.ones(9))
    with (
        DistributedOptimizer(sgd(model), model, EASGD(), world=world, replica_size=2) as group,
        DistributedOptimizer(sgd(other), other, EASGD(), world=world) as alone,
        pytest.raises(UsageError, match="replica_size 2, and this is 1"),
    ):
        alone.load_state_dict(group.state_dict())


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.ranks(3, 4)
def test_ranks_that_cannot_be_divided_are_refused(world):
    model = Point(np.ones(3))
    for k in (0, -1, world.size + 1, *(k for k in range(2, world.size) if world.size % k)):
        with pytest.raises(UsageError, match=f"must divide the number of ranks, which is {world.size}, not be {k}"):
            DistributedOptimizer(sgd(model), model, EASGD(), world=world, replica_size=k)
    for k in (1, world.size):
        check_replica_size(k, world)


@pytest.mark.ranks(2)
def test_only_the_head_measures_the_spread(world):
    model = Point(np.ones(3))
    with DistributedOptimizer(sgd(model), model, EASGD(), world=world, replica_size=2) as optimizer:
        vector = optimizer.consensus_vector()
        if world.rank == 0:
            assert optimizer.spread(vector) == (0.0, 0.0)
        else:
            with pytest.raises(UsageError, match="first rank of a replica group"):
                optimizer.spread(vector)
        world.barrier()


def test_the_configuration_refuses_a_replica_size_of_0():
    with pytest.raises(UsageError, match="--replica-size must be 1 or more, not 0"):
        TrainConfig(replica_size=0)


# ---- mpitrain train --------------------------------------------------------------------------------------------------


@pytest.fixture
def go(world, mpi_tmp_path):
    """Trains groups of two in a folder of the test, or resumes there, with the given budget. Collective."""

    def go(config: TrainConfig, name: str, *, resume: bool = False, **budget):
        folder = Path(mpi_tmp_path) / name
        if resume:
            return train(TrainConfig.of_run(folder, quiet=True, **budget), world, resume=folder)
        config = dataclasses.replace(config, out=str(folder), quiet=True, epochs=None, replica_size=2, **budget)
        return train(config, world)

    go.folder = Path(mpi_tmp_path)
    return go


@pytest.fixture
def interrupt_at(world):
    """Sends SIGUSR1 at a training batch of rank 0, for the model `small_models:watched`."""

    def interrupt_at(number: int) -> None:
        small_models.on_batch = lambda n: (
            os.kill(os.getpid(), signal.SIGUSR1) if n == number and world.rank == 0 else None
        )

    yield interrupt_at
    small_models.on_batch = None


def saved(world, run: Path) -> dict:
    """Return this rank's part of a run's newest checkpoint."""
    return load(latest(run / "checkpoints"), world)


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("name", "budget"),
    [
        ("easgd", {"gradients": 60}),
        ("gossip", {"minutes": 0.01}),
        ("lsgd", {"steps": 30}),
    ],
)
def test_the_members_of_a_group_stop_at_the_same_step(world, go, name, budget):
    config = TrainConfig(algorithm=name, straggler=(world.size - 1, 3.0), checkpoint_every=7)
    result = go(config, "run", **budget)
    assert result["complete"]
    assert (result["workers"], result["replica_size"]) == (world.size // 2, 2)
    steps = result["steps_of_ranks"]
    assert steps[0::2] == steps[1::2]
    assert result["gradients"] == sum(steps) >= budget.get("gradients", 1)
    if "steps" in budget:
        assert steps == [30] * world.size
    config_json = json.loads((go.folder / "run" / "config.json").read_text())
    assert config_json["config"]["replica_size"] == 2


@pytest.mark.ranks(4)
def test_a_group_is_interrupted_and_resumed_as_a_whole(world, go, interrupt_at):
    config = TrainConfig(algorithm="easgd", model="support.small_models:watched", straggler=(world.size - 1, 3.0))
    interrupt_at(12)
    before = go(config, "run", steps=40)
    assert not before["complete"]
    steps = before["steps_of_ranks"]
    assert steps[0::2] == steps[1::2]
    small_models.on_batch = None
    after = go(config, "run", resume=True)
    assert after["complete"]
    assert after["steps_of_ranks"] == [40] * world.size
    with pytest.raises(UsageError, match="--replica-size is 2 in the run that is resumed"):
        TrainConfig.of_run(go.folder / "run", replica_size=1)


@pytest.mark.ranks(4)
def test_a_resumed_run_of_groups_equals_an_uninterrupted_one(world, go):
    # No two runs with several asynchronous workers are equal.
    settings = {"synchronous": "true"} if world.size > 2 else {}
    config = TrainConfig(algorithm="easgd", settings={"period": "4", **settings}, model="support.small_models:watched")
    whole = go(config, "whole", steps=20)
    go(config, "parts", steps=9)
    parts = go(config, "parts", resume=True, steps=20)
    assert (parts["test_loss"], parts["bytes_sent"]) == (whole["test_loss"], whole["bytes_sent"])
    mine, wanted = (saved(world, go.folder / name)["optimizer"] for name in ("parts", "whole"))
    assert np.array_equal(mine["parameters"], wanted["parameters"])
    assert mine["method"].keys() == wanted["method"].keys()
    assert (world.rank % 2 == 0) == bool(mine["method"])


@pytest.mark.ranks(2)
def test_a_group_with_sharded_data_equals_one_rank_with_the_whole_batch(world, go):
    # Two ranks with batches of 16 draw the samples that one draws with batches of 32 (mpitrain.data.sampler).
    config = TrainConfig(algorithm="easgd", sampling="sharded", batch_size=16)
    group = go(config, "group", steps=30)
    alone = world.split(world.rank)
    one = train(TrainConfig(algorithm="easgd", sampling="sharded", batch_size=32, steps=30, quiet=True), alone)
    assert group["test_loss"] == pytest.approx(one["test_loss"], rel=1e-4)
    assert group["gradients"] == 2 * one["gradients"]
    alone.free()
