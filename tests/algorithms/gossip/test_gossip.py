"""Gossiping SGD (Jin, Yuan, Iandola, Keutzer, arXiv 1611.04581): contraction over all choices of peers."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.quadratic import simulate, slope, statistics

from mpitrain.algorithms import GossipSGD
from mpitrain.simulation.schedules import RandomOrder, RoundRobin, Scripted

PULL, PUSH = GossipSGD(direction="pull"), GossipSGD(direction="push")


def all_choices(p):
    """Return every choice of a peer by each worker, (number, p)."""
    return np.array(list(itertools.product(*[[j for j in range(p) if j != i] for i in range(p)])))


def spread(x):
    """Return V = sum_i (x_i - mean)^2 over the last axis."""
    return ((x - x.mean(-1, keepdims=True)) ** 2).sum(-1)


@pytest.mark.parametrize(("p", "wanted"), [(2, 0.0), (3, 0.1875), (4, 0.2777778), (5, 0.328125), (6, 0.36)])
def test_pull_contracts_as_the_formula_says(p, wanted):
    x = np.random.default_rng(p).normal(size=p)
    simulation = simulate(PULL, p, start=x[:, None], eta=0.0)
    # A pull touches nobody else, and x is put back after it: each of these starts from the old state.
    table = np.zeros((p, p))
    for i, worker in enumerate(simulation.workers):
        for j in set(range(p)) - {i}:
            worker.x.local[...] = x[i]
            worker.average_with(j)
            table[i, j], worker.x.local[...] = worker.x.local[0], x[i]
            assert table[i, j] == pytest.approx((x[i] + x[j]) / 2, abs=1e-15)
    after = table[np.arange(p), all_choices(p)]
    v, contraction = spread(x), (p - 2) * (2 * p - 3) / (4 * (p - 1) ** 2)
    assert contraction == pytest.approx(wanted, abs=5e-8)
    assert spread(after).mean() / v == pytest.approx(contraction, abs=1e-12)
    assert after.mean() == pytest.approx(x.mean(), abs=1e-14)
    assert after.mean(-1).var() == pytest.approx(v * (p - 2) / (4 * p * (p - 1) ** 2), abs=1e-14)


@pytest.mark.parametrize(("p", "wanted"), [(3, 0.3541667), (4, 0.4482168), (5, 0.4946615)])
def test_push_contracts_as_enumeration_says(p, wanted):
    # E[V'] is V times a factor whatever x is, so the coordinates can be of any start.
    x = np.random.default_rng(p).normal(size=(p, 2))
    # Giving way before each lock, in turn: all have sent before one looks into its mailbox.
    simulation = simulate(PUSH, p, start=x, eta=0.0, schedule=RoundRobin(), interleave_locks=True)
    choices = all_choices(p)
    total, before = np.zeros(2), spread(x.T)
    for peers in choices:
        for worker, row in zip(simulation.workers, x, strict=True):
            worker.x.local[...] = row
        simulation.world.run(
            lambda comm, peers=peers: simulation.workers[comm.rank].average_with(int(peers[comm.rank]))
        )
        total += spread(simulation.x().T)
    np.testing.assert_allclose(total / len(choices) / before, wanted, atol=5e-8)


def test_push_averages_with_all_messages():
    x = np.array([[1.0], [2.0], [6.0], [11.0]])
    simulation = simulate(PUSH, 4, start=x, eta=0.0, interleave_locks=True)
    simulation.world.run(lambda comm: simulation.workers[comm.rank].average_with([3, 3, 3, 0][comm.rank]))
    # x_j <- (x_j + sum of what came)/(1 + how many came)
    np.testing.assert_allclose(simulation.x()[:, 0], [(1 + 11) / 2, 2, 6, (11 + 1 + 2 + 6) / 4], rtol=1e-15)


def test_two_pulling_workers_halve_their_distance_in_each_pull():
    # 0 pulls 1, then 1 pulls what 0 has become; each then finds another version.
    simulation = simulate(PULL, 2, start=[[0.0], [8.0]], eta=0.0, schedule=Scripted([0, 1, 0])).run(9)
    assert simulation.x()[:, 0].tolist() == [5.0, 6.0]


@settings(max_examples=60)
@given(
    st.sampled_from(["pull", "push"]),
    st.sampled_from(["pre", "post"]),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(0, 2**16),
)
def test_averages_stay_in_the_hull(direction, grad_point, tau, p, seed):
    start = np.random.default_rng(seed).normal(size=(p, 9))
    method = GossipSGD(direction=direction, grad_point=grad_point, period=tau)
    simulation = simulate(method, p, start=start, eta=0.0, schedule=RandomOrder(seed), seed=seed, interleave_locks=True)
    low, high = start.min(0), start.max(0)
    for _ in range(4):
        x = simulation.run(5).x()
        assert (x >= low - 1e-14).all()
        assert (x <= high + 1e-14).all()


@pytest.mark.parametrize("direction", ["pull", "push"])
def test_workers_converge_to_one_value(direction):
    start = np.random.default_rng(0).normal(size=(5, 4))
    method = GossipSGD(direction=direction)
    simulation = simulate(method, 5, start=start, eta=0.0, schedule=RandomOrder(1), interleave_locks=True).run(200)
    assert np.ptp(simulation.x(), axis=0).max() < 1e-8


@pytest.mark.parametrize("grad_point", ["pre", "post"])
@pytest.mark.parametrize("direction", ["pull", "push"])
def test_gradient_is_taken_before_the_exchange_or_after_it(direction, grad_point):
    eta, x0, x1 = 0.1, 2.0, 6.0
    method = GossipSGD(direction=direction, grad_point=grad_point)
    simulation = simulate(method, 2, start=[[x0], [x1]], eta=eta, schedule=Scripted([0, 1])).run(9)
    step = lambda x: x - eta * x  # noqa: E731
    # What worker 1 averages with: worker 0's vector at the moment of its exchange (pull), or what came of it (push).
    if grad_point == "pre":
        first = (x0 + x1) / 2 - eta * x0 if direction == "pull" else step(x0)
        second = (x1 + (first if direction == "pull" else x0)) / 2 - eta * x1
    else:
        first = (step(x0) + x1) / 2 if direction == "pull" else step(x0)
        second = (step(x1) + (first if direction == "pull" else step(x0))) / 2
    np.testing.assert_allclose(simulation.x()[:, 0], [first, second], rtol=1e-14)


def test_consensus_is_the_mean_of_all():
    start = np.random.default_rng(3).normal(size=(4, 6))
    for method in (PULL, PUSH):
        simulation = simulate(method, 4, start=start, eta=0.1).run(3)
        np.testing.assert_allclose(simulation.consensus(2), simulation.x().mean(0), rtol=1e-14)


@pytest.mark.parametrize("method", [PULL, PUSH])
def test_one_worker_is_sgd(method):
    start = np.random.default_rng(4).normal(size=8)
    simulation = simulate(method, 1, start=start, eta=0.1, decay=0.01, gradient=slope(2.0)).run(9)
    np.testing.assert_allclose(simulation.x()[0], (1 - 0.1 * 2.01) ** 9 * start, rtol=1e-13)


@pytest.mark.parametrize("method", [PULL, PUSH])
def test_nan_of_a_peer_does_not_spread_and_is_not_evaluated(method):
    def gradient(rank, x):
        g = x.copy()
        if rank == 1:
            g[2] = np.nan
        return g

    simulation = simulate(method, 4, start=np.ones(5), eta=0.1, gradient=gradient).run(20)
    assert np.isfinite(simulation.x()[[0, 2, 3]]).all()
    simulation.workers[1].x.local[2] = np.nan
    np.testing.assert_allclose(simulation.consensus(), simulation.x()[[0, 2, 3]].mean(axis=0), rtol=1e-12)
    assert sum(statistics(simulation, "n_nonfinite")) > 0


def test_peers_are_drawn_by_seed_and_rank():
    def trajectory(seed):
        start = np.arange(20.0).reshape(5, 4)
        return simulate(PULL, 5, start=start, eta=0.1, seed=seed).run(6).x()

    assert np.array_equal(trajectory(1), trajectory(1))
    assert not np.array_equal(trajectory(1), trajectory(2))


def test_peers_are_uniform_and_independent_between_workers():
    p, steps = 4, 3600
    drawn = [[] for _ in range(p)]
    simulation = simulate(PULL, p, start=np.zeros(1), eta=0.1)
    for worker, peers in zip(simulation.workers, drawn, strict=True):
        worker.average_with = peers.append
    simulation.run(steps)
    for i, j in itertools.combinations(range(p), 2):
        pairs, counts = np.unique(list(zip(drawn[i], drawn[j], strict=True)), axis=0, return_counts=True)
        assert len(pairs) == (p - 1) ** 2  # all of them, none with itself
        assert i not in pairs[:, 0]
        assert j not in pairs[:, 1]
        q = 1 / (p - 1) ** 2
        np.testing.assert_allclose(counts, steps * q, atol=4.5 * np.sqrt(steps * q * (1 - q)))


def test_a_pull_reads_the_newest_state():
    # Steps of noise, each followed by a pull, in random order. V by the equations of the docstring, typed again.
    p, n, eta, rounds = 4, 64, 0.1, 300
    noise, order = np.random.default_rng(1), np.random.default_rng(2)
    simulation = simulate(
        GossipSGD(grad_point="post"), p, start=np.zeros(n), eta=eta, gradient=lambda rank, x: x - noise.normal(size=n)
    )
    settled = []
    for _ in range(rounds + 40):
        simulation.world.schedule = Scripted(order.permutation(p).tolist())
        x = simulation.run(2).x()
        settled.append(spread(x.T).mean() / eta**2)
    typed, x, seen = [], np.zeros((p, 2000)), np.zeros((p, p), bool)
    for _ in range(rounds + 40):
        for i in order.permutation(p):
            x[i] += eta * (noise.normal(size=2000) - x[i])
            seen[:, i] = False
            j = (i + 1 + order.integers(p - 1)) % p
            if not seen[i, j]:
                x[i], seen[i, j] = (x[i] + x[j]) / 2, True
        typed.append(spread(x.T).mean() / eta**2)
    assert np.mean(typed[40:]) == pytest.approx(1.11, abs=0.04)
    assert np.mean(settled[40:]) == pytest.approx(1.11, abs=0.06)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40))
def test_a_version_of_a_peer_is_averaged_with_once(script):
    simulation = simulate(GossipSGD(grad_point="post"), 3, start=np.arange(3.0)[:, None], eta=0.0)
    pulled = set()
    for worker in simulation.workers:
        average = worker.average_with

        def note(peer, worker=worker, average=average):
            before = worker.comm.statistics.n_exchanges
            average(peer)
            if worker.comm.statistics.n_exchanges > before:
                use = (worker.comm.rank, peer, simulation.workers[peer].t)
                assert use not in pulled
                pulled.add(use)

        worker.average_with = note
    simulation.world.schedule = Scripted(script)
    simulation.run(len(script) + 1)
    assert pulled


def test_a_worker_that_runs_alone_trains_on():
    # A slice of 55 steps while three others stand still: at most three averages, then plain SGD.
    simulation = simulate(GossipSGD(), 4, start=np.zeros((4, 5)), eta=1.0, gradient=lambda rank, x: -np.ones_like(x))
    simulation.world.schedule = Scripted([0] * 55)
    simulation.run(56)
    assert statistics(simulation, "n_exchanges") == [3, 0, 0, 0]
    assert simulation.x()[0, 0] > 55 - 3 * 20
