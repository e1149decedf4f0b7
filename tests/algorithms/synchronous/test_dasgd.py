"""DaSGD: corrections that arrive late, sum to zero, and leave the mean to the gradients alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.on_ranks import RankRun, ranks
from support.quadratic import assert_states_equal, load, same_bits, simulate, slope, states, statistics

from mpitrain.algorithms import DaSGD, LocalSGD
from mpitrain.simulation.communicator import SimulatedCommunicator, SimulatedPending
from mpitrain.simulation.schedules import RandomOrder

H, B = np.array([0.5, 1.0, 2.0, 4.0]), np.array([1.0, -2.0, 0.5, 3.0])
START = np.random.default_rng(0).normal(size=6)


def delayed_averaging(x, tau, d, eta, steps):
    """Run local SGD on the quadratics with corrections that arrive d steps late."""
    p, x, due = len(x), x.copy(), {}
    for t in range(1, steps + 1):
        x = x - eta * H[:p, None] * (x - B[:p, None])
        if t % tau == 0:
            due[t + d] = x.mean(0) - x
        x = x + due.pop(t, 0)
    return x


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 5), st.integers(0, 25), st.integers(0, 2**16))
def test_corrections_are_those_of_the_snapshots_at_any_delay(p, tau, d, steps, seed):
    start = np.random.default_rng(seed).normal(size=(p, 5))
    simulation = simulate(
        DaSGD(period=tau, delay=min(d, tau - 1)), p, start=start, eta=0.1, gradient=slope(H, B),
        schedule=RandomOrder(seed),
    ).run(steps)  # fmt: skip
    wanted = delayed_averaging(start, tau, min(d, tau - 1), 0.1, steps)
    np.testing.assert_allclose(simulation.x(), wanted, rtol=0, atol=1e-12)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 4), st.integers(0, 20), st.integers(0, 2**16))
def test_corrections_sum_to_zero_so_that_the_mean_follows_the_gradients(p, tau, d, steps, seed):
    rng = np.random.default_rng(seed)
    start, used = rng.normal(size=(p, 7)), np.zeros(7)

    def gradient(rank, x):
        nonlocal used
        g = rng.normal(size=7)
        used = used + g
        return g

    method, schedule = DaSGD(period=tau, delay=min(d, tau - 1)), RandomOrder(seed)
    end = simulate(method, p, start=start, eta=0.1, gradient=gradient, schedule=schedule).run(steps)
    np.testing.assert_allclose(end.x().sum(0), start.sum(0) - 0.1 * used, rtol=0, atol=1e-12)
    np.testing.assert_allclose(end.consensus(p - 1), end.x().mean(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("tau", [1, 3])
def test_without_delay_it_is_local_sgd(tau):
    ends = [
        simulate(method, 4, start=START, eta=0.1, gradient=slope(H, B)).run(20).x()
        for method in (DaSGD(period=tau, delay=0), LocalSGD(period=tau))
    ]
    np.testing.assert_allclose(*ends, rtol=0, atol=1e-12)


def test_alike_workers_are_sequential_sgd():
    simulation = simulate(DaSGD(period=3, delay=2), 4, start=START, eta=0.1, gradient=slope(1.7, 0.3)).run(20)
    wanted = 0.3 + (1 - 0.17) ** 20 * (START - 0.3)
    np.testing.assert_allclose(simulation.x(), np.tile(wanted, (4, 1)), rtol=0, atol=1e-12)


def test_a_vector_is_left_alone_during_its_average(monkeypatch):
    begin, begun, finished = SimulatedCommunicator.start_allreduce, [], []

    def watched(comm, vector, *, mean=False):
        pending, sent = begin(comm, vector, mean=mean), vector.local.copy()
        begun.append(sent)

        def wait():
            finished.append(same_bits(vector.local, sent))
            pending.wait()

        return SimulatedPending(wait)

    monkeypatch.setattr(SimulatedCommunicator, "start_allreduce", watched)
    simulation = simulate(DaSGD(period=4, delay=3), 3, start=START, eta=0.1, gradient=slope(H, B))
    for _ in range(30):
        simulation.run(1)
        states(simulation)
        simulation.consensus(1)
    assert len(begun) == 7 * 3
    assert finished == [True] * (6 * 3)  # the 7th is under way


@pytest.mark.parametrize("interrupted_at", range(4, 11))
def test_a_run_continues_bit_for_bit_with_an_average_under_way(interrupted_at):
    def simulation():
        return simulate(DaSGD(period=5, delay=3), 3, start=START, eta=0.1, gradient=slope(H, B))

    whole = simulation().run(interrupted_at)
    saved = states(whole)
    assert ("snapshot" in saved[0]) == (interrupted_at in (5, 6, 7, 10))
    whole.run(9)
    for resumed in (simulation(), simulation().run(6), simulation().run(interrupted_at)):
        load(resumed, saved).run(9)
        assert same_bits(resumed.x(), whole.x())
        for a, b in zip(states(resumed), states(whole), strict=True):
            assert_states_equal(a, b)


def test_nan_of_one_worker_stays_there():
    def gradient(rank, x):
        return np.where(np.arange(6) == 2, np.nan, x) if rank == 1 else x

    method = DaSGD(period=2, delay=1)
    simulation = simulate(method, 3, start=START, eta=0.1, gradient=gradient).run(9)
    assert np.isfinite(simulation.x()[[0, 2]]).all()
    assert statistics(simulation, "n_nonfinite") == [4, 4, 4]


def test_a_delay_of_a_period_is_cut_with_a_warning():
    assert DaSGD(period=4, delay=3).steps_late == DaSGD(period=4, delay=9).steps_late == 3
    assert not list(DaSGD(period=4, delay=3).warnings(4, 0.1))
    (told,) = DaSGD(period=4, delay=9).warnings(4, 0.1)
    assert "delay=9" in told
    assert "period=4" in told


@pytest.mark.ranks(3)
@pytest.mark.parametrize("n_nodes", [1, 2])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_between_ranks_the_mean_follows_the_mean_gradient_step(world, n_nodes, dtype):
    with ranks(n_nodes) as comm:
        start = np.random.default_rng(7).normal(size=10_000).astype(dtype)
        run = RankRun(DaSGD(period=4, delay=2), comm, start)
        own = np.random.default_rng(comm.rank)
        used = np.zeros(start.size)
        for steps in (5, 4, 6, 3):  # an average is under way after the first, the second and the third
            used += run.run(steps, 0.1, lambda rank, x: own.normal(size=x.size))
            wanted = comm.size * start.astype(np.float64) - 0.1 * run.sum(used)
            found = run.sum(run.worker.x.local.astype(np.float64))
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12 if dtype == np.float64 else 1e-4)


@pytest.mark.ranks(3)
def test_between_ranks_a_run_continues_with_an_average_under_way(world):
    with ranks(1) as comm:
        start = np.random.default_rng(7).normal(size=300)
        whole = RankRun(DaSGD(period=4, delay=2), comm, start)
        whole.run(5, 0.1, lambda rank, x: np.sin(x) * (1 + rank))
        mine = {name: np.copy(value) for name, value in whole.states()[comm.rank].items()}
        assert "snapshot" in mine
        whole.run(5, 0.1, lambda rank, x: np.sin(x) * (1 + rank))
        resumed = RankRun(DaSGD(period=4, delay=2), comm, 0 * start)
        resumed.worker.x.local[...] = mine["parameters"]
        resumed.worker.load(mine)
        resumed.run(5, 0.1, lambda rank, x: np.sin(x) * (1 + rank))
        assert same_bits(resumed.worker.x.local, whole.worker.x.local)
