"""AEASGD and its early exchange, as in Hermans' thesis (CERN-THESIS-2017-103)."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.quadratic import change, same_bits, simulate, slope, statistics

from mpitrain.algorithms import AEASGD, EASGD
from mpitrain.simulation.schedules import RandomOrder, Scripted

NEVER = 10**6
H, B = np.array([0.5, 2.0, 7.0]), np.array([1.0, -2.0, 4.0])


def exchange_steps(simulation, steps, rank=0):
    """Return the steps, from 0, in which a worker exchanges."""
    made = []

    def look(simulation, who):
        if who == rank:
            made.append(simulation.workers[rank].comm.statistics.n_exchanges)

    simulation.run(steps, look)
    return [t for t, (before, after) in enumerate(zip([0, *made], made)) if after > before]


def first_balanced(h, rho, eta, x, c, steps):
    """Return the first t with h|x_t| - rho|x_t - c| < 1, x_t = (1 - eh)^t x_0."""
    for t in range(steps):
        x_t = (1 - eta * h) ** t * x
        if h * abs(x_t) - rho * abs(x_t - c) < 1:
            return t
    return None


@settings(max_examples=80)
@given(
    st.floats(0.2, 5), st.sampled_from([0.0, 0.5, 5.0]), st.floats(0.01, 0.19), st.floats(-50, 50), st.floats(-50, 50)
)
def test_exchange_comes_at_the_first_step_in_which_gradient_and_spring_balance(h, rho, eta, x, c):
    x_t = (1 - eta * h) ** np.arange(60) * x
    assume(np.abs(h * abs(x_t) - rho * abs(x_t - c) - 1).min() > 1e-9)
    method = AEASGD(rho=rho, period=NEVER, early_exchange=True)
    simulation = simulate(method, 1, start=np.array([x]), eta=eta, gradient=slope(h))
    change(simulation, center=np.array([c]), seen=np.array([c]))
    made = exchange_steps(simulation, 60)
    assert (made[0] if made else None) == first_balanced(h, rho, eta, x, c, 60)


def test_without_a_spring_the_exchange_comes_once_the_gradient_is_below_one():
    h, eta, x = 2.0, 0.1, 8.0  # |g_t| = 16 * 0.8^t: 1.09 at t = 12 and 0.88 at t = 13
    method = AEASGD(rho=0.0, period=NEVER, early_exchange=True)
    simulation = simulate(method, 1, start=np.array([x]), eta=eta, gradient=slope(h))
    assert exchange_steps(simulation, 17) == [13, 14, 15, 16]


def test_exchange_follows_the_local_step_of_the_balance():
    h, rho, eta, x, c = 2.0, 5.0, 0.05, 10.0, 6.0
    t = first_balanced(h, rho, eta, x, c, 100)
    assert t == 0
    method = AEASGD(rho=rho, period=NEVER, early_exchange=True)
    simulation = simulate(method, 1, start=np.array([x]), eta=eta, gradient=slope(h))
    change(simulation, center=np.array([c]), seen=np.array([c])).run(1)
    moved = (1 - eta * h) * x
    assert simulation.x()[0, 0] == pytest.approx(moved - eta * rho * (moved - c), abs=1e-14)
    assert simulation.consensus()[0] == pytest.approx(c + eta * rho * (moved - c), abs=1e-14)


@pytest.mark.parametrize("distance", [1.0, 1e3])
def test_worker_at_its_equilibrium_exchanges_whatever_its_gradient(distance):
    # x_eq = (h x* + rho c)/(h + rho): -eta g(x_eq) = eta rho (x_eq - c)
    h, rho, best, c = 4.0, 3.0, distance, -distance
    at = (h * best + rho * c) / (h + rho)
    assert -h * (at - best) == pytest.approx(rho * (at - c))
    for x, expected in ((at, [0]), (best + 2 * (c - best), [])):  # far behind the center the gradient is the larger
        method = AEASGD(rho=rho, period=NEVER, early_exchange=True)
        simulation = simulate(method, 1, start=np.array([x]), eta=1e-4, gradient=slope(h, best))
        change(simulation, center=np.array([c]), seen=np.array([c]))
        assert exchange_steps(simulation, 1) == expected


def test_elastic_force_in_each_step_rests_where_gradient_and_spring_balance():
    # With the center put back after each step, x comes to (h x* + rho c)/(h + rho), and more steps are wasted.
    h, best, rho, eta = 2.0, 3.0, 5.0, 0.01
    simulation = simulate(AEASGD(rho=rho, period=1), 1, start=np.array([7.0]), eta=eta, gradient=slope(h, best))
    c = np.array([-1.0])
    for _ in range(3000):
        change(simulation, center=c).run(1)
    # One step: x' = (1 - alpha)((1 - eh) x + eh x*) + alpha c, with the gradient after the exchange.
    alpha, eh = eta * rho, eta * h
    fixed = ((1 - alpha) * eh * best + alpha * c[0]) / (1 - (1 - alpha) * (1 - eh))
    assert simulation.x()[0, 0] == pytest.approx(fixed, abs=1e-12)
    assert fixed == pytest.approx((h * best + rho * c[0]) / (h + rho), abs=eta * 10)


@pytest.mark.parametrize("tau", [1, 3, 7])
def test_without_balance_the_exchange_comes_after_the_period(tau):
    # c is where the worker begins, and the gradient stays above 1 + rho|x - c|
    method = AEASGD(rho=0.1, period=tau, early_exchange=True)
    simulation = simulate(method, 2, start=np.full(5, 100.0), eta=0.001, gradient=slope(3.0))
    assert exchange_steps(simulation, 21) == list(range(tau - 1, 21, tau))


def test_period_begins_anew_with_an_early_exchange():
    # gradients by the step: those of steps 1 and 4 are small, all others large
    steps = iter([90, 0.5, 90, 90, 0.5, 90, 90, 90, 90, 90])
    method = AEASGD(rho=0.0, period=3, early_exchange=True)
    simulation = simulate(method, 1, start=np.zeros(1), eta=0.1, gradient=lambda rank, x: np.array([next(steps)]))
    assert exchange_steps(simulation, 10) == [1, 4, 7]


@pytest.mark.parametrize("tau", [1, 4])
def test_it_is_easgd_with_its_gradient_after_the_exchange_bit_for_bit(tau):
    ends = []
    for method in (
        AEASGD(rho=2.0, period=tau),
        AEASGD(rho=2.0, period=tau, early_exchange=True),  # whose gradients are never balanced here
        EASGD(rho=2.0, period=tau, grad_point="post"),
    ):
        start = 1e4 * (3 + np.random.default_rng(1).uniform(size=30))
        simulation = simulate(
            method, 3, start=start, eta=0.01, gradient=slope([5.0, 6.0, 7.0]), schedule=RandomOrder(2),
            interleave_locks=True, largest_shard=8,
        ).run(9)  # fmt: skip
        ends.append(np.vstack([simulation.x(), simulation.consensus()]))
    assert same_bits(ends[0], ends[2])
    assert same_bits(ends[1], ends[2])


def by_definition(script, x, rho, eta, tau, early):
    """Make one worker's step per entry of the script; each worker remembers the center as it left it."""
    p = len(x)
    x, c, seen, local = x.copy(), x[0].copy(), np.tile(x[0], (p, 1)), np.zeros(p, int)
    for i in script:
        g = H[i] * (x[i] - B[i])
        local[i] += 1
        balanced = np.linalg.norm(eta * g) - np.linalg.norm(eta * rho * (x[i] - seen[i])) < eta
        x[i] = x[i] - eta * g
        if local[i] == tau or (early and balanced):
            e = eta * rho * (x[i] - c)
            x[i], c, local[i] = x[i] - e, c + e, 0
            seen[i] = c
    return x, c


