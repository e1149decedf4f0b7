"""Laws that hold between ranks, for any number of them."""

import os
import re

import numpy as np
import pytest
import torch
from support.on_ranks import ranks
from support.quadratic import simulate, slope
from torch import nn

from mpitrain import (
    EAMSGD,
    EASGD,
    AllReduceSGD,
    Average,
    DistributedOptimizer,
    Downpour,
    GossipSGD,
    NeuroevolutionSGD,
    SlowMo,
    UsageError,
)
from mpitrain.collectives.world.agreement import ranks_in_words
from mpitrain.log import logger

# The first optimizer imports a large part of torch, which is slow where ranks share a core.
pytestmark = [pytest.mark.ranks(3), pytest.mark.time_limit(180)]


SHARED = AllReduceSGD(node_shared=True)


def numbers(model):
    return np.concatenate([p.detach().double().numpy().ravel() for p in model.parameters()])


def mlp(seed, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).to(dtype)


class Point(nn.Module):
    """Parameters x whose gradient is h*(x - b)."""

    def __init__(self, start):
        super().__init__()
        self.x = nn.Parameter(torch.tensor(start))

    def descend(self, optimizer, h, b):
        optimizer.zero_grad()
        (0.5 * h * (self.x - b) ** 2).sum().backward()
        optimizer.step()


def test_all_ranks_begin_with_the_model_of_rank_0(world):
    def model(seed):
        torch.manual_seed(seed)
        made = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2, dtype=torch.float32))
        made[1].running_mean.fill_(seed + 0.5)
        made[1].num_batches_tracked.fill_(seed + 7)
        return made

    mine, first = model(world.rank), model(0)
    with DistributedOptimizer(torch.optim.SGD(mine.parameters(), lr=0.1), mine, EASGD()):
        for name, tensor in mine.state_dict().items():
            assert torch.equal(tensor, first.state_dict()[name]), name


class Secret(nn.Module):
    """A module with buffers that a state_dict does not hold, in a module of its own."""

    def __init__(self, value, size=3, dtype=torch.float32):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.layer.register_buffer("mask", torch.full((size,), value, dtype=dtype), persistent=False)
        self.layer.register_buffer("count", torch.tensor(int(value)), persistent=False)


@pytest.mark.parametrize("method", [EASGD(), AllReduceSGD(), SHARED], ids=["easgd", "allreduce", "shared"])
def test_all_ranks_begin_with_the_buffers_of_rank_0_that_no_state_dict_holds(world, method):
    model = Secret(1.0 + world.rank)
    with DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, method):
        assert model.layer.mask.tolist() == [1.0] * 3
        assert model.layer.count == 1


@pytest.mark.ranks(3)
@pytest.mark.parametrize(
    ("other", "words"),
    [({"size": 4}, r"layer\.mask.*\(3,\) float32"), ({"dtype": torch.float64}, r"layer\.mask.*float64")],
    ids=["size", "type"],
)
def test_a_buffer_that_no_state_dict_holds_must_be_alike(world, other, words):
    model = Secret(1.0, **(other if world.rank == 1 else {}))
    with pytest.raises(UsageError, match=words):
        DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, EASGD())


