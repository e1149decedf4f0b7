"""MDOWNPOUR (Zhang, Choromanska, LeCun, arXiv 1412.6651): Nesterov momentum at the center."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.parameter_server import OnRank, delayed
from support.quadratic import radius, same_bits, simulate, slope, statistics

from mpitrain import UsageError
from mpitrain.algorithms import Downpour, MDownpour, create
from mpitrain.algorithms.base.replica import ParamGroupSlice
from mpitrain.simulation.schedules import RandomOrder, Scripted
from mpitrain.theory import mdownpour_largest_eh, mdownpour_matrix


def msgd(x, gradient, eta, delta, decay, steps):
    """Make steps v <- delta*v - eta*g(x + delta*v);  x <- x + v."""
    v = np.zeros_like(x)
    for _ in range(steps):
        y = x + delta * v
        v = delta * v - eta * (gradient(y) + decay * y)
        x = x + v
    return x, x + delta * v


@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("delta", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_one_worker_is_nesterov_sgd_to_the_bit(dtype, delta, decay):
    start = np.random.default_rng(0).normal(size=100).astype(dtype)
    simulation = simulate(
        MDownpour(momentum=delta), 1, start=start, eta=0.1, decay=decay, gradient=slope(1.5), largest_shard=16
    ).run(50)
    rates = [dtype(rate) for rate in (0.1, delta, decay)]
    x, y = msgd(start, lambda y: dtype(1.5) * y, *rates, 50)
    assert same_bits(simulation.consensus(), x)
    assert same_bits(simulation.x()[0], y)


@settings(max_examples=30)
@given(st.integers(1, 5), st.integers(0, 2**16))
def test_without_momentum_it_is_downpour(p, seed):
    start = np.random.default_rng(seed).normal(size=33)
    with_ = {"start": start, "eta": 0.1, "gradient": slope(1.0, 0.3), "interleave_locks": True, "largest_shard": 8}
    one = simulate(MDownpour(momentum=0.0), p, schedule=RandomOrder(seed), **with_).run(9)
    other = simulate(Downpour(period=1), p, schedule=RandomOrder(seed), **with_).run(9)
    np.testing.assert_allclose(one.consensus(), other.consensus(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(one.x(), other.x(), rtol=0, atol=1e-12)


@given(st.lists(st.integers(0, 2), max_size=60), st.floats(0, 0.95))
def test_any_order_of_events_follows_the_servers_equations(script, delta):
    rng = np.random.default_rng(5)
    start, h, b = rng.normal(size=6), rng.uniform(0.2, 2, 3), rng.normal(size=3)
    simulation = simulate(
        MDownpour(momentum=delta), 3, start=start, eta=0.1, decay=0.1, gradient=slope(h, b), schedule=Scripted(script)
    ).run(10**6)
    c, v, y = start, np.zeros(6), np.tile(start, (3, 1))
    for i in script:
        v = delta * v - 0.1 * (h[i] * (y[i] - b[i]) + 0.1 * y[i])
        c = c + v
        y[i] = c + delta * v
    np.testing.assert_allclose(simulation.consensus(), c, rtol=0, atol=1e-11)
    np.testing.assert_allclose(simulation.x(), y, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("p", "delta"), [(1, 0.9), (2, 0.99), (4, 0.5), (5, 0.9), (8, 0.99)])
def test_in_turn_it_is_the_recursion_of_delayed_momentum(p, delta):
    # On (c, v, y_k, ..., y_{k-p+1}); all begin at 1. Delay and momentum add up, where delay alone is harmless.
    eh = 0.05
    simulation = simulate(MDownpour(momentum=delta), p, start=np.ones(1), eta=eh).run(30)
    state = np.linalg.matrix_power(mdownpour_matrix(eh, delta, p), 30 * p) @ np.r_[1, 0, np.ones(p)]
    assert simulation.consensus()[0] == pytest.approx(state[0], rel=1e-9)
    assert (radius(mdownpour_matrix(eh, delta, p)) < 1) == (eh < mdownpour_largest_eh(p, delta))
    assert radius(delayed(eh, p)) < 1


def test_parameter_groups_have_their_own_rates_across_shards():
    start, parts = np.random.default_rng(2).normal(size=60), [slice(0, 25), slice(25, 27), slice(27, 60)]
    group_slices = [ParamGroupSlice(*of) for of in zip(parts, (0.1, 0.3, 0.2), (0, 0.5, 0.1), strict=True)]
    simulation = simulate(MDownpour(momentum=0.7), 1, start=start, eta=0.0, largest_shard=16)
    (worker,) = simulation.workers
    for _ in range(20):
        worker.g.local[...] = worker.x.local
        worker.step(group_slices, None)
    for group_slice in group_slices:
        rates = group_slice.learning_rate, 0.7, group_slice.weight_decay
        wanted, _ = msgd(start[group_slice.part], lambda y: y, *rates, 20)
        np.testing.assert_allclose(simulation.consensus()[group_slice.part], wanted, rtol=1e-12)


def test_there_is_no_period():
    for period in ("1", "4"):
        with pytest.raises(UsageError, match="no setting 'period'"):
            create("mdownpour", {"period": period})


def test_warnings_name_a_momentum_that_is_unstable_with_the_delay():
    assert not list(MDownpour().warnings(4, 0.05))
    (text,) = MDownpour(momentum=0.99).warnings(4, 0.05)
    assert "momentum 0.99" in text


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite_values_never_reach_the_center(bad):
    def gradient(rank, x):
        g = x.copy()
        if rank == 1:
            g[2] = bad
        return g

    simulation = simulate(MDownpour(), 3, start=np.ones(5), eta=0.1, gradient=gradient).run(10)
    assert np.isfinite(simulation.x()).all()
    assert simulation.consensus()[2] < 0.9
    assert statistics(simulation, "n_nonfinite") == [0, 10, 0]


@pytest.mark.ranks(3)
def test_ranks_push_every_gradient_once(world):
    # v_k = delta^0 g_k + delta g_{k-1} + ...: with equal gradients the center is the same in any order.
    delta, n_steps, c, v = 0.5, 20, 0.0, 0.0
    for _ in range(n_steps * world.size):
        v = delta * v - 1
        c += v
    with OnRank(world, MDownpour(momentum=delta), np.zeros(1000), eta=1.0) as rank:
        for _ in range(n_steps):
            rank.step(np.ones(1000))
        np.testing.assert_allclose(rank.consensus(), c, rtol=1e-12)
