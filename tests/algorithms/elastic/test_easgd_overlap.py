"""EASGD with exchanges in the background: late for the worker, never lost."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.on_ranks import RankRun, ranks
from support.quadratic import simulate, slope

from mpitrain import EASGD, UsageError
from mpitrain.collectives.world.background import Background
from mpitrain.simulation.schedules import RandomOrder, RoundRobin

ALL = pytest.mark.ranks(2, 3)
N = 700


def under_way(worker):
    """Return E_i, or zeros; the worker waits for its own exchange."""
    return dict(worker.state()).get("under_way", np.zeros_like(worker.x.local))


def whole(simulation):
    """Return sum_i x_i + c - (the E_i under way)."""
    return simulation.x().sum(0) + simulation.consensus() - sum(under_way(worker) for worker in simulation.workers)


@given(p=st.integers(1, 5), seed=st.integers(0, 2**16), steps=st.integers(1, 9), period=st.integers(1, 3))
def test_exchanges_conserve_the_sum_with_those_under_way(p, seed, steps, period):
    start = np.random.default_rng(seed).normal(size=(p, 40))
    method = EASGD(moving_rate=0.3, period=period, overlap=True)
    world = {"largest_shard": 8, "interleave_locks": True}
    simulation = simulate(method, p, start=start, eta=0.0, schedule=RandomOrder(seed), **world)
    before = whole(simulation)
    simulation.run(steps)
    np.testing.assert_allclose(whole(simulation), before, rtol=0, atol=1e-12)


def test_a_lone_exchange_is_applied_one_step_later():
    simulation = simulate(EASGD(moving_rate=0.25, period=2, overlap=True), 1, start=np.full(3, 8.0), eta=0.0)
    (worker,) = simulation.workers
    worker.x.local[...] = 16.0  # and the center is 8
    seen = []
    simulation.run(4, lambda *_: seen.append((worker.x.local[0], float(simulation.consensus()[0]))))
    # E = 2 at step 0, taken at step 1; E = (14 - 10)/4 = 1 at step 2, taken at step 3.
    assert seen == [(16.0, 10.0), (14.0, 10.0), (14.0, 11.0), (13.0, 11.0)]


def test_late_moves_find_the_same_minimum():
    method = EASGD(moving_rate=0.2, period=3, overlap=True)
    simulation = simulate(method, 3, start=np.zeros(5), eta=0.1, gradient=slope(1.0, 0.7), schedule=RoundRobin())
    np.testing.assert_allclose(simulation.run(600).consensus(), 0.7, atol=1e-9)


@pytest.mark.parametrize("settings", [{"synchronous": True}, {"order": "center_first"}, {"order": "worker_first"}])
def test_settings_that_cannot_overlap_are_refused(settings):
    with pytest.raises(UsageError, match="overlap is for asynchronous exchanges in jacobi order"):
        EASGD(overlap=True, **settings)


def test_background_operations_run_in_order_in_one_thread():
    background, order, gate = Background(threads=True), [], threading.Event()
    first = background.start(lambda: (gate.wait(10), order.append(threading.current_thread().name)))
    second = background.start(lambda: order.append("second"))
    assert not first.done
    assert not second.done
    gate.set()
    second.wait()
    assert first.done
    assert second.done
    assert order[0] != threading.current_thread().name
    assert order[1] == "second"
    background.stop()


def test_an_error_in_the_background_is_raised_at_its_end():
    background = Background(threads=True)

    def fail():
        raise KeyError("shard")

    started = background.start(fail)
    with pytest.raises(KeyError, match="shard"):
        started.wait()
    background.stop()


def test_without_threads_operations_run_at_once():
    done = []
    started = Background(threads=False).start(lambda: done.append(threading.current_thread()))
    assert started.done
    assert done == [threading.main_thread()]


@ALL
@pytest.mark.parametrize("n_nodes", [1, 2])
def test_ranks_conserve_the_sum(n_nodes):
    with ranks(n_nodes) as comm:
        rng = np.random.default_rng(comm.rank)
        run, mine, center = RankRun(EASGD(period=1, overlap=True), comm, np.zeros(N)), rng.normal(size=N), np.empty(N)
        run.worker.x.local[...] = mine
        before = run.sum(mine)  # and the center is 0
        for _ in range(4):
            run.run(int(rng.integers(5, 20)), 0.0, slope())
            comm.barrier()
            out = under_way(run.worker)
            comm.barrier()
            run.worker.consensus(center)
            np.testing.assert_allclose(run.sum(run.worker.x.local - out) + center, before, rtol=0, atol=1e-12)
            comm.barrier()
        assert np.abs(center).max() > 1e-3


@ALL
@pytest.mark.parametrize("n_nodes", [1, 2])
def test_ranks_find_the_minimum(n_nodes):
    with ranks(n_nodes) as comm:
        run, out = RankRun(EASGD(period=2, overlap=True), comm, np.zeros(N)), np.zeros(N)
        for _ in range(10):
            run.run(60, 0.1, slope(1.0, 0.7))
            run.worker.consensus(out)
            comm.barrier()
        run.worker.consensus(out)
        np.testing.assert_allclose(out, 0.7, atol=1e-6)


@ALL
def test_ranks_continue_with_the_exchange_under_way():
    with ranks(1) as comm:
        start = np.random.default_rng(5 + comm.rank).normal(size=N)
        method = EASGD(period=3, overlap=True)
        first = RankRun(method, comm, start)
        first.run(4, 0.1, slope(1.0, 0.3))  # an exchange has begun at step 3
        comm.barrier()
        saved = {name: np.copy(value) for name, value in first.worker.state()}
        x = first.worker.x.local.copy()
        assert "under_way" in saved
        second = RankRun.resumed(method, comm, saved | {"parameters": x})
        comm.barrier()
        second.run(1, 0.0, slope())
        np.testing.assert_allclose(second.worker.x.local, x - saved["under_way"], rtol=0, atol=1e-14)
        comm.barrier()