def test_ranks_share_the_cores(world, monkeypatch):
    n_cores, before = len(os.sched_getaffinity(0)), torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(n_cores)
    try:
        model = mlp(0)
        with DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, EASGD()):
            assert torch.get_num_threads() == max(n_cores // world.local_size, 1)
    finally:
        torch.set_num_threads(before)


def test_parameters_outside_the_optimizer_begin_with_those_of_rank_0_too(world):
    mine, first = mlp(world.rank), mlp(0)
    mine[0].requires_grad_(False)
    with DistributedOptimizer(torch.optim.SGD(mine[2].parameters(), lr=0.1), mine, AllReduceSGD()):
        assert np.array_equal(numbers(mine), numbers(first))


def of_width(n):
    return nn.Sequential(nn.Linear(6, n), nn.Linear(n, 4))


def freeze_bias(model):
    model[0].bias.requires_grad_(False)
    return model


OTHERS = {
    "shape": (
        lambda: of_width(8),
        "parameter 0.weight differs between ranks: (9, 6) float32 trainable on FIRST, (8, 6) float32 trainable",
    ),
    "type": (
        lambda: of_width(9).double(),
        "parameter 0.weight differs between ranks: (9, 6) float32 trainable on FIRST, (9, 6) float64 trainable",
    ),
    "number": (
        lambda: of_width(9).append(nn.Linear(4, 4)),
        "parameter 2.weight differs between ranks: absent on FIRST, (4, 4) float32 trainable",
    ),
    "buffers": (
        lambda: of_width(9).append(nn.BatchNorm1d(4, affine=False)),
        "buffer 2.running_mean differs between ranks: absent on FIRST, (4,) float32",
    ),
    "frozen": (
        lambda: freeze_bias(of_width(9)),
        "parameter 0.bias differs between ranks: (9,) float32 trainable on FIRST, (9,) float32 frozen",
    ),
}


@pytest.mark.ranks(3)
@pytest.mark.parametrize("difference", OTHERS)
def test_a_model_that_differs_on_one_rank_is_refused_on_all(world, difference):
    make, words = OTHERS[difference]
    last = world.size - 1
    model = make() if world.rank == last else of_width(9)
    words = re.escape(words.replace("FIRST", ranks_in_words(range(last))))
    with pytest.raises(UsageError, match=words + f" on rank {last}.*; create the same"):
        DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, EASGD())


@pytest.mark.ranks(3)
def test_the_order_of_the_parameters_must_be_the_same_on_all_ranks(world):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    layers = model if world.rank == 0 else reversed(model)
    base = torch.optim.SGD([p for layer in layers for p in layer.parameters()], lr=0.1)
    with pytest.raises(
        UsageError, match=r"number 0 of parameter group 0 differs .*: 0.weight .* on rank 0, 1.weight .* on ranks? 1"
    ):
        DistributedOptimizer(base, model, EASGD())


# What differs on the last rank, by (others' value, its own).
SETTINGS = {
    "method": (lambda last: {"method": SlowMo() if last else EASGD()}, r"the method differs .*: easgd on .* slowmo on"),
    "period": (
        lambda last: {"method": EASGD(period=7 if last else 5)},
        "period of easgd differs between ranks: 5 on .* 7 on",
    ),
    "learning rate": (
        lambda last: {"lr": 0.001 if last else 0.1},
        "lr of parameter group 0 differs .*: 0.1 on .* 0.001 on",
    ),
    "momentum": (
        lambda last: {"momentum": 0.9 if last else 0.0},
        "momentum of parameter group 0 differs .*: 0.0 on .* 0.9",
    ),
    "optimizer": (
        lambda last: {"kind": torch.optim.Adagrad if last else torch.optim.SGD},
        "the base optimizer differs",
    ),
    "groups": (
        lambda last: {"n_groups": 2 if last else 1},
        "the number of parameter groups differs between ranks: 1 on .* 2",
    ),
    "seed": (lambda last: {"seed": int(last)}, r"seed differs between ranks: 0 on .* 1 on"),
    "average": (
        lambda last: {"average": Average("polyak") if last else None},
        "average differs between ranks: None on",
    ),
    "wire": (
        lambda last: {"wire": "bfloat16" if last else "float32"},
        "wire differs between ranks: float32 on .* bfloat16",
    ),
}


def make_optimizer(method=None, lr=0.1, momentum=None, kind=torch.optim.SGD, n_groups=1, **options):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    groups = [{"params": list(part.parameters())} for part in (model if n_groups == 2 else [model])]
    base = kind(groups, lr=lr, **({} if momentum is None else {"momentum": momentum}))
    return DistributedOptimizer(base, model, method or AllReduceSGD(), **options)


