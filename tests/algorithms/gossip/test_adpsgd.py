"""AD-PSGD (Lian et al., arXiv 1710.06952): atomic averages keep the sum, gradients are applied to the averaged x."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.on_ranks import RankRun, ranks
from support.quadratic import load, same_bits, simulate, slope, states, statistics

from mpitrain.algorithms import ADPSGD
from mpitrain.algorithms.base.replica import ParamGroupSlice
from mpitrain.simulation.schedules import RandomOrder, RoundRobin, Scripted

H, B = np.array([0.5, 1.0, 2.0, 0.8, 1.4, 0.3]), np.array([1.0, -2.0, 0.5, 3.0, 0.1, -0.7])
COMPLETE = ADPSGD(topology="complete")
TOPOLOGIES = ("bipartite_exponential", "exponential", "directed_ring", "torus", "star", "complete")


def positions(everyones):
    """Return x (p, n), of which the models hold copies."""
    return np.stack([state["position"] for state in everyones])


def step(worker, g, eta):
    def update():
        worker.x.local[...] -= eta * g

    worker.step([ParamGroupSlice(slice(0, worker.x.local.size), eta)], update)


def test_an_averaging_gives_both_the_mean():
    simulation = simulate(COMPLETE, 3, start=[[1.0, -3.0], [5.0, 8.0], [7.0, 7.0]], eta=0.0)
    simulation.workers[2].average_with(0)
    assert positions(states(simulation)).tolist() == [[4.0, 2.0], [5.0, 8.0], [4.0, 2.0]]
    simulation.workers[0].average_with(1)
    assert positions(states(simulation)).tolist() == [[4.5, 5.0], [4.5, 5.0], [4.0, 2.0]]
    assert simulation.x().tolist() == [[1.0, -3.0], [5.0, 8.0], [7.0, 7.0]]  # copies are made at the end of a step


def test_a_gradient_is_applied_to_the_averaged_x():
    eta, x0, x1, x2 = 0.1, 1.0, 5.0, 11.0
    simulation = simulate(COMPLETE, 3, start=[[x0], [x1], [x2]], eta=eta)
    first, second, third = simulation.workers
    g = 2.0 * x0  # of worker 0, at its copy; meanwhile two others average with it
    second.average_with(0)
    third.average_with(0)
    x0, x1 = (x0 + x1) / 2, (x0 + x1) / 2
    x0, x2 = (x0 + x2) / 2, (x0 + x2) / 2
    first._neighbours = [1]
    step(first, g, eta)
    x0, x1 = (x0 + x1) / 2, (x0 + x1) / 2
    x0 -= eta * g
    assert positions(states(simulation))[:, 0] == pytest.approx([x0, x1, x2], abs=1e-14)
    assert first.x.local[0] == pytest.approx(x0, abs=1e-14)  # and the next gradient sees all of it
    assert first.metrics() == {"staleness": 2.0}
    step(first, 0.0, eta)
    assert first.metrics() == {"staleness": 0.0}


@pytest.mark.parametrize("p", [2, 3, 4, 5, 6])
def test_one_random_averaging_contracts_as_the_formula_says(p):
    # Of all pairs: E[V'] = V - E[(x_i - x_j)^2]/2 = V*(p - 2)/(p - 1)
    x, after = np.random.default_rng(p).normal(size=p), []
    simulation = simulate(COMPLETE, p, start=x[:, None], eta=0.0)
    saved = states(simulation)
    spread = lambda values: ((values - values.mean()) ** 2).sum()  # noqa: E731
    for i, j in itertools.permutations(range(p), 2):
        load(simulation, saved)
        simulation.workers[i].average_with(j)
        after.append(positions(states(simulation))[:, 0])
        assert after[-1].sum() == pytest.approx(x.sum(), abs=1e-14)
    assert np.mean([spread(values) for values in after]) / spread(x) == pytest.approx((p - 2) / (p - 1), abs=1e-12)


@settings(max_examples=80)
@given(st.sampled_from(TOPOLOGIES), st.integers(1, 6), st.integers(0, 2**16), st.sampled_from([0.0, 0.1]))
def test_sum_moves_by_the_gradients_only(name, p, seed, eta):
    start, used = np.random.default_rng(seed).normal(size=(p, 4)), np.zeros(4)

    def gradient(rank, x):
        nonlocal used
        g = slope(H, B)(rank, x)
        used = used + g
        return g

    simulation = simulate(
        ADPSGD(topology=name),
        p,
        start=start,
        eta=eta,
        gradient=gradient,
        schedule=RandomOrder(seed),
        seed=seed,
        interleave_locks=True,
    )
    low, high = start.min(0) - 1e-14, start.max(0) + 1e-14
    for _ in range(4):
        x = positions(states(simulation.run(4)))
        np.testing.assert_allclose(x.sum(0), start.sum(0) - eta * used, rtol=0, atol=1e-12)
        np.testing.assert_allclose(simulation.consensus(p - 1), x.mean(0), rtol=0, atol=1e-14)
        if eta == 0:
            assert ((low <= x) & (x <= high)).all()


@pytest.mark.parametrize("p", [2, 3, 5, 6])
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_workers_converge_to_the_mean(name, p):
    start = np.random.default_rng(0).normal(size=(p, 4))
    simulation = simulate(
        ADPSGD(topology=name), p, start=start, eta=0.0, schedule=RandomOrder(1), interleave_locks=True
    )
    np.testing.assert_allclose(simulation.run(300).x(), np.broadcast_to(start.mean(0), (p, 4)), rtol=0, atol=1e-8)


def test_workers_of_equal_curvature_converge_around_the_mean_of_their_minima():
    simulation = simulate(ADPSGD(), 5, start=np.zeros(1), eta=0.01, gradient=slope(0.8, B)).run(3000)
    # The mean moves by the mean of h*(y_i - b_i), and a copy y_i is behind x_i by no more than a step's averagings.
    assert simulation.consensus()[0] == pytest.approx(B[:5].mean(), abs=0.05)
    assert np.ptp(simulation.x()) < 0.3


@settings(max_examples=20)
@given(st.sampled_from(TOPOLOGIES), st.integers(2, 6), st.integers(0, 2**16))
def test_neighbours_are_those_of_the_graph_and_equally_frequent(name, p, seed):
    method, steps = ADPSGD(topology=name), 400
    graph = method.graph(p)
    simulation = simulate(method, p, start=np.zeros(1), eta=0.1, seed=seed)
    drawn = [[] for _ in range(p)]
    for worker, peers in zip(simulation.workers, drawn, strict=True):
        worker.average_with = peers.append
    simulation.run(steps)
    for i, peers in enumerate(drawn):
        neighbours = {j for t in range(graph.period) for j in (*graph.out_neighbours(i, t), *graph.in_neighbours(i, t))}
        counts = np.bincount(peers, minlength=p)
        assert set(peers) == neighbours
        q = 1 / len(neighbours)
        np.testing.assert_allclose(counts[list(neighbours)], steps * q, atol=6 * np.sqrt(steps * q * (1 - q)) + 1e-9)


def test_the_lock_of_the_lower_rank_is_acquired_first():
    simulation = simulate(COMPLETE, 4, start=np.zeros(2), eta=0.0)
    for i, j in itertools.permutations(range(4), 2):
        worker, taken = simulation.workers[i], []
        blocks = worker._boxes._blocks
        acquire = blocks.acquire
        blocks.acquire = lambda index, *_, acquire=acquire, taken=taken, **__: [taken.append(index), acquire(index)][1]
        worker.average_with(j)
        blocks.acquire = acquire
        assert taken == sorted((i, j))


@pytest.mark.parametrize("p", [2, 4, 5])
def test_staleness_is_bounded_by_the_averagings_of_a_round(p):
    seen = []
    simulation = simulate(COMPLETE, p, start=np.arange(p * 1.0)[:, None], eta=0.1)
    simulation.run(50, lambda simulation, rank: seen.append(simulation.workers[rank].metrics()["staleness"]))
    # In turn, each of the others averages once between two steps of a worker.
    assert 1 <= max(seen) <= p - 1
    assert np.mean(seen) == pytest.approx(1, abs=0.1)  # one averaging a step and worker


def test_no_worker_waits():
    x = simulate(COMPLETE, 3, start=np.ones((3, 2)), eta=0.1, schedule=Scripted([0] * 30 + [1] * 3), seed=2).run(99)
    assert [worker.t for worker in x.workers] == [30, 3, 0]


@settings(max_examples=20)
@given(st.integers(1, 5), st.integers(0, 40), st.integers(0, 2**16))
def test_state_reproduces_a_run_interrupted_anywhere(p, length, seed):
    start = np.random.default_rng(seed).normal(size=(p, 4))
    script = np.random.default_rng(seed).integers(p, size=length).tolist()
    arguments = {"eta": 0.1, "gradient": slope(H, B)}
    whole = simulate(COMPLETE, p, start=start, schedule=Scripted(script), seed=seed, **arguments).run(99)
    saved = states(whole)
    resumed = load(simulate(COMPLETE, p, start=np.zeros(4), **arguments), saved)
    whole.world.schedule = RoundRobin()
    assert same_bits(whole.run(6).x(), resumed.run(6).x())
    assert same_bits(positions(states(whole)), positions(states(resumed)))
    assert [w.metrics() for w in whole.workers] == [w.metrics() for w in resumed.workers]


def test_nonfinite_values_reach_no_other_worker_and_are_dropped():
    def gradient(rank, x):
        g = x.copy()
        if rank == 1:
            g[2] = np.nan
        return g

    simulation = simulate(COMPLETE, 4, start=np.ones(5), eta=0.1, gradient=gradient).run(20)
    assert np.isfinite(simulation.x()).all()
    assert statistics(simulation, "n_nonfinite") == [0, 20, 0, 0]


def test_an_averaging_is_one_vector_each_way():
    simulation = simulate(COMPLETE, 3, start=np.zeros((3, 10)), eta=0.1).run(7)
    assert statistics(simulation, "n_exchanges") == [7] * 3
    assert statistics(simulation, "bytes_sent") == [7 * 2 * 80] * 3


@pytest.mark.ranks(2, 5)
@pytest.mark.parametrize("n_nodes", [1, 2])
@pytest.mark.parametrize("name", ["bipartite_exponential", "complete"])
def test_sum_is_conserved_between_ranks(world, n_nodes, name):
    start = np.random.default_rng(world.rank).normal(size=2000)
    with ranks(n_nodes) as comm:
        mine = RankRun(ADPSGD(topology=name), comm, start, seed=3)
        total = mine.sum(start)
        for _ in range(3):
            used = mine.run(10 + 5 * comm.rank, 0.1, slope(H, B))  # a different number of steps on each: nobody waits
            total = total - 0.1 * mine.sum(used)
            comm.barrier()
            np.testing.assert_allclose(positions(mine.states()).sum(0), total, rtol=0, atol=1e-11)
            out = np.zeros(2000)
            mine.worker.consensus(out)
            np.testing.assert_allclose(out, total / comm.size, rtol=0, atol=1e-11)
            comm.barrier()
