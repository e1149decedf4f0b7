"""D-PSGD (Lian et al., arXiv 1705.09056) against x <- W x - eta*g; its mean and its rate of consensus."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.on_ranks import RankRun, ranks
from support.quadratic import same_bits, simulate, slope, statistics

from mpitrain import UsageError
from mpitrain.algorithms import DPSGD
from mpitrain.collectives.topology.graphs import Topology
from mpitrain.simulation.schedules import RandomOrder

H, B = np.array([0.5, 1.0, 2.0, 0.8, 1.4, 0.3]), np.array([1.0, -2.0, 0.5, 3.0, 0.1, -0.7])
TOPOLOGIES = ("ring", "torus", "grid", "star", "complete", "bipartite_exponential", "symmetric_exponential")
EVERY_TOPOLOGY = pytest.mark.parametrize("name", TOPOLOGIES)


def random_graph(p, seed):
    """Return two steps of random undirected edges added to a path."""
    rng = np.random.default_rng(seed)
    steps = []
    for _ in range(2):
        edges = np.triu(rng.random((p, p)) < 0.4, 1)
        edges[np.arange(p - 1), np.arange(1, p)] = True
        edges |= edges.T
        steps.append(tuple(tuple(int(j) for j in np.flatnonzero(row)) for row in edges))
    return Topology("random", p, tuple(steps))


def metropolis(graph, t):
    """Return W_ij = 1/(1 + max(d_i, d_j)) for neighbours, with a diagonal that makes each row sum to 1."""
    degree = [len(graph.out_neighbours(i, t)) for i in range(graph.size)]
    w = np.zeros((graph.size, graph.size))
    for i in range(graph.size):
        for j in graph.out_neighbours(i, t):
            w[i, j] = 1 / (1 + max(degree[i], degree[j]))
    return w + np.diag(1 - w.sum(1))


def reference(graph, x, gradient, eta, steps):
    for t in range(steps):
        x = metropolis(graph, t) @ x - eta * np.stack([gradient(i, x[i]) for i in range(len(x))])
    return x


@pytest.mark.parametrize("p", [1, 2, 3, 4, 5, 6])
@EVERY_TOPOLOGY
def test_workers_follow_the_papers_recursion(name, p):
    method, start = DPSGD(topology=name), np.random.default_rng(p).normal(size=(p, 4))
    simulation = simulate(method, p, start=start, eta=0.1, gradient=slope(H, B)).run(12)
    wanted = reference(method.graph(p), start, slope(H, B), 0.1, 12)
    np.testing.assert_allclose(simulation.x(), wanted, rtol=0, atol=1e-12)


@settings(max_examples=40)
@given(st.integers(2, 7), st.integers(0, 2**16), st.integers(1, 9))
def test_any_graph_and_any_schedule_give_the_papers_recursion(p, seed, steps):
    graph, start = random_graph(p, seed), np.random.default_rng(seed).normal(size=(p, 3))
    found = [
        simulate(
            DPSGD(topology=graph),
            p,
            start=start,
            eta=0.1,
            gradient=slope(1.0, 0.3),
            schedule=RandomOrder(s),
            interleave_locks=True,
        )
        .run(steps)
        .x()
        for s in (seed, seed + 1)
    ]
    np.testing.assert_allclose(found[0], reference(graph, start, slope(1.0, 0.3), 0.1, steps), rtol=0, atol=1e-12)
    assert same_bits(*found)


@EVERY_TOPOLOGY
def test_mean_moves_by_the_mean_gradient_and_nothing_else(name):
    p, eta, used = 6, 0.1, []

    def gradient(rank, x):
        used.append(slope(H, B)(rank, x))
        return used[-1]

    simulation = simulate(DPSGD(topology=name), p, start=np.eye(p), eta=eta, gradient=gradient)
    mean = simulation.x().mean(0)
    for _ in range(8):
        used.clear()
        simulation.run(1)
        mean = mean - eta * np.mean(used, axis=0)
        np.testing.assert_allclose(simulation.x().mean(0), mean, rtol=0, atol=1e-14)
        np.testing.assert_allclose(simulation.consensus(2), mean, rtol=0, atol=1e-14)


def test_workers_of_equal_curvature_converge_around_the_mean_of_their_minima():
    simulation = simulate(DPSGD(), 5, start=np.zeros(1), eta=0.05, gradient=slope(0.8, B)).run(600)
    assert simulation.x().mean() == pytest.approx(B[:5].mean(), abs=1e-9)


@pytest.mark.parametrize("p", [2, 3, 5, 6, 8])
@pytest.mark.parametrize("name", ["ring", "grid", "star", "complete"])
def test_disagreement_shrinks_by_the_second_singular_value(name, p):
    # Each coordinate starts in a unit vector of its own: one step returns W.
    w = simulate(DPSGD(topology=name), p, start=np.eye(p), eta=0.0).run(1).x()
    np.testing.assert_allclose(w, w.T, rtol=0, atol=1e-15)
    np.testing.assert_allclose(w.sum(0), 1, rtol=0, atol=1e-15)
    assert w.min() >= 0
    u, sigma, _ = np.linalg.svd(w - 1 / p)
    if name == "ring" and p > 2:
        second = max(abs(1 + 2 * np.cos(2 * np.pi * k / p)) / 3 for k in range(1, p))
        assert sigma[0] == pytest.approx(second, abs=1e-12)
    elif name == "star" and p > 2:
        assert sigma[0] == pytest.approx(1 - 1 / p, abs=1e-12)
    elif name == "complete":
        assert sigma[0] == pytest.approx(0, abs=1e-12)
    # Along the slowest direction the disagreement shrinks by exactly sigma a step, from any start by no less.
    disagreement = lambda x: np.linalg.norm(x - x.mean(0))  # noqa: E731
    slowest = simulate(DPSGD(topology=name), p, start=u[:, :1], eta=0.0)
    anywhere = simulate(DPSGD(topology=name), p, start=np.random.default_rng(p).normal(size=(p, 9)), eta=0.0)
    for k in range(1, 6):
        assert disagreement(slowest.run(1).x()) == pytest.approx(sigma[0] ** k, abs=1e-12)
        before = disagreement(anywhere.x())
        assert disagreement(anywhere.run(1).x()) <= sigma[0] * before + 1e-12


def test_nan_of_a_neighbour_does_not_spread():
    def gradient(rank, x):
        g = x.copy()
        if rank == 1:
            g[2] = np.nan
        return g

    simulation = simulate(DPSGD(), 4, start=np.ones(5), eta=0.1, gradient=gradient).run(20)
    assert np.isfinite(np.delete(simulation.x(), 1, axis=0)).all()
    # In every second step: each of its two neighbours what comes from it, and it, in vain, what comes from them.
    assert statistics(simulation, "n_nonfinite") == [10, 20, 10, 0]
    others = np.delete(simulation.x()[:, 2], 1)
    assert ((others > 0.9**20) & (others < 1.2 * 0.9**20)).all()  # it learns in every second step only


def test_directed_graphs_are_refused():
    with pytest.raises(UsageError, match="dpsgd needs an undirected graph, and exponential is directed"):
        DPSGD(topology="exponential").graph(4)


@pytest.mark.ranks(2, 5)
@pytest.mark.parametrize("n_nodes", [1, 2])
@pytest.mark.parametrize("name", ["star", "bipartite_exponential"])
def test_ranks_do_what_simulated_workers_do(world, n_nodes, name):
    p, steps = world.size, 20
    start = np.random.default_rng(1).normal(size=(p, 300))
    simulated = simulate(DPSGD(topology=name), p, start=start, eta=0.1, gradient=slope(H, B)).run(steps)
    with ranks(n_nodes) as comm:
        mine = RankRun(DPSGD(topology=name), comm, start[comm.rank])
        used = mine.sum(mine.run(steps, 0.1, slope(H, B)))
        assert same_bits(mine.worker.x.local.copy(), simulated.x()[comm.rank])
        found = mine.sum(mine.worker.x.local.copy())
        np.testing.assert_allclose(found, start.sum(0) - 0.1 * used, rtol=0, atol=1e-11)