@pytest.mark.ranks(3)
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_that_differs_on_one_rank_is_refused_on_all_with_its_values(world, setting):
    arguments, words = SETTINGS[setting]
    last = world.size - 1
    with pytest.raises(UsageError, match=words) as error:
        make_optimizer(**arguments(world.rank == last))
    assert f"on rank {last}" in str(error.value)


@pytest.mark.ranks(3)
@pytest.mark.parametrize("method", [EASGD, NeuroevolutionSGD])
def test_learning_rates_may_differ_where_workers_are_independent_with_a_warning(world, method, caplog, monkeypatch):
    monkeypatch.setattr(logger, "propagate", True)
    make_optimizer(method=method(), lr=0.1 if world.rank == 0 else 0.001).close()
    told = [record.getMessage() for record in caplog.records if "lr of parameter group 0" in record.getMessage()]
    rest = ranks_in_words(range(1, world.size))
    assert told == (
        [f"lr of parameter group 0 is 0.1 on rank 0, 0.001 on {rest}: {method.name} allows it, but is it meant?"]
        if world.rank == 0
        else []
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_ranks_with_b_samples_equal_one_process_with_all_samples(world, dtype, tolerance):
    p, b, steps = world.size, 3, 15
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(steps, p * b, 6))).to(dtype)
    y = torch.from_numpy(rng.integers(4, size=(steps, p * b)))
    ours, whole = mlp(world.rank, dtype), mlp(0, dtype)
    alone = torch.optim.SGD(whole.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    base = torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    own = slice(world.rank * b, (world.rank + 1) * b)
    with DistributedOptimizer(base, ours, AllReduceSGD()) as optimizer:
        for t in range(steps):
            for model, one, part in ((ours, optimizer, own), (whole, alone, slice(None))):
                one.zero_grad()
                nn.functional.cross_entropy(model(x[t, part]), y[t, part]).backward()
                one.step()
        np.testing.assert_allclose(numbers(ours), numbers(whole), rtol=tolerance, atol=tolerance)
        of_all = world.comm.allgather(numbers(ours))
        assert all(np.array_equal(vector, of_all[0]) for vector in of_all)


def groups(model):
    """Return an SGD with two parameter groups that have settings of their own."""
    return torch.optim.SGD(
        [
            {"params": model[0].parameters(), "weight_decay": 0.01},
            {"params": model[2].parameters(), "lr": 0.03, "momentum": 0.8, "nesterov": True},
        ],
        lr=0.1,
        momentum=0.9,
    )


def descend(model, optimizer, t, rank=0, size=1):
    """Make a step with this rank's part of the 60 samples of step ``t``."""
    rng = np.random.default_rng(t)
    x, y = torch.from_numpy(rng.normal(size=(60, 6))), torch.from_numpy(rng.integers(4, size=60))
    own = slice(rank * 60 // size, (rank + 1) * 60 // size)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x[own]), y[own]).backward()
    optimizer.step()


@pytest.mark.parametrize("n_nodes", [1, 2])
def test_ranks_of_a_node_share_parameters_and_each_keeps_the_momentum_of_its_slice(n_nodes):
    with ranks(n_nodes) as comm:
        ours, whole = mlp(comm.rank), mlp(0)
        alone = groups(whole)
        with DistributedOptimizer(groups(ours), ours, SHARED, world=comm.world) as optimizer:
            for t in range(9):
                descend(ours, optimizer, t, comm.rank, comm.size)
                descend(whole, alone, t)
            np.testing.assert_allclose(numbers(ours), numbers(whole), rtol=1e-12, atol=1e-12)
            held = optimizer.state_dict()["method"]["velocity"].numel()
            of_nodes = [(comm.nodes[comm.rank], held)]
            total = dict.fromkeys(comm.nodes, 0)
            for node, size in comm.world.comm.allreduce(of_nodes):
                total[node] += size
            assert set(total.values()) == {optimizer.state_dict()["parameters"].numel()}
            comm.barrier()
            if comm.rank == comm.world.node_ranks[0]:
                with torch.no_grad():
                    ours[0].weight.fill_(3.0)
            comm.barrier()
            assert (ours[0].weight == 3.0).all()  # the node has one copy
            comm.barrier()
        assert (ours[0].weight == 3.0).all()  # and each rank its own after close()


@pytest.mark.parametrize("method", [AllReduceSGD(), SHARED], ids=["own", "shared"])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (1, 1)])
def test_a_state_continues_on_another_number_of_nodes(before, after, method):
    whole = mlp(0)
    alone = groups(whole)
    for t in range(9):
        descend(whole, alone, t)
    with ranks(before) as comm:
        model = mlp(0)
        with DistributedOptimizer(groups(model), model, method, world=comm.world) as optimizer:
            for t in range(5):
                descend(model, optimizer, t, comm.rank, comm.size)
            saved = optimizer.state_dict()
    with ranks(after) as comm:
        model = mlp(7)
        with DistributedOptimizer(groups(model), model, method, world=comm.world) as optimizer:
            optimizer.load_state_dict(saved)
            for t in range(5, 9):
                descend(model, optimizer, t, comm.rank, comm.size)
            np.testing.assert_allclose(numbers(model), numbers(whole), rtol=1e-12, atol=1e-12)