@given(st.booleans(), st.integers(1, 6), st.sampled_from([0.0, 0.5, 3.0]), st.lists(st.integers(0, 2), max_size=90))
def test_any_order_of_events_follows_the_definition(early, tau, rho, script):
    start = np.random.default_rng(3).normal(size=(3, 6))
    method = AEASGD(rho=rho, period=tau, early_exchange=early)
    simulation = simulate(method, 3, start=start, eta=0.1, gradient=slope(H, B), schedule=Scripted(script)).run(NEVER)
    x, c = by_definition(script, start, rho, 0.1, tau, early)
    np.testing.assert_allclose(simulation.x(), x, rtol=0, atol=1e-12)
    np.testing.assert_allclose(simulation.consensus(), c, rtol=0, atol=1e-12)


@settings(max_examples=40)
@given(st.booleans(), st.integers(1, 5), st.floats(0, 20), st.integers(1, 40), st.integers(0, 2**16))
def test_gradients_alone_change_the_sum_of_workers_and_center(early, p, rho, largest_shard, seed):
    rng = np.random.default_rng(seed)
    start, eta = rng.normal(size=(p, 33)), 0.05
    applied = np.zeros(33)

    def gradient(rank, x):
        nonlocal applied
        g = rng.normal(size=33) * rng.choice([0.01, 1.0])
        applied = applied + g
        return g

    method = AEASGD(rho=rho, period=3, early_exchange=early)
    simulation = simulate(
        method, p, start=start, eta=eta, gradient=gradient,
        schedule=RandomOrder(seed), interleave_locks=True, largest_shard=largest_shard,
    ).run(12)  # fmt: skip
    total = simulation.x().sum(0) + simulation.consensus()
    np.testing.assert_allclose(total, start.sum(0) + start[0] - eta * applied, rtol=0, atol=1e-12)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite_values_never_reach_the_center(early, bad):
    def gradient(rank, x):
        g = x.copy()
        if rank == 1:
            g[2] = bad
        return g

    method = AEASGD(period=2, early_exchange=early)
    simulation = simulate(method, 3, start=np.full(5, 9.0), eta=0.1, gradient=gradient).run(10)
    assert np.isfinite(simulation.consensus()).all()
    assert np.isfinite(simulation.x()[[0, 2]]).all()
    assert statistics(simulation, "n_nonfinite") == [0, 5, 0]  # its norms say nothing: it exchanges by the period


def test_rule_visits_the_center_no_more_often_than_it_exchanges():
    method = AEASGD(rho=0.1, period=50, early_exchange=True)
    simulation = simulate(method, 3, start=np.full(64, 100.0), eta=0.001, gradient=slope(3.0)).run(49)
    assert statistics(simulation, "n_exchanges") == [0, 0, 0]
    assert statistics(simulation, "bytes_sent") == [0, 0, 0]


def test_moving_rate_follows_the_learning_rate_and_gives_a_warning():
    assert AEASGD().rates(4, 0.01) == (0.05, 0.05)
    assert not list(AEASGD().warnings(4, 0.01))
    (remark,) = AEASGD().warnings(40, 0.01)  # the thesis' largest run: the center's gain is 40 * 0.05
    assert "p*moving_rate is 2" in remark
    assert "rho that is 2.25" in remark
