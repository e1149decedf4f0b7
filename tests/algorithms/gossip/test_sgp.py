"""Stochastic gradient push (Assran et al., arXiv 1811.10792): the matrices of the paper, mass, flow control."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.on_ranks import RankRun, ranks
from support.quadratic import load, same_bits, simulate, slope, states, statistics

from mpitrain import kernels
from mpitrain.algorithms import StochasticGradientPush as SGP
from mpitrain.algorithms.base.replica import ParamGroupSlice
from mpitrain.algorithms.gossip.sgp import is_regular
from mpitrain.collectives.topology.graphs import Topology
from mpitrain.simulation.schedules import RandomOrder, RoundRobin

H, B = np.array([0.5, 1.0, 2.0, 0.8, 1.4, 0.3]), np.array([1.0, -2.0, 0.5, 3.0, 0.1, -0.7])
IRREGULAR = Topology("irregular", 4, (((1, 2, 3), (2,), (3,), (0,)),))


TOPOLOGIES = (
    "one_peer_exponential", "two_peer_exponential", "exponential", "ring", "directed_ring", "grid", "complete"
)  # fmt: skip
ON_IRREGULAR = SGP(topology=IRREGULAR)


def random_digraph(p, seed):
    """Return two steps of random edges added to a circle: degrees differ, and the graph is strongly connected."""
    rng = np.random.default_rng(seed)
    steps = []
    for _ in range(2):
        edges = rng.random((p, p)) < 0.4
        edges[np.arange(p), (np.arange(p) + 1) % p] = True
        steps.append(tuple(tuple(j for j in range(p) if edges[i, j] and j != i) for i in range(p)))
    return Topology("random", p, tuple(steps))


def shares(graph, t):
    """Return P[j, i] = 1/(1 + number of i's out-neighbours) if i sends to j at step t, or is j."""
    matrix = np.zeros((graph.size, graph.size))
    for i in range(graph.size):
        receivers = [i, *graph.out_neighbours(i, t)]
        matrix[receivers, i] = 1 / len(receivers)
    return matrix


def reference(graph, x, gradient, eta, steps, decay=0.0, delta=0.0):
    """Run the paper's recursion from x (p, n), with torch's momentum on the numerator; return (z, w)."""
    p = len(x)
    w, v = np.ones(p), np.zeros_like(x)
    for t in range(steps):
        z = x / w[:, None]
        v = delta * v + np.stack([gradient(i, z[i]) for i in range(p)]) + decay * x
        x = shares(graph, t) @ (x - eta * v)
        w = shares(graph, t) @ w
    return x / w[:, None], w


def weights(simulation):
    return np.array([worker.metrics()["push_weight"] for worker in simulation.workers])


def on_its_way(everyones, overlap):
    """Return (weight, vector) of each unread message; all workers have made the same number of steps."""
    for state in everyones:
        for step, sender in json.loads(state["due"]):
            sent, t = everyones[sender], everyones[sender]["t"]
            assert t - overlap <= step < t
            tags = sent["message_tags"][step % (overlap + 2)]
            assert tags[0] == step + 1
            yield tags[1], sent["messages"][step - (t - overlap)]


def mass(everyones, overlap=0):
    """Return sum w_i and sum w_i z_i, with the messages under way."""
    held = [(state["push_weight"], state["parameters"]) for state in everyones]
    total_weight, total = 0.0, np.zeros(everyones[0]["parameters"].size)
    for w, z in [*held, *on_its_way(everyones, overlap)]:
        total_weight += w
        total += w * z
    return total_weight, total


class Favour(RoundRobin):
    """A schedule that always runs the first ready worker of an order."""

    def __init__(self, order):
        self.order = order

    def choose(self, ready):
        return min(ready, key=self.order.index)


# ---- the recursion ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_workers_follow_the_papers_recursion(name, p):
    method, start = SGP(topology=name), np.random.default_rng(p).normal(size=(p, 5))
    simulation = simulate(method, p, start=start, eta=0.1, gradient=slope(H, B), decay=0.02).run(13)
    z, w = reference(method.graph(p), start, slope(H, B), 0.1, 13, decay=0.02)
    np.testing.assert_allclose(simulation.x(), z, rtol=0, atol=1e-12)
    np.testing.assert_allclose(weights(simulation), w, rtol=0, atol=1e-12)


@settings(max_examples=40)
@given(st.integers(2, 6), st.integers(0, 2**16), st.integers(1, 9))
def test_any_digraph_and_any_schedule_give_the_papers_recursion(p, seed, steps):
    graph = random_digraph(p, seed)
    start = np.random.default_rng(seed).normal(size=(p, 3))
    run = lambda schedule: simulate(  # noqa: E731
        SGP(topology=graph),
        p,
        start=start,
        eta=0.1,
        gradient=slope(H, B),
        schedule=schedule,
        interleave_locks=True,
    ).run(steps)
    simulation = run(RandomOrder(seed))
    z, w = reference(graph, start, slope(H, B), 0.1, steps)
    np.testing.assert_allclose(simulation.x(), z, rtol=0, atol=1e-12)
    np.testing.assert_allclose(weights(simulation), w, rtol=0, atol=1e-12)
    order = [int(rank) for rank in np.random.default_rng(seed).permutation(p)]
    assert same_bits(simulation.x(), run(Favour(order)).x())


def test_momentum_and_decay_act_on_the_numerator():
    eta, delta, decay, steps = 0.1, 0.9, 0.05, 12
    start = np.random.default_rng(0).normal(size=(4, 3))
    simulation = simulate(ON_IRREGULAR, 4, start=start, eta=eta)
    gradient, v = slope(H, B), np.zeros((4, 3))

    def program(comm):
        worker = simulation.workers[comm.rank]
        x, g = worker.x.local, worker.g.local
        update = lambda: kernels.torch_momentum_step(x, v[comm.rank], g, eta, delta, decay)  # noqa: E731
        for _ in range(steps):
            g[...] = gradient(comm.rank, x)
            worker.step([ParamGroupSlice(slice(0, 3), eta)], update)
            comm.end_step()

    simulation.world.run(program)
    z, w = reference(IRREGULAR, start, gradient, eta, steps, decay, delta)
    assert np.abs(w - 1).max() > 0.2
    np.testing.assert_allclose(simulation.x(), z, rtol=0, atol=1e-12)


# ---- averaging -------------------------------------------------------------------------------------------------------


def test_irregular_digraph_agrees_on_the_mean_and_its_numerators_do_not():
    simulation = simulate(ON_IRREGULAR, 4, start=[[4.0], [0.0], [0.0], [0.0]], eta=0.0).run(200)
    np.testing.assert_allclose(simulation.x()[:, 0], [1, 1, 1, 1], atol=1e-10)
    np.testing.assert_allclose(weights(simulation) * simulation.x()[:, 0], [1, 0.5, 1, 1.5], atol=1e-10)


@pytest.mark.parametrize(
    ("name", "p", "steps", "error"),
    [
        *(("one_peer_exponential", 2**k, k, 0.0) for k in (1, 2, 3, 4)),
        ("one_peer_exponential", 12, 4, 0.0416666667),
        ("one_peer_exponential", 6, 3, 0.0833333333),
        ("two_peer_exponential", 3, 1, 0.0),
        ("two_peer_exponential", 9, 2, 0.0),
        ("two_peer_exponential", 27, 3, 0.0),
    ],
)
def test_exponential_graphs_average_exactly_after_a_period(name, p, steps, error):
    simulation = simulate(SGP(topology=name), p, start=np.eye(p), eta=0.0).run(steps)
    assert np.abs(simulation.x() - 1 / p).max() == pytest.approx(error, abs=1e-10)


def test_workers_of_equal_curvature_converge_to_the_mean_of_their_minima():
    b, spread = B[:5, None] * np.ones(2), []
    for eta in (0.02, 0.01):
        simulation = simulate(SGP(), 5, start=np.zeros(2), eta=eta, gradient=slope(0.8, b))
        simulation.run(2400)  # a multiple of the period of the graph
        np.testing.assert_allclose(simulation.x().mean(0), b.mean(0), rtol=0, atol=1e-6)
        np.testing.assert_allclose(simulation.consensus(), b.mean(0), rtol=0, atol=1e-6)
        spread.append(np.ptp(simulation.x(), axis=0).max())
    assert spread[0] / spread[1] == pytest.approx(2, rel=0.05)  # O(eta)


@pytest.mark.parametrize("p", [2, 3, 6, 7])
@pytest.mark.parametrize("name", [name for name in TOPOLOGIES if name != "grid"])
def test_weights_stay_one_exactly_on_regular_graphs(name, p):
    simulation = simulate(SGP(topology=name), p, start=np.ones(2), eta=0.1)
    for _ in range(10):
        assert weights(simulation.run(1)).tolist() == [1.0] * p


def test_consensus_is_the_mean_of_the_numerators():
    start = np.random.default_rng(2).normal(size=(4, 3))
    simulation = simulate(ON_IRREGULAR, 4, start=start, eta=0.0)
    for _ in range(5):
        np.testing.assert_allclose(simulation.consensus(2), start.mean(0), rtol=0, atol=1e-14)
        simulation.run(1)
    assert np.abs(simulation.x().mean(0) - start.mean(0)).max() > 0.01
    simulation.workers[1].x.local[:] = 5.0
    z, w = simulation.x(), weights(simulation)
    np.testing.assert_allclose(simulation.consensus(3), w @ z / 4, rtol=0, atol=1e-14)


def test_a_graph_is_regular_if_all_degrees_are_equal_at_every_step():
    assert not is_regular(IRREGULAR)
    assert not is_regular(SGP(topology="grid").graph(6))
    assert not is_regular(Topology("in", 3, (((1,), (2,), (1,)),)))  # all send to one, not all hear from one
    assert is_regular(Topology("swap", 2, (((1,), (0,)), ((), ()))))


# ---- mass ------------------------------------------------------------------------------------------------------------


@settings(max_examples=80)
@given(
    st.sampled_from(TOPOLOGIES), st.integers(1, 6), st.integers(0, 3), st.integers(0, 2**16), st.sampled_from([0, 0.1])
)
def test_mass_is_conserved_with_the_messages_under_way(name, p, overlap, seed, eta):
    start, pulled = np.random.default_rng(seed).normal(size=(p, 4)), np.zeros(4)

    def gradient(rank, z):
        nonlocal pulled
        g = slope(H, B)(rank, z)
        pulled = pulled + g
        return g

    simulation = simulate(
        SGP(topology=name, overlap=overlap),
        p,
        start=start,
        eta=eta,
        gradient=gradient,
        schedule=RandomOrder(seed),
        interleave_locks=True,
    )
    for _ in range(5):
        total_weight, total = mass(states(simulation.run(2)), overlap)
        assert total_weight == pytest.approx(p, abs=1e-12)
        np.testing.assert_allclose(total, start.sum(0) - eta * pulled, rtol=0, atol=1e-11)


@settings(max_examples=15)
@given(st.integers(2, 6), st.integers(1, 3), st.integers(0, 2**16))
def test_late_mass_is_debiased(p, overlap, seed):
    start = np.random.default_rng(seed).normal(size=(p, 3))
    method, schedule = SGP(topology=random_digraph(p, seed), overlap=overlap), RandomOrder(seed)
    simulation = simulate(method, p, start=start, eta=0.0, schedule=schedule, interleave_locks=True)
    low, high = start.min(0) - 1e-12, start.max(0) + 1e-12
    for _ in range(10):
        z = simulation.run(30).x()
        assert ((low <= z) & (z <= high)).all()
    np.testing.assert_allclose(z, np.broadcast_to(start.mean(0), z.shape), rtol=0, atol=1e-6)


def test_a_checkpoint_holds_the_messages_under_way():
    p, overlap, found = 5, 2, 0
    for seed in range(6):
        method, start = SGP(overlap=overlap), np.random.default_rng(seed).normal(size=(p, 4))
        whole = simulate(method, p, start=start, eta=0.0, schedule=RandomOrder(seed), interleave_locks=True)
        saved = states(whole.run(7))
        found += len(list(on_its_way(saved, overlap)))
        resumed = simulate(method, p, start=np.zeros((p, 4)), eta=0.0, interleave_locks=True)
        load(resumed, saved)
        np.testing.assert_allclose(mass(states(resumed), overlap)[1], start.sum(0), rtol=0, atol=1e-12)
        whole.world.schedule = RoundRobin()
        for simulation in (whole, resumed):
            simulation.run(40)
        assert same_bits(whole.x(), resumed.x())
        np.testing.assert_allclose(resumed.x(), np.broadcast_to(start.mean(0), (p, 4)), rtol=0, atol=1e-4)
    assert found > 5


@pytest.mark.parametrize("overlap", [0, 2])
def test_nan_of_a_peer_does_not_spread(overlap):
    def gradient(rank, z):
        g = z.copy()
        if rank == 1:
            g[2] = np.nan
        return g

    method = SGP(topology=IRREGULAR, overlap=overlap)
    simulation = simulate(method, 4, start=np.ones(5), eta=0.1, gradient=gradient).run(20)
    assert np.isfinite(np.delete(simulation.x(), 1, axis=0)).all()
    assert sum(statistics(simulation, "n_nonfinite")) > 0
    others = np.delete(simulation.x(), 1, axis=0)[:, [0, 2]]  # beside the element without worker 1, one with it
    assert ((others > 0) & (others < 1)).all()


# ---- who waits for whom ----------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.sampled_from([*TOPOLOGIES, "random"]), st.integers(1, 7), st.integers(0, 3), st.integers(0, 2**16))
def test_no_worker_waits_forever_or_runs_ahead(name, p, overlap, seed):
    rng = np.random.default_rng(seed)
    method = SGP(topology=random_digraph(p, seed), overlap=overlap) if name == "random" else SGP(name, overlap)
    graph = method.graph(p)
    order = [int(rank) for rank in rng.permutation(p)]
    schedule = Favour(order) if seed % 2 else RandomOrder(seed)
    simulation = simulate(method, p, start=np.zeros(2), eta=0.1, schedule=schedule, interleave_locks=True)

    def look(simulation, rank):
        clocks = [worker.t for worker in simulation.workers]
        last = clocks[rank] - 1  # the step just made
        for sender in graph.in_neighbours(rank, last - overlap) if last >= overlap else ():
            assert clocks[sender] >= last - overlap  # has posted in that step, at least
        for receiver in graph.out_neighbours(rank, last - overlap - 2) if last >= overlap + 2 else ():
            assert clocks[receiver] > last - overlap - 2  # has left the step whose message was overwritten
        assert max(clocks) - min(clocks) <= (overlap + 2) * p

    simulation.run(12, look)
    assert [worker.t for worker in simulation.workers] == [12] * p


@pytest.mark.parametrize("overlap", [0, 1, 2, 5])
def test_a_worker_continues_for_as_many_steps_as_messages_may_be_late(overlap):
    simulation = simulate(SGP(overlap=overlap), 2, start=np.zeros(1), eta=0.1, schedule=Favour([0, 1]))
    clocks = []

    def program(comm):
        for _ in range(20):
            if comm.rank == 1:
                clocks.append(simulation.workers[0].t)
            simulation.workers[comm.rank].step([ParamGroupSlice(slice(0, 1), 0.1)], lambda: 0)
            comm.end_step()

    simulation.world.run(program)
    assert clocks == [min(k + overlap, 20) for k in range(20)]


# ---- real ranks ------------------------------------------------------------------------------------------------------


@pytest.mark.ranks(2, 5)
@pytest.mark.parametrize("n_nodes", [1, 2])
@pytest.mark.parametrize("name", ["one_peer_exponential", "grid"])
def test_ranks_do_what_simulated_workers_do(world, n_nodes, name):
    p, steps = world.size, 25
    start = np.random.default_rng(1).normal(size=(p, 300))
    simulated = simulate(SGP(topology=name), p, start=start, eta=0.1, gradient=slope(H, B)).run(steps)
    with ranks(n_nodes) as comm:
        mine = RankRun(SGP(topology=name), comm, start[comm.rank])
        mine.run(steps, 0.1, slope(H, B))
        comm.barrier()
        assert same_bits(mine.worker.x.local.copy(), simulated.x()[comm.rank])
        out = np.zeros(300)
        mine.worker.consensus(out)
        assert same_bits(out, simulated.consensus(comm.rank))


@pytest.mark.ranks(2, 5)
@pytest.mark.parametrize("n_nodes", [1, 2])
@pytest.mark.parametrize("overlap", [0, 2])
def test_mass_is_conserved_between_ranks(world, n_nodes, overlap):
    start = np.random.default_rng(world.rank).normal(size=2000)
    with ranks(n_nodes) as comm:
        mine = RankRun(SGP(topology="grid", overlap=overlap), comm, start)
        total = mine.sum(start)
        for _ in range(4):
            total = total - 0.1 * mine.sum(mine.run(6, 0.1, slope(H, B)))
            comm.barrier()
            found_weight, found = mass(mine.states(), overlap)
            assert found_weight == pytest.approx(comm.size, abs=1e-12)
            np.testing.assert_allclose(found, total, rtol=0, atol=1e-11)