H, B = np.array([0.5, 1.0, 2.0, 0.8, 1.4]), np.array([1.0, -2.0, 0.5, 3.0, 0.1])


@pytest.mark.parametrize("tau", [1, 3])
@pytest.mark.parametrize("grad_point", ["pre", "post"])
@pytest.mark.parametrize("kind", [EASGD, EAMSGD])
def test_ranks_do_what_simulated_workers_do(world, kind, grad_point, tau):
    method = kind(moving_rate=0.2, period=tau, synchronous=True, grad_point=grad_point)
    start, steps, p = np.random.default_rng(1).normal(size=50), 20, world.size
    simulated = simulate(method, p, start=start, eta=0.1, decay=0.01, gradient=slope(H[:p], B[:p])).run(steps)
    model = Point(start)
    base = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01)
    with DistributedOptimizer(base, model, method) as optimizer:
        for _ in range(steps):
            model.descend(optimizer, H[world.rank], B[world.rank])
        np.testing.assert_allclose(numbers(model), simulated.x()[world.rank][:50], rtol=1e-12, atol=1e-13)
        with optimizer.consensus():
            np.testing.assert_allclose(numbers(model), simulated.consensus()[:50], rtol=1e-12, atol=1e-13)


def test_asynchronous_exchanges_conserve_the_sum_of_workers_and_center(world):
    rng = np.random.default_rng(world.rank)
    model = Point(np.zeros(1000))
    with DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), model, EASGD(period=1)) as optimizer:
        mine = rng.normal(size=1000)
        with torch.no_grad():
            model.x.copy_(torch.from_numpy(mine))
        total = world.comm.allreduce(mine)  # and the center is 0
        for _ in range(int(rng.integers(20, 60))):
            model.descend(optimizer, 1.0, 0.0)
        world.barrier()
        sum_of_workers = world.comm.allreduce(numbers(model))
        with optimizer.consensus():
            center = numbers(model)
        np.testing.assert_allclose(sum_of_workers + center, total, rtol=0, atol=1e-12)
        assert np.abs(center).max() > 1e-3
        world.barrier()


