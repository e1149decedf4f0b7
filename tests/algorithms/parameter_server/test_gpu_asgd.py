"""GPU A-SGD: client 0 alone at first, then DOWNPOUR between all clients."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.quadratic import (
    assert_states_equal,
    load,
    radius,
    same_bits,
    simulate,
    slope,
    states,
    statistics,
    sweep_matrix,
)
from torch import nn

from mpitrain import GPUASGD, DistributedOptimizer, Downpour
from mpitrain.simulation.engine import Simulation
from mpitrain.simulation.schedules import RandomOrder, Scripted
from mpitrain.simulation.world import SimulatedWorld
from mpitrain.theory import downpour_bound

H, B = np.array([0.5, 1.0, 2.0, 0.8]), np.array([1.0, -2.0, 0.5, 3.0])


def run(method, p, steps, **more):
    start = np.random.default_rng(0).normal(size=12)
    more = {"gradient": slope(H, B), "largest_shard": 5, **more}
    return simulate(method, p, start=start, eta=0.1, **more).run(steps)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 20), st.integers(0, 2**16))
def test_clients_of_one_rank_from_a_cold_start_are_downpour(p, n_sync, steps, seed):
    runs = [
        run(method, p, steps, schedule=RandomOrder(seed), interleave_locks=True)
        for method in (GPUASGD(period=n_sync), Downpour(period=n_sync))
    ]
    assert same_bits(runs[0].x(), runs[1].x())
    assert same_bits(runs[0].consensus(), runs[1].consensus())


@pytest.mark.parametrize("p", [2, 3, 4])
def test_clients_served_in_turn_are_stable_up_to_downpours_bound(p):
    eh = 0.05
    for n_sync in (1, 5, 10, 15, 20, 40):
        q = 1 - (1 - eh) ** n_sync
        found = radius(sweep_matrix(GPUASGD(period=n_sync), p, eh=eh, steps=n_sync))
        assert (found < 1) == (q < downpour_bound(p)), n_sync


@given(st.integers(2, 4), st.integers(1, 4), st.integers(1, 12), st.integers(0, 2**16))
def test_only_client_0_trains_or_commits_during_the_warm_start(p, n_sync, warm, seed):
    made = []

    def look(simulation, rank):
        made.append(rank)
        others = simulation.x()[1:]
        if made.count(0) < warm:
            assert same_bits(others, np.broadcast_to(start, others.shape).copy())
            alone = simulate(Downpour(period=n_sync), 1, start=start, eta=0.1, gradient=slope(H[0], B[0]))
            np.testing.assert_allclose(simulation.consensus(), alone.run(made.count(0)).consensus(), rtol=1e-12)
            assert statistics(simulation, "n_exchanges")[1:] == [0] * (p - 1)

    start = np.random.default_rng(seed).normal(size=3)
    method = GPUASGD(period=n_sync, warm_start_steps=warm)
    simulate(method, p, start=start, eta=0.1, gradient=slope(H, B), schedule=RandomOrder(seed)).run(warm + 3, look)


@pytest.mark.parametrize("n_sync", [1, 4, 50])
def test_clients_start_alike_from_client_0s_model(n_sync):
    warm = 10
    method = GPUASGD(period=n_sync, warm_start_steps=warm)
    script = Scripted([*[0, 1, 2] * (warm - 1), 0, 2, 1])  # the last step of each of the two finds client 0 done
    simulation = run(method, 3, 10**6, schedule=script)
    alone = run(Downpour(period=n_sync), 1, warm, gradient=slope(H[0], B[0]))
    x = simulation.x()
    assert same_bits(x[1], x[0])
    assert same_bits(x[2], x[0])
    assert same_bits(simulation.consensus(), x[0])  # all of the warm start, also of a period that had just begun
    np.testing.assert_allclose(x[0], alone.x()[0], rtol=1e-13)


def test_a_client_that_joins_makes_its_next_step_from_the_center():
    method = GPUASGD(period=1, warm_start_steps=2)
    simulation = run(method, 2, 10**6, schedule=Scripted([1, 0, 0, 1, 1]))
    start = np.random.default_rng(0).normal(size=12)
    x = start - 0.1 * H[0] * (start - B[0])
    x = x - 0.1 * H[0] * (x - B[0])
    np.testing.assert_allclose(simulation.x()[0], x, rtol=1e-13)
    np.testing.assert_allclose(simulation.x()[1], x - 0.1 * H[1] * (x - B[1]), rtol=1e-13)
    np.testing.assert_allclose(simulation.consensus(), simulation.x()[1], rtol=1e-13)


@given(st.integers(1, 3), st.integers(1, 8), st.integers(1, 5), st.integers(0, 2**16))
def test_the_center_is_the_start_plus_all_commits(p, warm, n_sync, seed):
    # With gradient 1 for all, the center is at -eta times the steps committed, whoever made them.
    method = GPUASGD(period=n_sync, warm_start_steps=warm)
    steps = warm + 2 * n_sync
    simulation = run(method, p, steps, gradient=lambda rank, x: np.ones_like(x), schedule=RandomOrder(seed))
    committed = (simulation.run(0).consensus() - np.random.default_rng(0).normal(size=12)) / -0.1
    np.testing.assert_allclose(committed, committed[0], rtol=1e-10)
    exchanges = statistics(simulation, "n_exchanges")
    of_client_0 = warm + (steps - warm) // n_sync * n_sync
    of_others = n_sync * sum(max(n - 1, 0) for n in exchanges[1:])  # the first only joins
    assert committed[0] == pytest.approx(of_client_0 + of_others, rel=1e-9)


def test_a_client_that_still_waits_at_the_end_has_nothing_to_commit():
    simulation = run(GPUASGD(period=3, warm_start_steps=9), 3, 4, gradient=lambda rank, x: np.ones_like(x))
    for worker in simulation.workers:
        worker.finalize()
    start = np.random.default_rng(0).normal(size=12)
    np.testing.assert_allclose(simulation.consensus(), start - 4 * 0.1, rtol=1e-12)  # client 0's steps
    assert same_bits(simulation.x()[1:], np.tile(start, (2, 1)))
    assert statistics(simulation, "n_exchanges")[1:] == [0, 0]


@given(st.integers(0, 12), st.integers(1, 6), st.integers(1, 3))
def test_a_checkpoint_in_the_middle_of_the_warm_start_loses_nothing(before, after, p):
    method = GPUASGD(period=3, warm_start_steps=7)
    whole = run(method, p, before)
    saved = states(whole)
    whole.run(after)
    resumed = load(run(method, p, 0), saved).run(after)
    assert same_bits(resumed.x(), whole.x())
    for a, b in zip(states(resumed), states(whole), strict=True):
        assert_states_equal(a, b)


def test_more_clients_than_the_bound_allows_give_a_warning():
    assert not list(GPUASGD(period=1).warnings(4, 0.05))
    assert list(GPUASGD(period=40).warnings(4, 0.05))


class Point(nn.Module):
    """A model with parameters x and the gradient h*(x - b)."""

    def __init__(self, start):
        super().__init__()
        self.x = nn.Parameter(torch.tensor(start))

    def descend(self, optimizer, h, b):
        optimizer.zero_grad()
        (0.5 * h * (self.x - b) ** 2).sum().backward()
        optimizer.step()


def numbers(model):
    return model.x.detach().numpy().copy()


@pytest.mark.ranks(1, 3)
@pytest.mark.time_limit(180)
@pytest.mark.parametrize("k", [1, 2])
def test_groups_join_when_the_first_has_finished(world, k):
    if world.size % k:
        k = world.size
    warm, start = 5, np.ones(6)
    model, client = Point(start), world.rank // k
    method = GPUASGD(period=4, warm_start_steps=warm)
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with DistributedOptimizer(base, model, method, world=world, replica_size=k) as optimizer:
        for _ in range(0 if client == 0 else 3):
            model.descend(optimizer, 1.0, 0.0)
            assert np.array_equal(numbers(model), start)
        world.barrier()
        for _ in range(warm if client == 0 else 0):
            model.descend(optimizer, 1.0, 0.0)
        world.barrier()
        for _ in range(0 if client == 0 else 1):
            model.descend(optimizer, 1.0, 0.0)
        everyones = world.comm.allgather(numbers(model))
        assert all(np.array_equal(theirs, everyones[0]) for theirs in everyones)
        x, v = 1.0, 0.0
        for _ in range(warm):
            v = 0.9 * v + x
            x -= 0.1 * v
        np.testing.assert_allclose(everyones[0], x, rtol=1e-12)
        world.barrier()


def test_clients_start_when_client_0_dies_in_the_warm_start():
    def kill(simulation, rank):
        if rank == 0 and simulation.workers[0].t == 5:
            simulation.world.kill(0)

    method = GPUASGD(period=1, warm_start_steps=20)
    run = Simulation(method, SimulatedWorld(3), slope(1.0), np.ones(4), 0.1).run(60, kill)
    assert np.abs(run.consensus(1)).max() < 0.1  # a warm start of 5 steps alone leaves 0.59


def test_client_0_does_not_wait_for_itself_when_it_continues_with_the_part_of_another():
    method = GPUASGD(period=1, warm_start_steps=20)
    parts = states(run(method, 3, 5))
    assert [state["waits"] for state in parts] == [False, True, True]
    continued = load(run(method, 3, 0), [parts[1] | {"center": parts[0]["center"]}, *parts[1:]])
    assert [state["waits"] for state in states(continued)] == [False, True, True]
    continued.run(20)
    assert [state["waits"] for state in states(continued)] == [False, False, False]
