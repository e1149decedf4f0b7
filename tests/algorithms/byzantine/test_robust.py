"""Robust rules without memory: against their definitions, and under attacks that they do and do not withstand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.quadratic import same_bits, simulate, statistics
from torch import nn

from mpitrain import DistributedOptimizer, RobustSGD, UsageError
from mpitrain.algorithms.byzantine.robust import RULES, clipping, geometric_median
from mpitrain.simulation.schedules import RandomOrder

ETA = 0.5


def step(method, g, *, steps=1, schedule=None):
    """Return the last aggregate, given the gradients (m, n) of all workers in each of a few steps."""
    m, n = g.shape
    simulation = simulate(
        method, m, start=np.zeros(n, g.dtype), eta=ETA, gradient=lambda rank, x: g[rank], schedule=schedule
    )
    before = simulation.run(steps - 1).x()
    x = simulation.run(1).x()
    assert all(same_bits(x[0], other) for other in x)
    return (before[0] - x[0]) / ETA


def krum(g, f):
    """Blanchard et al. 2017, section 4."""
    m = len(g)

    def score(i):
        return sum(sorted(((g[i] - g[j]) ** 2).sum() for j in range(m) if j != i)[: max(m - f - 2, 1)])

    return g[min(range(m), key=score)]


def trimmed(g, f):
    return np.sort(g, axis=0)[f : len(g) - f].mean(axis=0)


ORACLES = {
    "mean": lambda g, f: g.mean(axis=0),
    "median": lambda g, f: np.median(g, axis=0),
    "trimmed_mean": trimmed,
    "krum": krum,
}


@settings(max_examples=40)
@given(st.sampled_from(sorted(ORACLES)), st.integers(1, 9), st.integers(1, 40), st.integers(0, 3), st.integers(0, 999))
def test_a_rule_is_its_definition(rule, m, n, f, seed):
    f = min(f, max((m - 3) // 2, 0))
    g = np.random.default_rng(seed).normal(size=(m, n))
    found = step(RobustSGD(rule=rule, n_byzantine=f), g)
    np.testing.assert_allclose(found, ORACLES[rule](g, f), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("m", "f"), [(1, 0), (3, 0), (4, 0), (5, 1), (10, 3), (11, 4)])
def test_the_default_is_as_many_as_krum_allows(m, f):
    g = np.random.default_rng(m).normal(size=(m, 6))
    assert RobustSGD().tolerated(m) == f
    np.testing.assert_allclose(step(RobustSGD(rule="trimmed_mean"), g), trimmed(g, f), atol=1e-12)
    np.testing.assert_allclose(step(RobustSGD(rule="krum"), g), krum(g, f), atol=1e-12)


@pytest.mark.parametrize(("rule", "m", "most"), [("krum", 10, 3), ("krum", 2, 0), ("trimmed_mean", 5, 2)])
def test_too_many_byzantine_workers_are_refused(rule, m, most):
    assert RobustSGD(rule=rule, n_byzantine=most).tolerated(m) == most
    with pytest.raises(UsageError, match=f"among {m} workers works with n_byzantine <= {most}, not {most + 1}"):
        simulate(RobustSGD(rule=rule, n_byzantine=most + 1), m, start=np.zeros(3), eta=0.1)


@settings(max_examples=40)
@given(st.integers(2, 9), st.integers(1, 20), st.integers(0, 999))
def test_the_geometric_median_minimises_the_sum_of_distances(m, n, seed):
    g = np.random.default_rng(seed).normal(size=(m, n))
    y = step(RobustSGD(rule="geometric_median"), g)

    def cost(at):
        return np.linalg.norm(g - at, axis=1).sum()

    directions = np.random.default_rng(seed).normal(size=(30, n))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    lowest = min(cost(y + r * d) for d in directions for r in (1e-3, 1e-2, 0.1, 1.0))
    assert cost(y) <= lowest + 1e-6 * cost(y)


def test_the_geometric_median_on_a_line_is_the_median():
    g = np.array([[0.0], [1.0], [2.5], [7.0], [40.0]]) * np.array([[0.6, 0.8]])
    np.testing.assert_allclose(step(RobustSGD(rule="geometric_median"), g), g[2], atol=1e-4)


def test_the_geometric_median_ignores_infinite_distances():
    squares = np.ones((4, 4)) - np.eye(4)
    squares[3, :3] = squares[:3, 3] = np.inf
    np.testing.assert_allclose(geometric_median(squares), [1 / 3, 1 / 3, 1 / 3, 0], atol=1e-9)
    np.testing.assert_allclose(geometric_median(np.zeros((3, 3))), 1 / 3)


@pytest.mark.parametrize("radius", [0.5, 3.0, None])
def test_centered_clipping_follows_its_recursion(radius):
    g = np.random.default_rng(5).normal(size=(6, 25))
    g[5] = 100.0
    v = np.zeros(25)
    for steps in range(1, 6):
        distances = np.linalg.norm(g - v, axis=1)
        r = np.median(distances) if radius is None else radius
        v = v + np.mean([(row - v) * min(1.0, r / d) for row, d in zip(g, distances, strict=True)], axis=0)
        found = step(RobustSGD(rule="centered_clipping", clip_radius=radius), g, steps=steps)
        np.testing.assert_allclose(found, v, rtol=0, atol=1e-10)


def test_clipping_of_equal_gradients_changes_nothing():
    assert clipping(np.zeros(3), None).tolist() == [1.0] * 3
    assert clipping(np.array([1.0, np.inf, 4.0]), 2.0).tolist() == [1.0, 0.0, 0.5]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_gradient_that_is_not_finite_is_left_out(rule, dtype):
    g = np.random.default_rng(6).normal(size=(7, 50)).astype(dtype)
    bad = g.copy()
    bad[2, 49], bad[5] = np.nan, np.inf
    method = RobustSGD(rule=rule, n_byzantine=1)
    found, without = step(method, bad), step(method, np.delete(g, [2, 5], axis=0))
    np.testing.assert_allclose(found, without, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_nothing_moves_if_no_gradient_is_finite(rule):
    simulation = simulate(
        RobustSGD(rule=rule), 3, start=np.ones(40), eta=ETA, gradient=lambda rank, x: np.full(40, np.nan)
    )
    assert (simulation.run(3).x() == 1).all()
    assert sum(statistics(simulation, "n_nonfinite")) == 3 * 3 * 40


@pytest.mark.parametrize("rule", RULES)
def test_outliers_have_little_influence_except_on_the_mean(rule):
    g = np.random.default_rng(7).normal(size=(9, 30))
    g[7:] = 1e6
    distance = np.linalg.norm(step(RobustSGD(rule=rule, n_byzantine=3), g, steps=9) - g[:7].mean(axis=0))
    assert (distance > 1e5) == (rule == "mean")
    if rule != "mean":
        assert distance < np.linalg.norm(g[:7] - g[:7].mean(axis=0), axis=1).max() * 3


@settings(max_examples=30)
@given(st.sampled_from(["median", "trimmed_mean", "krum"]), st.integers(0, 999), st.floats(-1e9, 1e9))
def test_the_aggregate_stays_among_honest_gradients(rule, seed, far):
    g = np.random.default_rng(seed).normal(size=(9, 12))
    g[6:] = far
    found = step(RobustSGD(rule=rule, n_byzantine=3), g)
    assert (found >= g[:6].min(axis=0) - 1e-12).all() or rule == "krum"
    assert (found <= g[:6].max(axis=0) + 1e-12).all() or rule == "krum"
    assert np.linalg.norm(found - g[:6].mean(axis=0)) < 3 * np.linalg.norm(g[:6] - g[:6].mean(axis=0), axis=1).max()


@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_events_does_not_matter(rule):
    g = np.random.default_rng(8).normal(size=(5, 70)).astype(np.float32)
    method = RobustSGD(rule=rule)
    assert same_bits(step(method, g, steps=4), step(method, g, steps=4, schedule=RandomOrder(9)))


@pytest.mark.ranks(3)
@pytest.mark.time_limit(180)
@pytest.mark.parametrize("rule", RULES)
def test_ranks_do_what_simulated_workers_do(world, rule):
    p, n, steps = world.size, 70, 6
    g = np.random.default_rng(1).normal(size=(steps, p, n))
    clock = [0] * p

    def gradient(rank, x):
        clock[rank] += 1
        return g[clock[rank] - 1, rank] + x

    start, method = np.random.default_rng(2).normal(size=n), RobustSGD(rule=rule)
    simulated = simulate(method, p, start=start, eta=0.1, gradient=gradient).run(steps)
    model = nn.Module()
    model.x = nn.Parameter(torch.tensor(start))
    with DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, method) as optimizer:
        for t in range(steps):
            optimizer.zero_grad()
            (model.x * torch.from_numpy(g[t, world.rank]) + model.x**2 / 2).sum().backward()
            optimizer.step()
        mine = model.x.detach().numpy().copy()
        np.testing.assert_allclose(mine, simulated.x()[world.rank], rtol=1e-12, atol=1e-13)
        assert len({x.tobytes() for x in world.comm.allgather(mine)}) == 1