@pytest.mark.parametrize("in_groups", [False, True])
def test_finalize_pushes_the_steps_since_the_last_exchange(world, in_groups):
    model, k, n_steps = Point(np.ones(50)), world.size if in_groups else 1, 3
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with DistributedOptimizer(base, model, Downpour(period=100), replica_size=k) as optimizer:
        for _ in range(n_steps):
            model.descend(optimizer, 1.0, 0.0)
        world.barrier()
        optimizer.wait()
        optimizer.finalize()
        world.barrier()
        gained = (1 - 0.1) ** n_steps - 1
        if world.rank % k == 0:  # other members ask by message, which not every MPI allows
            np.testing.assert_allclose(optimizer.consensus_vector()[:50], 1 + world.size // k * gained, rtol=1e-12)
        of_all = world.comm.allgather(numbers(model))
        assert all(np.array_equal(vector, of_all[0]) for vector in of_all) or not in_groups
        world.barrier()


def test_gossip_stays_in_the_convex_hull(world):
    model = Point(np.zeros(200))
    for direction in ("pull", "push"):
        method = GossipSGD(direction=direction)
        with DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), model, method) as optimizer:
            with torch.no_grad():
                model.x.fill_(1.0 + world.rank)
            world.barrier()
            for _ in range(40):
                model.descend(optimizer, 1.0, 0.0)
            # Before the values were set above, ranks published the zeros of the start.
            assert (numbers(model) >= 0).all()
            assert (numbers(model) <= world.size).all()
            world.barrier()


def test_asynchronous_ranks_do_not_wait_for_each_other(world):
    model = Point(np.ones(100))
    for method in (EASGD(period=1), EAMSGD(momentum=0.5, period=1), GossipSGD(), GossipSGD(direction="push")):
        with DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, method) as optimizer:
            for _ in range(5 * (1 + world.rank)):  # a different number of steps on each
                model.descend(optimizer, 1.0, 0.0)
            if world.rank == 0:  # alone, while the others still train
                with optimizer.consensus():
                    assert np.isfinite(numbers(model)).all()


def test_batchnorm_statistics_stay_local(world):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    with DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), model, AllReduceSGD()) as optimizer:
        torch.manual_seed(world.rank)
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(8, 3) + world.rank).square().mean().backward()
            optimizer.step()
        means = world.comm.allgather(model[1].running_mean.numpy().copy())
        of_all = world.comm.allgather(numbers(model))
        assert all(np.array_equal(vector, of_all[0]) for vector in of_all)
        assert len({mean.tobytes() for mean in means}) == world.size


def test_a_rank_with_nonfinite_gradients_warns_once(world, caplog):
    model = Point(np.ones(64))
    with DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, EASGD(period=1)) as optimizer:
        bad = world.rank == world.size - 1
        for t in range(6):
            model.descend(optimizer, np.nan if bad and t in (1, 3) else 1.0, 0.0)
            world.barrier()
    warnings = [record for record in caplog.records if "not finite" in record.getMessage()]
    assert len(warnings) == bad
    for record in warnings:
        assert record.getMessage().startswith("64 values were not finite and were kept out of the exchange")
        assert (record.name, record.levelname, record.any_rank) == ("mpitrain", "WARNING", True)


def test_a_nan_stays_on_its_rank_which_recovers(world):
    model = Point(np.ones(64))
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    with DistributedOptimizer(base, model, EASGD(period=1)) as optimizer:
        bad = world.rank == world.size - 1 and world.size > 1
        for step in range(5):
            model.descend(optimizer, np.nan if bad and step == 2 else 1.0, 0.0)
            assert np.isfinite(numbers(model)).all() != (bad and step == 2)
        world.barrier()
        assert optimizer.statistics.n_nonfinite == (64 if bad else 0)
        with optimizer.consensus():
            assert np.isfinite(numbers(model)).all()
        world.barrier()


@pytest.mark.ranks(3)
def test_an_average_does_not_disturb_an_overlapped_all_reduce(world):
    model = Point(np.full(8, 1.0 + world.rank))
    base, average = torch.optim.SGD(model.parameters(), lr=0.1), Average("moving", 0.5)
    with DistributedOptimizer(base, model, AllReduceSGD(overlap=True), average=average) as optimizer:
        (model.x * (1.0 + world.rank)).sum().backward()
        assert np.allclose(model.x.grad.numpy(), (1 + world.size) / 2)  # the mean, before the step
        optimizer.step()
        world.barrier()
