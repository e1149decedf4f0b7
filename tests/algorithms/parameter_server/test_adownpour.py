"""ADOWNPOUR and MVADOWNPOUR (Zhang, Choromanska, LeCun, arXiv 1412.6651): averages of the center for evaluation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.quadratic import same_bits, simulate, slope, states

from mpitrain.algorithms import ADownpour, Downpour, MVADownpour
from mpitrain.simulation.schedules import RandomOrder


def centers_seen(simulation):
    """Record, for each shard, the center after every commit."""
    seen = {}
    for worker in simulation.workers:

        def visit(part, c, visit=worker.visit):
            n_nonfinite = visit(part, c)
            if part.stop > part.start:
                seen.setdefault(part.start, []).append(c[0].copy())
            return n_nonfinite

        worker.visit = visit
    return seen


@settings(max_examples=40)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 9), st.integers(0, 2**16))
def test_average_is_the_mean_of_the_centers_of_each_shard(p, tau, steps, seed):
    start = np.random.default_rng(seed).normal(size=37)
    simulation = simulate(
        ADownpour(period=tau), p, start=start, eta=0.1, gradient=slope(2.0, 0.7), schedule=RandomOrder(seed),
        interleave_locks=True, largest_shard=8,
    )  # fmt: skip
    seen = centers_seen(simulation)
    simulation.run(steps)
    means = [np.mean(seen[part], axis=0) for part in sorted(seen)]
    np.testing.assert_allclose(simulation.consensus(), np.concatenate(means) if means else start, rtol=0, atol=1e-14)


def test_moving_average_forgets_by_its_rate():
    rate, start = 0.125, np.random.default_rng(1).normal(size=10)  # one shard
    simulation = simulate(MVADownpour(rate=rate), 2, start=start, eta=0.1, schedule=RandomOrder(1))
    seen = centers_seen(simulation)
    simulation.run(30)
    (centers,) = seen.values()
    z = start  # z_0 = c_0, whose weight (1-a)^t is meant to be there
    for c in centers:
        z = (1 - rate) * z + rate * c
    np.testing.assert_allclose(simulation.consensus(), z, rtol=1e-13)
    weights = rate * (1 - rate) ** np.arange(len(centers))[::-1]
    wanted = (1 - rate) ** len(centers) * start + weights @ np.array(centers)
    np.testing.assert_allclose(simulation.consensus(), wanted, rtol=1e-12)


def test_rate_1_is_the_center_itself():
    simulation = simulate(MVADownpour(rate=1.0), 3, start=np.linspace(-1, 1, 20), eta=0.1, schedule=RandomOrder(2))
    simulation.run(7)
    assert same_bits(simulation.consensus(), states(simulation)[0]["center"])


@pytest.mark.parametrize("method", [ADownpour(), MVADownpour(rate=0.3)])
def test_a_center_at_rest_is_its_own_average(method):
    start = np.random.default_rng(3).normal(size=20)
    simulation = simulate(method, 3, start=start, eta=0.0, schedule=RandomOrder(3)).run(50)
    np.testing.assert_allclose(simulation.consensus(), start, rtol=1e-14)


@settings(max_examples=20)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**16))
def test_average_is_never_fed_back(p, tau, seed):
    with_ = {"start": np.random.default_rng(seed).normal(size=37), "eta": 0.1, "gradient": slope(1.0, 0.3),
             "interleave_locks": True, "largest_shard": 8}  # fmt: skip
    plain = simulate(Downpour(period=tau), p, schedule=RandomOrder(seed), **with_).run(11)
    for method in (ADownpour(period=tau), MVADownpour(period=tau)):
        averaged = simulate(method, p, schedule=RandomOrder(seed), **with_).run(11)
        assert same_bits(averaged.x(), plain.x())
        assert same_bits(states(averaged)[0]["center"], plain.consensus())


def test_average_has_less_noise_than_the_center():
    # The mean of c over T gradients has a variance of about sigma^2/(T h^2); c itself keeps about eta*sigma^2/(2h).
    simulation = simulate(ADownpour(), 2, start=np.zeros(2000), eta=0.1, gradient=slope(1.0, sigma=1.0)).run(500)
    n = 2 * 500  # gradients
    assert simulation.consensus().var() == pytest.approx(1 / n, rel=0.2)
    assert states(simulation)[0]["center"].var() > 20 / n
