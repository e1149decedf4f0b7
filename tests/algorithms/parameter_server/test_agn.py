"""AGN, accumulated gradient normalisation (Hermans, Spanakis, Moeckel, arXiv 1710.02368)."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.parameter_server import bound, delayed, not_committed, whole_numbers
from support.quadratic import radius, same_bits, simulate, slope, states, statistics, sweep_matrix

from mpitrain.algorithms import AGN, Downpour
from mpitrain.algorithms.base.replica import ParamGroupSlice
from mpitrain.simulation.schedules import RandomOrder, Scripted

BOTH = [AGN(period=4), AGN(period=4, normalise="gradient")]


@given(st.floats(0.01, 1.0), st.integers(1, 8), st.integers(1, 5))
def test_round_robin_is_the_delayed_recursion(eh, tau, p):
    q = (1 - (1 - eh) ** tau) / tau
    assert q <= min(eh, 1 / tau) + 1e-15
    found = radius(sweep_matrix(AGN(period=tau), p, eh=eh, steps=tau))
    assert found == pytest.approx(radius(delayed(q, p)) ** p, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize(("p", "tau"), [(2, 1), (3, 2), (4, 3), (8, 5), (15, 10)])
def test_long_periods_are_stable_whatever_the_curvature(p, tau):
    assert tau == math.ceil(1 / bound(p) - 1e-12) == pytest.approx(0.64 * p, abs=1)
    for eh in (0.01, 0.1, 0.3, 0.5, 0.9, 0.99):
        assert radius(sweep_matrix(AGN(period=tau), p, eh=eh, steps=tau)) < 1


def test_short_periods_are_not():
    for p in (8, 15):
        assert radius(sweep_matrix(AGN(period=2), p, eh=0.9, steps=2)) > 1


def test_it_bears_what_downpour_does_not():
    for p, tau in ((3, 40), (10, 5)):
        assert radius(sweep_matrix(Downpour(period=tau), p, eh=0.05, steps=tau)) > 1
        assert radius(sweep_matrix(AGN(period=tau), p, eh=0.05, steps=tau)) < 1


@settings(max_examples=20)
@given(st.integers(1, 4), st.integers(0, 2**16))
def test_period_1_is_downpour(p, seed):
    with_ = {"start": np.random.default_rng(seed).normal(size=37), "eta": 0.1, "gradient": slope(1.0, 0.3),
             "interleave_locks": True, "largest_shard": 8}  # fmt: skip
    agn = simulate(AGN(period=1), p, schedule=RandomOrder(seed), **with_).run(11)
    downpour = simulate(Downpour(period=1), p, schedule=RandomOrder(seed), **with_).run(11)
    assert same_bits(agn.x(), downpour.x())
    assert same_bits(agn.consensus(), downpour.consensus())


@pytest.mark.parametrize("tau", [1, 10, 100, 1000])
def test_a_commit_is_shorter_than_the_distance_over_tau(tau):
    start = np.linspace(-3, 3, 8)
    simulation = simulate(AGN(period=tau), 1, start=start, eta=0.3, gradient=slope(1.0, 0.7)).run(tau)
    moved, distance = np.abs(simulation.consensus() - start), np.abs(start - 0.7)
    assert (moved <= distance / tau * (1 + 1e-12)).all()
    np.testing.assert_allclose(moved, (1 - 0.7**tau) / tau * distance, rtol=1e-9)


@settings(max_examples=20)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**16))
def test_with_plain_sgd_mean_gradients_are_mean_steps(p, tau, seed):
    with_ = {"start": np.random.default_rng(seed).normal(size=37), "eta": 0.1, "decay": 0.2,
             "gradient": slope(1.0, 0.3), "interleave_locks": True, "largest_shard": 8}  # fmt: skip
    one, other = (
        simulate(AGN(period=tau, normalise=how), p, schedule=RandomOrder(seed), **with_).run(11)
        for how in ("displacement", "gradient")
    )
    np.testing.assert_allclose(one.x(), other.x(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(one.consensus(), other.consensus(), rtol=0, atol=1e-12)


def test_with_another_local_optimizer_they_are_not():
    # The worker walks in signs, on two groups with rates of their own. Committed is the mean of its steps, or of SGD's.
    rng = np.random.default_rng(0)
    gradients, start = rng.normal(size=(4, 6)), rng.normal(size=6)
    group_slices = [ParamGroupSlice(slice(0, 2), 0.1, 0.5), ParamGroupSlice(slice(2, 6), 0.3)]
    eta, decay = np.array([0.1] * 2 + [0.3] * 4), np.array([0.5] * 2 + [0.0] * 4)
    x = start - 0.01 * np.vstack([np.zeros(6), np.sign(gradients)]).cumsum(0)
    wanted = {
        "displacement": start + (x[4] - start) / 4,
        "gradient": start - eta * (gradients + decay * x[:4]).mean(0),
    }
    for how, center in wanted.items():
        simulation = simulate(AGN(period=4, normalise=how), 1, start=start, eta=0.1)
        (worker,) = simulation.workers

        def walk(worker=worker):
            worker.x.local[...] -= 0.01 * np.sign(worker.g.local)

        for g in gradients:
            worker.g.local[...] = g
            worker.step(group_slices, walk)
        np.testing.assert_allclose(simulation.consensus(), center, rtol=1e-13)
        assert same_bits(worker.x.local, simulation.consensus())


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize("steps", [4, 5, 6, 8])
def test_a_partial_window_is_divided_by_its_own_steps(method, steps):
    start, gradient, noted = whole_numbers(1, 9, seed=steps)
    simulation = simulate(method, 1, start=start, eta=1.0, gradient=gradient).run(steps)
    for _ in range(2):  # the second has nothing to do
        simulation.workers[0].finalize()
    g = np.array([g for _, g in noted])
    windows = [g[k : k + 4] for k in range(0, steps, 4)]
    assert np.array_equal(simulation.consensus(), start - sum(window.sum(0) / len(window) for window in windows))


@settings(max_examples=60)
@given(st.integers(1, 5), st.integers(1, 40), st.data())
def test_center_has_exactly_what_was_committed_at_any_moment(p, largest_shard, data):
    script = data.draw(st.lists(st.integers(0, p - 1), max_size=150))
    start, gradient, noted = whole_numbers(p, 37, seed=p)
    simulation = simulate(
        AGN(period=2), p, start=start, eta=1.0, gradient=gradient, schedule=Scripted(script), interleave_locks=True,
        largest_shard=largest_shard,
    ).run(10**6)  # fmt: skip
    assert (simulation.consensus() * 2 % 1 == 0).all()  # halves of whole numbers, so all sums are exact
    steps = [worker.t for worker in simulation.workers]
    if all(t % 2 == 0 for t in steps) and len(noted) == sum(steps):  # nobody is under way
        assert not not_committed(simulation).any()
        assert np.array_equal(simulation.consensus(), start - sum((g for _, g in noted), np.zeros(37)) / 2)


@pytest.mark.parametrize("method", BOTH)
def test_half_precision_keeps_commits_below_its_last_bit(method):
    # Each window moves by one unit in the last place of float16 in one of its 4 steps: a quarter of it is committed.
    unit = 2.0**-10
    steps = iter(range(10**6))
    simulation = simulate(
        method, 1, start=np.ones(3, np.float16), eta=unit,
        gradient=lambda rank, x: -np.ones(3, np.float16) * (next(steps) % 4 == 0),
    ).run(4 * 8)  # fmt: skip
    assert simulation.consensus().tolist() == [1 + 2 * unit] * 3
    assert states(simulation)[0]["center"].dtype == np.float32


@pytest.mark.parametrize("method", BOTH)
def test_what_is_not_finite_never_reaches_the_center_and_leaves_the_worker(method):
    steps = [0, 0]

    def gradient(rank, x):
        steps[rank] += 1
        g = x.copy()
        if rank == 1 and steps[1] == 2:
            g[2] = np.nan
        return g

    simulation = simulate(method, 2, start=np.ones(5), eta=0.1, gradient=gradient).run(12)
    assert np.isfinite(simulation.x()).all()
    assert simulation.consensus()[2] < 0.9
    assert statistics(simulation, "n_nonfinite") == [0, 1]


def test_warnings_tell_of_short_periods():
    assert not list(AGN().warnings(20, 0.05))
    (text,) = AGN(period=1).warnings(60, 0.05)
    assert "AGN with 60 workers and period 1" in text
