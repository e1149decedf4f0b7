"""ADAG (Hermans, CERN-THESIS-2017-103): commits damped by how far the center has moved since the pull."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.quadratic import same_bits, simulate, slope, statistics

from mpitrain.algorithms import ADAG, AGN, Downpour
from mpitrain.simulation.schedules import RandomOrder, Scripted

PLACEMENTS = ["A", "B", "C"]


def run(method, p, seed, steps=11, **more):
    more = {"interleave_locks": True, "largest_shard": 8, "schedule": RandomOrder(seed)} | more
    start = np.random.default_rng(seed).normal(size=37)
    return simulate(method, p, start=start, eta=0.1, gradient=slope(1.0, 0.3), **more).run(steps)


def factors(method, moved):
    """Return the factor of a commit of worker 1 after worker 0 has moved the center by ``moved`` (n,)."""
    start = np.zeros_like(moved)
    simulation = simulate(
        method, 2, start=start, eta=1.0, gradient=lambda rank, x: -moved if rank == 0 else -np.full_like(moved, 8.0),
        schedule=Scripted([0, 1]),
    ).run(9)  # fmt: skip
    # Worker 0 finds the center where it was: its commit passes in full.
    return (simulation.consensus() - moved) / 8


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("gamma", [1e-4, 0.5, 3.0])
def test_factor_is_that_of_the_thesis_element_by_element(placement, gamma):
    e = np.concatenate([np.linspace(-2, 2, 41), np.geomspace(1e-6, 1e6, 40)])
    found = factors(ADAG(period=1, gamma=gamma, placement=placement), e)
    tolerance = 1e-15 * (1 + np.abs(e))  # of the sum e + 8*factor
    np.testing.assert_allclose(found, 1 / (e**2 / gamma + 1), rtol=1e-12, atol=tolerance.max())
    assert found[20] == 1.0  # where the center has not moved
    assert ((found > -tolerance) & (found <= 1 + tolerance)).all()
    np.testing.assert_allclose(found[:41], found[:41][::-1], rtol=0, atol=1e-15)  # even in e


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("tau", [1, 3])
def test_alone_it_is_agn_or_sgd(placement, normalise, tau):
    found = run(ADAG(period=tau, placement=placement, normalise=normalise), 1, seed=3)
    wanted = run(AGN(period=tau) if normalise else Downpour(period=tau), 1, seed=3)
    if placement == "C":  # o + d and c + d, with c = o
        np.testing.assert_allclose(found.x(), wanted.x(), rtol=1e-13)
    else:
        assert same_bits(found.x(), wanted.x())
    np.testing.assert_allclose(found.consensus(), wanted.consensus(), rtol=1e-13)


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(1, 3), st.booleans(), st.integers(0, 2**16))
def test_a_and_b_are_the_same_on_any_schedule(p, tau, normalise, seed):
    one, other = (run(ADAG(period=tau, placement=where, normalise=normalise), p, seed) for where in "AB")
    assert same_bits(one.x(), other.x())
    assert same_bits(one.consensus(), other.consensus())


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**16))
def test_placement_c_is_the_same_if_no_commit_comes_between_pull_and_push(p, tau, seed):
    one, other = (run(ADAG(period=tau, placement=where), p, seed, interleave_locks=False) for where in "AC")
    assert same_bits(one.x(), other.x())
    assert same_bits(one.consensus(), other.consensus())


def test_placement_c_scales_by_the_pulled_center_and_continues_from_it():
    # Worker 1 pulls c = 0 (twice it gives way: before its pull, before its push); worker 0 moves c to 4 in between.
    simulation = simulate(
        ADAG(period=1, gamma=1.0, placement="C"), 2, start=np.zeros(1), eta=1.0,
        gradient=lambda rank, x: np.full(1, -4.0 + rank), schedule=Scripted([1, 1, 0, 0, 0, 1]), interleave_locks=True,
    ).run(9)  # fmt: skip
    assert simulation.consensus().tolist() == [4 + 3]  # not damped: it has not seen the 4
    assert simulation.x().tolist() == [[4], [3]]
    damped = simulate(
        ADAG(period=1, gamma=1.0, placement="A"), 2, start=np.zeros(1), eta=1.0,
        gradient=lambda rank, x: np.full(1, -4.0 + rank), schedule=Scripted([1, 0, 0, 1]), interleave_locks=True,
    ).run(9)  # fmt: skip
    np.testing.assert_allclose(damped.consensus(), 4 + 3 / 17, rtol=1e-15)


@given(
    st.lists(st.integers(0, 2), max_size=60), st.integers(1, 3), st.booleans(), st.sampled_from(PLACEMENTS),
    st.floats(1e-4, 10),
)  # fmt: skip
def test_any_order_of_events_follows_the_update_rule(script, tau, normalise, placement, gamma):
    rng = np.random.default_rng(5)
    start, h, b = rng.normal(size=6), rng.uniform(0.2, 2, 3), rng.normal(size=3)
    method = ADAG(period=tau, gamma=gamma, placement=placement, normalise=normalise)
    simulation = simulate(method, 3, start=start, eta=0.1, gradient=slope(h, b), schedule=Scripted(script)).run(10**6)
    x, o, c, t = np.tile(start, (3, 1)), np.tile(start, (3, 1)), start, [0, 0, 0]
    for i in script:
        x[i] = x[i] - 0.1 * h[i] * (x[i] - b[i])
        t[i] += 1
        if t[i] % tau == 0:
            d = (x[i] - o[i]) / (tau if normalise else 1)
            c = c + d / ((1 / gamma) * (c - o[i]) ** 2 + 1)
            x[i] = o[i] = c
    np.testing.assert_allclose(simulation.x(), x, rtol=0, atol=1e-12)
    np.testing.assert_allclose(simulation.consensus(), c, rtol=0, atol=1e-12)


@settings(max_examples=20)
@given(st.integers(1, 4), st.integers(1, 3), st.booleans(), st.integers(0, 2**16))
def test_without_a_limit_it_is_agn(p, tau, normalise, seed):
    found = run(ADAG(period=tau, gamma=1e300, normalise=normalise), p, seed)
    wanted = run(AGN(period=tau) if normalise else Downpour(period=tau), p, seed)
    assert same_bits(found.x(), wanted.x())
    assert same_bits(found.consensus(), wanted.consensus())


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_small_gamma_stops_every_coordinate_that_has_moved(placement):
    moved = np.array([0.0, 1e-3, 1.0, -50.0])
    np.testing.assert_allclose(
        factors(ADAG(period=1, gamma=1e-30, placement=placement), moved), [1, 0, 0, 0], atol=1e-20
    )


@pytest.mark.parametrize("gamma", [1e-30, 1e-4, 1e30])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_nonfinite_values_never_reach_the_center_and_leave_the_worker(dtype, placement, gamma):
    steps = [0, 0]

    def gradient(rank, x):
        steps[rank] += 1
        g = x.copy()
        if rank == 1 and steps[1] in (2, 3, 4):
            g[2:] = np.nan, np.inf, -np.inf
        return g

    method = ADAG(period=1, gamma=gamma, placement=placement)
    simulation = simulate(method, 2, start=np.ones(5, dtype), eta=0.1, gradient=gradient).run(20)
    assert np.isfinite(simulation.x()).all()
    assert (simulation.consensus() < 0.95).all()
    assert statistics(simulation, "n_nonfinite")[0] == 0
    assert statistics(simulation, "n_nonfinite")[1] >= 9
