"""Zealous DOWNPOUR (Hermans, CERN-THESIS-2017-103): period 1 while the center is free, up to tau while it is busy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.parameter_server import not_committed, whole_numbers
from support.quadratic import same_bits, simulate, slope, statistics

from mpitrain.algorithms import Downpour, ZealousDownpour
from mpitrain.simulation.schedules import RandomOrder, Scripted

START = np.random.default_rng(0).normal(size=20)


def center(simulation):
    return next(value for name, value in simulation.workers[0].state() if name == "center")


@pytest.mark.parametrize("p", [1, 2, 5])
@pytest.mark.parametrize("tau", [1, 4])
def test_a_center_that_is_never_busy_gives_period_1(p, tau):
    # Each visit runs to its end before anybody else goes on.
    with_ = {"start": START, "eta": 0.1, "gradient": slope(1.0, 0.3)}
    zealous = simulate(ZealousDownpour(period=tau), p, schedule=RandomOrder(1), **with_).run(15)
    plain = simulate(Downpour(period=1), p, schedule=RandomOrder(1), **with_).run(15)
    assert same_bits(zealous.x(), plain.x())
    assert same_bits(zealous.consensus(), plain.consensus())
    assert statistics(zealous, "n_exchanges") == [15] * p


@pytest.mark.parametrize("tau", [1, 3, 4])
def test_a_center_that_is_always_busy_gives_period_tau(tau):
    # Worker 2 arrives at the center first, and nothing more is heard of it.
    order = np.random.default_rng(tau).integers(0, 2, 60).tolist()
    with_ = {"start": START, "eta": 0.1, "gradient": slope(1.0, 0.3), "interleave_locks": True}
    zealous = simulate(ZealousDownpour(period=tau), 3, schedule=Scripted([2, *order]), **with_).run(99)
    plain = simulate(Downpour(period=tau), 3, schedule=Scripted(order), **with_).run(99)
    assert same_bits(zealous.x()[:2], plain.x()[:2])
    assert same_bits(zealous.consensus(), plain.consensus())
    assert zealous.workers[0].t > 2 * tau


def test_a_worker_trains_on_while_the_center_is_busy():
    # 1 is at the center (before its only shard) while 0 makes two steps; then it leaves, and 0 brings three at once.
    simulation = simulate(
        ZealousDownpour(period=10), 2, start=np.full(2, 8.0), eta=0.5,
        schedule=Scripted([1, 0, 0, 1, 0, 0]), interleave_locks=True,
    ).run(99)  # fmt: skip
    assert [worker.t for worker in simulation.workers] == [3, 1]
    assert statistics(simulation, "n_exchanges") == [1, 1]
    assert simulation.consensus().tolist() == [8 - 4 - 7] * 2


@settings(max_examples=60)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 40), st.data())
def test_center_contains_exactly_the_commits_at_any_moment(tau, p, largest_shard, data):
    script = data.draw(st.lists(st.integers(0, p - 1), max_size=150))
    start, gradient, noted = whole_numbers(p, 37, seed=tau)
    simulation = simulate(
        ZealousDownpour(period=tau), p, start=start, eta=1.0, gradient=gradient, schedule=Scripted(script),
        interleave_locks=True, largest_shard=largest_shard,
    ).run(10**6)  # fmt: skip
    applied = sum((g for _, g in noted), np.zeros(37))
    assert np.array_equal(center(simulation) + not_committed(simulation), start - applied)


@settings(max_examples=30)
@given(st.integers(1, 5), st.integers(2, 5), st.integers(0, 2**16))
def test_no_worker_goes_longer_than_tau_steps(tau, p, seed):
    longest = 0

    def look(simulation, rank):
        nonlocal longest
        longest = max(longest, dict(simulation.workers[rank].state())["steps"])

    simulate(
        ZealousDownpour(period=tau), p, start=START, eta=0.1, schedule=RandomOrder(seed), interleave_locks=True
    ).run(20, look)
    assert longest < tau  # after the tau-th it has exchanged


def test_a_failed_visit_lowers_the_flag():
    simulation = simulate(ZealousDownpour(), 2, start=START, eta=0.1)
    first, second = simulation.workers
    first.visit = lambda part, c: 1 / 0
    with pytest.raises(ZeroDivisionError):
        first.commit()
    assert not second.is_busy()
