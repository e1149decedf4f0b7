"""Asynchronous EASGD, Algorithm 1 of Zhang, Choromanska, LeCun (arXiv 1412.6651), in orders that the tests choose."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.elastic_definition import Exchanges
from support.quadratic import radius, simulate, slope, statistics, sweep_matrix

from mpitrain.algorithms import EASGD
from mpitrain.simulation.schedules import RandomOrder, RoundRobin, Scripted, VirtualTime

rates = st.floats(-0.5, 0.9)
# With a worker that is first and its gradient from before, an exchange is two visits: others may come between them.
methods = st.builds(
    EASGD,
    moving_rate=rates,
    center_rate=st.none() | rates,
    order=st.sampled_from(["jacobi", "center_first", "worker_first"]),
    period=st.integers(1, 3),
    grad_point=st.sampled_from(["pre", "post"]),
).filter(lambda method: method.order != "worker_first" or method.grad_point == "post")


def weights(method, p):
    """Return the weights of sum_i x_i and c in the sum that exchanges conserve: a_c and a_w, or 1 and 1 if equal.

    With the center first the worker sees its difference shortened to 1 - a_c of it; with the worker first the center.
    """
    a_w, a_c = method.rates(p, 0.1)
    if method.order == "center_first":
        a_w *= 1 - a_c
    if method.order == "worker_first":
        a_c *= 1 - a_w
    return (1.0, 1.0) if a_w == a_c else (a_c, a_w)


def assert_sum(simulation, total, of_x=1.0, of_c=1.0):
    x, c = simulation.x(), simulation.consensus()
    scale = 1 + np.abs(x).max() + np.abs(c).max()  # a negative moving rate drives them apart
    np.testing.assert_allclose(of_x * x.sum(0) + of_c * c, total, rtol=0, atol=1e-12 * scale)


@settings(max_examples=60)
@given(methods, st.integers(1, 5), st.integers(1, 50), st.integers(1, 40), st.data())
def test_exchanges_conserve_the_sum_at_any_moment(method, p, n, largest_shard, data):
    script = data.draw(st.lists(st.integers(0, p - 1), max_size=120))
    start = np.random.default_rng(n).normal(size=(p, n))
    simulation = simulate(
        method, p, start=start, eta=0.0, schedule=Scripted(script), interleave_locks=True, largest_shard=largest_shard
    )
    simulation.run(10**6)  # the script ends it, perhaps in the middle of an exchange
    of_x, of_c = weights(method, p)
    assert_sum(simulation, of_x * start.sum(0) + of_c * start[0], of_x, of_c)


@settings(max_examples=60)
@given(methods, st.integers(1, 5), st.integers(1, 12), st.integers(1, 40), st.integers(0, 2**16))
def test_gradients_alone_change_the_sum(method, p, steps, largest_shard, seed):
    rng = np.random.default_rng(seed)
    start, eta = rng.normal(size=(p, 37)), 0.3
    applied = np.zeros(37)

    def gradient(rank, x):
        nonlocal applied
        g = rng.normal(size=x.size)
        applied = applied + g
        return g

    simulation = simulate(
        method, p, start=start, eta=eta, gradient=gradient,
        schedule=RandomOrder(seed), interleave_locks=True, largest_shard=largest_shard,
    ).run(steps)  # fmt: skip
    of_x, of_c = weights(method, p)
    assert_sum(simulation, of_x * (start.sum(0) - eta * applied) + of_c * start[0], of_x, of_c)


def algorithm_1(script, exchanges, eta, h, b, decay):
    """Run the paper's loop, one worker's step per entry of the script; the gradient is h_i (x - b_i)."""
    x = exchanges.x
    for i in script:
        g = h[i] * (x[i] - b[i])
        exchanges.before(i)
        x[i] = x[i] - eta * (g + decay * x[i])
        exchanges.after(i)
    return x, exchanges.c


@given(
    st.sampled_from(["pre", "post"]),
    st.sampled_from(["jacobi", "center_first", "worker_first"]),
    st.sampled_from([None, 0.15, 1.0]),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.1]),
    st.lists(st.integers(0, 2), max_size=60),
)
def test_any_order_of_events_follows_algorithm_1(grad_point, order, center_rate, tau, decay, script):
    rng = np.random.default_rng(5)
    start, h, b = rng.normal(size=(3, 6)), rng.uniform(0.2, 2, 3), rng.normal(size=3)
    method = EASGD(moving_rate=0.3, center_rate=center_rate, order=order, period=tau, grad_point=grad_point)
    simulation = simulate(
        method, 3, start=start, eta=0.1, decay=decay, gradient=slope(h, b), schedule=Scripted(script)
    ).run(10**6)
    rates = (0.3, 0.3 if center_rate is None else center_rate)
    exchanges = Exchanges(start, rates, order=order, grad_point=grad_point, tau=tau)
    x, c = algorithm_1(script, exchanges, 0.1, h, b, decay)
    np.testing.assert_allclose(simulation.x(), x, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(simulation.consensus(), c, rtol=1e-12, atol=1e-13)


def test_gradient_is_taken_before_the_exchange_or_after_it():
    eta, alpha, x, c = 0.1, 0.25, 2.0, 1.0
    for grad_point, wanted in (
        ("pre", x - alpha * (x - c) - eta * x),
        ("post", (1 - alpha) * (x - eta * x) + alpha * c),
    ):
        method = EASGD(moving_rate=alpha, period=1, grad_point=grad_point)
        simulation = simulate(method, 2, start=[[c], [x]], eta=eta, schedule=Scripted([1])).run(9)
        assert simulation.x()[1, 0] == pytest.approx(wanted, abs=1e-15)


@pytest.mark.parametrize(("p", "wanted"), [(3, 0.9992697476), (8, 0.9991156981)])
def test_round_robin_sweep_has_the_papers_radius(p, wanted):
    matrix = sweep_matrix(EASGD(moving_rate=0.0025, period=1), p, eh=0.001)
    assert radius(matrix) == pytest.approx(wanted, abs=5e-11)


@given(st.floats(0, 2), st.floats(0, 1), st.integers(1, 5))
def test_round_robin_is_stable_inside_the_papers_bound(eh, fraction, p):
    alpha = fraction * (4 - 2 * eh) / (4 - eh)
    assert radius(sweep_matrix(EASGD(moving_rate=alpha, period=1), p, eh=eh)) <= 1 + 1e-7


@settings(max_examples=15)
@given(
    st.integers(0, 2**16),
    st.sampled_from(["pre", "post"]),
    st.sampled_from(["jacobi", "center_first", "worker_first"]),
    st.integers(1, 4),
)
def test_staleness_does_not_move_the_fixed_point(seed, grad_point, order, tau):
    method = EASGD(moving_rate=0.25, order=order, period=tau, grad_point=grad_point)
    start = np.random.default_rng(seed).normal(size=(3, 33))
    simulation = simulate(
        method, 3, start=start, eta=0.3, schedule=RandomOrder(seed), interleave_locks=True, largest_shard=8
    ).run(600)
    assert np.abs(simulation.x()).max() < 1e-8
    assert np.abs(simulation.consensus()).max() < 1e-8


@pytest.mark.parametrize("p", [1, 2, 3, 5])
def test_staleness_in_round_robin_is_that_of_the_others(p):
    simulation = simulate(EASGD(period=1), p, start=np.ones(20), eta=0.1, schedule=RoundRobin()).run(11)
    for staleness in statistics(simulation, "staleness"):
        assert staleness.tolist() == [10 if k == p - 1 else 0 for k in range(33)]  # the first visit does not count


def test_straggler_finds_more_updates_than_it_leaves():
    script = Scripted([1, 0, 0, 0, 0] * 9)
    quick, slow = statistics(
        simulate(EASGD(period=1), 2, start=np.ones(20), eta=0.1, schedule=script).run(99), "staleness"
    )
    assert slow[4] == slow.sum() == 8  # of 9 visits the first does not count
    assert quick[:2].tolist() == [27, 8]


def test_without_a_moving_rate_workers_are_alone_and_the_center_rests():
    start, h = np.random.default_rng(3).normal(size=(3, 5)), np.array([0.5, 1.0, 3.0])
    simulation = simulate(
        EASGD(moving_rate=0.0, period=1), 3, start=start, eta=0.1, gradient=slope(h), schedule=RandomOrder(1)
    ).run(7)
    np.testing.assert_allclose(simulation.x(), (1 - 0.1 * h[:, None]) ** 7 * start, rtol=1e-13)
    assert np.array_equal(simulation.consensus(), start[0])


@pytest.mark.parametrize("tau", [1, 3])
def test_one_worker_does_not_tell_asynchronous_from_synchronous(tau):
    start = np.random.default_rng(6).normal(size=9)
    results = []
    for synchronous in (False, True):
        method = EASGD(moving_rate=0.4, period=tau, synchronous=synchronous)
        simulation = simulate(method, 1, start=start, eta=0.2).run(10)
        results.append(np.concatenate([simulation.x()[0], simulation.consensus()]))
    np.testing.assert_allclose(results[0], results[1], rtol=1e-14)


def test_period_is_counted_by_each_worker():
    simulation = simulate(EASGD(period=4), 2, start=np.ones(3), eta=0.1, schedule=VirtualTime([1, 2])).run(8)
    assert statistics(simulation, "n_exchanges") == [2, 2]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite_values_never_reach_the_center(bad):
    def gradient(rank, x):
        g = x.copy()
        if rank == 1:
            g[2] = bad
        return g

    simulation = simulate(EASGD(period=1), 3, start=np.ones(5), eta=0.1, gradient=gradient).run(10)
    assert np.isfinite(simulation.consensus()).all()
    assert np.isfinite(simulation.x()[[0, 2]]).all()
    assert simulation.consensus()[2] < 0.9  # the others go on
    assert statistics(simulation, "n_nonfinite") == [0, 5, 0]  # in every other step it has recovered
