"""DynSGD (Hermans, CERN-THESIS-2017-103): a commit is divided by its staleness + 1."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.parameter_server import bound, delayed
from support.quadratic import change, radius, same_bits, simulate, slope, states

from mpitrain.algorithms import Downpour, DynSGD
from mpitrain.simulation.schedules import RandomOrder, Scripted


def script_matrix(script, p, *, eh, tau=1):
    """Return the matrix of a script of whole periods on (o_1, ..., o_p, c), with the lags in their steady state."""
    steps, unit = np.repeat(script, tau), np.eye(p + 1)
    lags = np.vstack([state["lags"] for state in states(after(steps, p, np.zeros((p, p + 1)), eh, tau))])
    again = after(steps, p, unit[:p], eh, tau, center=unit[p], lags=lags)
    assert np.array_equal(lags, np.vstack([state["lags"] for state in states(again)]))
    return np.vstack([again.x(), again.consensus()])


def after(steps, p, start, eh, tau, **state):
    simulation = simulate(DynSGD(period=tau), p, start=start, eta=eh, schedule=Scripted(steps))
    return change(simulation, **state).run(10**6)


@given(st.floats(0.01, 0.99), st.integers(1, 8), st.integers(1, 6))
def test_round_robin_is_the_delayed_recursion_and_stable(eh, tau, p):
    q = (1 - (1 - eh) ** tau) / p
    found = radius(script_matrix(range(p), p, eh=eh, tau=tau))
    assert found == pytest.approx(radius(delayed(q, p)) ** p, rel=1e-7, abs=1e-9)
    assert q < 1 / p < bound(p)
    assert found < 1


@pytest.mark.parametrize("p", [1, 2, 3, 5])
def test_staleness_in_turn_is_the_number_of_the_others(p):
    found = []
    simulation = simulate(DynSGD(period=2), p, start=np.ones(20), eta=0.1)
    simulation.run(14, lambda s, rank: found.append(s.workers[rank].metrics()["staleness"]))
    commits = found[p : 2 * p]  # a step later
    assert commits == list(range(p))  # the first ones: all have pulled the beginning
    assert set(found[3 * p :]) == {p - 1}


def literal(script, start, eta, tau, h, b):
    """Run the server by its equations: its clock k, the clock at each worker's pull, and the division by s + 1."""
    x, o, c, k = np.tile(start, (3, 1)), np.tile(start, (3, 1)), start, 0
    m, t, found = [0, 0, 0], [0, 0, 0], []
    for i in script:
        x[i] = x[i] - eta * h[i] * (x[i] - b[i])
        t[i] += 1
        if t[i] % tau == 0:
            s = k - m[i]
            c = c + (x[i] - o[i]) / (s + 1)
            k += 1
            m[i], x[i], o[i] = k, c, c
            found.append((i, s))
    return x, c, found


@given(st.lists(st.integers(0, 2), max_size=60), st.integers(1, 3))
def test_any_order_of_events_follows_the_servers_equations(script, tau):
    rng = np.random.default_rng(5)
    start, h, b = rng.normal(size=6), rng.uniform(0.2, 2, 3), rng.normal(size=3)
    found = []

    def note(simulation, rank):
        if simulation.workers[rank].t % tau == 0:
            found.append((rank, simulation.workers[rank].metrics()["staleness"]))

    simulation = simulate(DynSGD(period=tau), 3, start=start, eta=0.1, gradient=slope(h, b), schedule=Scripted(script))
    simulation.run(10**6, note)
    x, c, staleness = literal(script, start, 0.1, tau, h, b)
    np.testing.assert_allclose(simulation.x(), x, rtol=0, atol=1e-12)
    np.testing.assert_allclose(simulation.consensus(), c, rtol=0, atol=1e-12)
    assert found == staleness


def test_a_straggler_is_scaled_down_and_a_worker_that_returns_at_once_is_not():
    # Worker 0 commits eight times alone, s = 0 each time; what worker 1 brings then counts a ninth.
    simulation = simulate(DynSGD(period=1), 2, start=np.ones(1), eta=0.5, schedule=Scripted([0] * 8 + [1])).run(99)
    assert simulation.consensus()[0] == pytest.approx(0.5**8 - 0.5 / 9, rel=1e-14)


def test_back_and_forth_diverges_where_in_turn_does_not():
    # 0 1 ... 11 11 ... 1 0: at each end a worker returns at once and commits in full, the next ones with s = 2, 4, ...
    p, there = 12, list(range(12))
    assert radius(script_matrix(there, p, eh=0.999)) < 0.7
    assert radius(script_matrix(there + there[::-1], p, eh=0.999)) == pytest.approx(1.0803670351, abs=1e-9)


def test_it_is_stable_where_downpour_is_not():
    p, tau, start = 10, 5, np.ones(1)
    assert np.abs(simulate(Downpour(period=tau), p, start=start, eta=0.05).run(500).consensus()) > 10
    assert np.abs(simulate(DynSGD(period=tau), p, start=start, eta=0.05).run(500).consensus()) < 1e-5


@settings(max_examples=20)
@given(st.integers(0, 2**16), st.integers(1, 3))
def test_alone_it_is_downpour(seed, tau):
    start = np.random.default_rng(seed).normal(size=37)
    one, other = (simulate(kind(period=tau), 1, start=start, eta=0.1).run(9) for kind in (DynSGD, Downpour))
    assert same_bits(one.x(), other.x())


@settings(max_examples=20)
@given(st.integers(2, 4), st.integers(0, 2**16))
def test_each_shard_is_a_server_with_its_own_clock(p, seed):
    # Equal gradients, visits that mix: each shard sees the same commits in an order of its own.
    simulation = simulate(
        DynSGD(period=1), p, start=np.zeros(64), eta=1.0, gradient=lambda rank, x: -np.ones(64),
        schedule=RandomOrder(seed), interleave_locks=True, largest_shard=16,
    )  # fmt: skip
    visitors = {}
    for rank, worker in enumerate(simulation.workers):

        def visit(part, c, rank=rank, visit=worker.visit):
            visitors.setdefault(part.start, []).append(rank)
            return visit(part, c)

        worker.visit = visit
    simulation.run(12)
    assert len(visitors) == 4
    for start, ranks in visitors.items():
        pulled, total = [0] * p, 0.0
        for k, rank in enumerate(ranks):
            total += 1 / (k - pulled[rank] + 1)
            pulled[rank] = k + 1
        np.testing.assert_allclose(simulation.consensus()[start : start + 16], total, rtol=1e-12)
