"""EASGD Tree (Zhang's thesis, arXiv 1605.02216, chapter 6): its shape, its messages, its hull."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.on_ranks import RankRun, ranks
from support.quadratic import assert_states_equal, load, same_bits, simulate, slope, states, statistics

from mpitrain.algorithms import EASGD, EASGDTree
from mpitrain.algorithms.elastic.easgd_tree import Edge, branch, levels, most_children
from mpitrain.simulation.schedules import RandomOrder, RoundRobin, Scripted, VirtualTime

ALL = pytest.mark.ranks(5)
H, B = [0.5, 1.0, 2.0, 4.0, 0.3], [1.0, -2.0, 0.5, 3.0, -1.0]
SCHEMES = ["multi-scale", "up-down"]

methods = st.builds(
    EASGDTree,
    degree=st.sampled_from([None, 2, 3]),
    scheme=st.sampled_from(SCHEMES),
    period=st.integers(1, 3),
    slow_period=st.integers(1, 4),
    moving_rate=st.floats(0, 1),
    grad_point=st.sampled_from(["pre", "post"]),
)


def branches(p, degree, nodes=None):
    groups = levels(p, degree, nodes or [0] * p)
    return [branch(rank, groups) for rank in range(p)]


def inner_nodes(simulation):
    """Return the vectors of all inner nodes; each is in the state of one worker."""
    return [state[name] for state in states(simulation) for name in state if name.startswith("center")]


def everything(simulation):
    """Return the vectors of leaves and inner nodes (number, n)."""
    return np.vstack([simulation.x(), *inner_nodes(simulation)])


# ---- the shape --------------------------------------------------------------------------------------------------


def test_trees_of_some_sizes():
    everybody = (0, 1, 2, 3, 4)
    left = [(0, 1), (0, 1, 2, 3), everybody]
    right = [(2, 3), (0, 1, 2, 3), everybody]
    assert branches(5, 2) == [[(0,), *left], [(1,), *left], [(2,), *right], [(3,), *right], [(4,), everybody]]
    assert branches(5, 4) == [[(i,), (0, 1, 2, 3), everybody] for i in range(4)] + [[(4,), everybody]]
    assert branches(5, 9) == branches(5, None) == [[(i,), everybody] for i in range(5)]
    assert branches(1, None) == branches(1, 2) == [[(0,), (0,)]]


def test_trees_of_machines():
    everybody = (0, 1, 2, 3, 4)
    machines = [[(i,), (0, 1, 2), everybody] for i in range(3)] + [[(i,), (3, 4), everybody] for i in (3, 4)]
    assert branches(5, None, [0, 0, 0, 1, 1]) == machines
    # The order of the ranks does not matter; a machine of one worker needs no node, nor do as many machines as workers.
    assert branches(3, None, [0, 1, 0])[0] == [(0,), (0, 2), (0, 1, 2)]
    assert branches(3, None, [0, 1, 0])[1] == [(1,), (0, 1, 2)]
    assert branches(3, None, [0, 1, 2]) == branches(3, None, [0, 0, 0]) == branches(3, 3)


@given(st.integers(1, 40), st.integers(2, 7), st.booleans(), st.data())
def test_every_tree_is_a_tree(p, degree, by_machine, data):
    nodes = data.draw(st.lists(st.integers(0, 5), min_size=p, max_size=p))
    found = branches(p, None if by_machine else degree, nodes)
    children = {}
    for rank, one in enumerate(found):
        assert one[0] == (rank,)
        assert one[-1] == tuple(range(p))
        for lower, upper in pairwise(one):
            children.setdefault(upper, set()).add(lower)
    for members, below in children.items():
        assert sorted(rank for child in below for rank in child) == list(members)  # each worker is below one of them
        assert len(below) > 1 or p == 1
        assert by_machine or len(below) <= degree
    assert most_children(found) == max(len(below) for below in children.values())


def test_moving_rate_comes_from_the_largest_number_of_children():
    for found, d in ((branches(5, 2), 2), (branches(4, None), 4), (branches(5, None, [0, 0, 0, 1, 1]), 3)):
        assert EASGDTree().alpha(found) == pytest.approx(0.9 / (d + 1))
        assert EASGDTree(moving_rate=0.25).alpha(found) == 0.25


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 5))
def test_exactly_one_of_the_workers_below_a_node_carries_each_message(n_turns, up, down):
    edges = [Edge(None, None, turn, n_turns, (up, down)) for turn in range(n_turns)]
    for t in range(60):
        due = [edge.due(t) for edge in edges]
        assert sum(goes_up for goes_up, _ in due) == (t % up == 0)
        assert sum(goes_down for _, goes_down in due) == (t % down == 0)
    # And each as often as the others.
    assert {sum(edge.due(t)[0] for t in range(3 * n_turns * up)) for edge in edges} == {3}


# ---- the messages -----------------------------------------------------------------------------------------------


def message_passing(script, x, found, alpha, periods, eta, h, b, grad_point):
    """Send the tree's messages, one worker's step per entry of the script; ``periods(of_leaf)`` is tau up and down.

    A node is identified by the ranks below it; it starts with the parameters of the first.
    """
    x = x.copy()
    value = {members: x[members[0]].copy() for one in found for members in one[1:]}
    t = np.zeros(len(x), int)

    def serve(i, now):
        for position, (lower, upper) in enumerate(pairwise(found[i])):
            m, k = (1, 0) if position == 0 else (len(lower), lower.index(i))
            up, down = ((now // tau) % m == k and now % tau == 0 for tau in periods(position == 0))
            low, high = (x[i] if position == 0 else value[lower]).copy(), value[upper].copy()
            if up:
                value[upper] = high + alpha * (low - high)
            if down and position == 0:
                x[i] = low + alpha * (high - low)
            elif down:
                value[lower] = low + alpha * (high - low)

    for i in script:
        g = h[i] * (x[i] - b[i])
        if grad_point == "pre":
            serve(i, t[i])
        x[i] = x[i] - eta * g
        t[i] += 1
        if grad_point == "post":
            serve(i, t[i])
    return x, value


@settings(max_examples=60)
@given(methods, st.sampled_from([(1, None), (3, None), (4, (0, 0, 1, 1)), (5, (0, 1, 1, 0, 1)), (5, None)]), st.data())
def test_any_order_of_events_follows_the_messages(method, shape, data):
    p, nodes = shape
    script = data.draw(st.lists(st.integers(0, p - 1), max_size=80))
    rng = np.random.default_rng(5)
    start, h, b = rng.normal(size=(p, 6)), rng.uniform(0.2, 2, p), rng.normal(size=p)
    found = branches(p, method.degree, list(nodes or [0] * p))
    simulation = simulate(
        method, p, start=start, eta=0.1, gradient=slope(h, b), schedule=Scripted(script), nodes=nodes, largest_shard=4
    ).run(10**6)
    fast, slow = method.period, method.slow_period

    def periods(of_leaf):
        return (fast, slow) if method.scheme == "up-down" else (fast, fast) if of_leaf else (slow, slow)

    x, value = message_passing(script, start, found, method.moving_rate, periods, 0.1, h, b, method.grad_point)
    np.testing.assert_allclose(simulation.x(), x, atol=1e-12)
    np.testing.assert_allclose(simulation.consensus(), value[tuple(range(p))], atol=1e-12)
    for rank, state in enumerate(states(simulation)):
        saved = {f"center_{k}" for k, members in enumerate(found[rank]) if k and members[0] == rank}
        assert saved == {name for name in state if name.startswith("center")}  # by one worker, each of them
        for name in saved:
            np.testing.assert_allclose(state[name], value[found[rank][int(name[-1])]], atol=1e-12)


@settings(max_examples=40)
@given(
    st.integers(1, 5),
    st.floats(0, 0.9),
    st.integers(1, 3),
    st.sampled_from(["pre", "post"]),
    st.sampled_from(SCHEMES),
    st.integers(0, 2**16),
)
def test_one_level_with_one_period_is_asynchronous_easgd(p, alpha, tau, grad_point, scheme, seed):
    start = np.random.default_rng(seed).normal(size=(p, 30))
    tree = EASGDTree(degree=5, scheme=scheme, period=tau, slow_period=tau, moving_rate=alpha, grad_point=grad_point)
    ends = [
        simulate(
            method, p, start=start, eta=0.1, gradient=slope(np.linspace(0.5, 2, p)), schedule=RandomOrder(seed),
            interleave_locks=True, largest_shard=8,
        ).run(9)
        for method in (tree, EASGD(moving_rate=alpha, period=tau, grad_point=grad_point))
    ]  # fmt: skip
    assert same_bits(ends[0].x(), ends[1].x())
    assert same_bits(ends[0].consensus(), ends[1].consensus())
    assert statistics(ends[0], "bytes_sent") == statistics(ends[1], "bytes_sent")


# ---- hull, range, consensus -------------------------------------------------------------------------------------


@settings(max_examples=80)
@given(methods, st.integers(1, 7), st.integers(1, 30), st.integers(1, 40), st.data())
def test_no_node_ever_leaves_the_hull(method, p, n, largest_shard, data):
    # Also where others interfere between reading a node and delivering what was read, in the middle of anything.
    script = data.draw(st.lists(st.integers(0, p - 1), max_size=200))
    nodes = data.draw(st.lists(st.integers(0, 2), min_size=p, max_size=p))
    start = np.random.default_rng(n).normal(size=(p, n))
    simulation = simulate(
        method, p, start=start, eta=0.0, schedule=Scripted(script), interleave_locks=True,
        largest_shard=largest_shard, nodes=nodes,
    ).run(10**6)  # fmt: skip
    values = everything(simulation)
    assert (values >= start.min(0) - 1e-14).all()
    assert (values <= start.max(0) + 1e-14).all()


@settings(max_examples=40)
@given(methods, st.integers(1, 7), st.integers(0, 2**16))
def test_the_range_of_all_nodes_never_grows(method, p, seed):
    start = np.random.default_rng(seed).normal(size=(p, 5))
    last = np.ptp(start, axis=0)

    def look(simulation, rank):
        nonlocal last
        width = np.ptp(everything(simulation), axis=0)
        assert (width <= last + 1e-14).all()
        last = width

    simulate(method, p, start=start, eta=0.0, schedule=RandomOrder(seed)).run(12, look)


@settings(max_examples=40)
@given(methods, st.integers(1, 7), st.integers(0, 2**16))
def test_consensus_stays_consensus_to_the_bit(method, p, seed):
    start = np.random.default_rng(seed).normal(size=9).astype(np.float32)
    simulation = simulate(
        method, p, start=start, eta=0.0, schedule=RandomOrder(seed), interleave_locks=True, largest_shard=4
    ).run(15)
    assert all(same_bits(row, start) for row in everything(simulation))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("p", "degree", "nodes"), [(7, 2, None), (9, 3, None), (5, None, [0, 0, 1, 2, 1])])
def test_all_nodes_converge_to_one_value(scheme, p, degree, nodes):
    start = np.random.default_rng(p).normal(size=(p, 4))
    method = EASGDTree(degree=degree, scheme=scheme, period=1, slow_period=2, moving_rate=0.6)
    simulation = simulate(
        method, p, start=start, eta=0.0, schedule=RandomOrder(1), nodes=nodes, interleave_locks=True
    ).run(2000)
    # What a worker had when it made its last step it keeps, while the slower ones go on.
    assert np.ptp(everything(simulation), axis=0).max() < 1e-5


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("degree", [None, 2, 3])
def test_the_root_comes_to_rest_at_the_minimum(scheme, degree):
    method = EASGDTree(degree=degree, scheme=scheme, period=2, slow_period=4)
    simulation = simulate(
        method, 6, start=np.zeros(5), eta=0.1, gradient=slope(1.0, 0.7), nodes=[0, 0, 1, 1, 1, 2],
        schedule=VirtualTime([1, 1, 1, 2, 5, 1]),
    ).run(600)  # fmt: skip
    np.testing.assert_allclose(everything(simulation), 0.7, atol=1e-3)


def test_uninterrupted_exchanges_keep_the_sum_of_all_nodes():
    # Both directions of a connection at once, whole steps: what one end gains the other gives.
    start = np.random.default_rng(2).normal(size=(7, 6))
    for degree in (None, 2, 3):
        method = EASGDTree(degree=degree, period=1, slow_period=2, moving_rate=0.3)
        simulation = simulate(method, 7, start=start, eta=0.0, schedule=RandomOrder(3), nodes=[0, 0, 0, 1, 1, 2, 2])
        before = everything(simulation).sum(0)
        np.testing.assert_allclose(everything(simulation.run(20)).sum(0), before, atol=1e-13)


# ---- who carries, who counts, who saves -------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "messages"), [("multi-scale", 8 * 32 + 6 * 16), ("up-down", 14 * 16 + 14 * 8)])
def test_bytes_are_those_of_the_messages(scheme, messages):
    # 8 leaves, 4 + 2 inner nodes below the root; 32 steps. Each message is one vector, whoever carries it.
    method = EASGDTree(degree=2, scheme=scheme, period=2, slow_period=4)
    simulation = simulate(method, 8, start=np.ones(10), eta=0.1).run(32)
    assert sum(statistics(simulation, "bytes_sent")) == messages * 80


def test_the_root_hears_of_d_nodes_and_not_of_p_workers():
    method = EASGDTree(degree=4, period=1, slow_period=1)
    simulation = simulate(method, 16, start=np.ones(10), eta=0.1).run(16)
    star = simulate(EASGDTree(degree=16, period=1, slow_period=1), 16, start=np.ones(10), eta=0.1).run(16)
    at_leaves = 2 * 16 * 16 * 80
    assert sum(statistics(star, "bytes_sent")) == at_leaves
    assert sum(statistics(simulation, "bytes_sent")) == at_leaves + 2 * 4 * 16 * 80


def test_no_worker_waits_for_one_that_has_stopped():
    method = EASGDTree(degree=2, period=1, slow_period=1, moving_rate=0.5)
    start = np.array([[0.0], [1.0], [2.0], [3.0]])
    simulation = simulate(method, 4, start=start, eta=0.0, schedule=Scripted([3] * 40)).run(10**6)
    assert [worker.t for worker in simulation.workers] == [0, 0, 0, 40]
    # Its own node, which began as worker 2, and the root, which began as worker 0: its turns alone bring them together.
    assert simulation.x()[:3, 0].tolist() == [0, 1, 2]
    assert simulation.x()[3, 0] == pytest.approx(simulation.consensus()[0], abs=1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_nonfinite_values_stay_with_their_worker(scheme, bad):
    def gradient(rank, x):
        g = x.copy()
        if rank == 1:
            g[2] = bad
        return g

    method = EASGDTree(degree=2, scheme=scheme, period=1, slow_period=2)
    simulation = simulate(method, 5, start=np.ones(5), eta=0.1, gradient=gradient).run(10)
    assert np.isfinite(inner_nodes(simulation)).all()
    assert np.isfinite(simulation.x()[[0, 2, 3, 4]]).all()
    assert simulation.consensus()[2] < 0.9  # the others go on
    assert statistics(simulation, "n_nonfinite") == [0, 5, 0, 0, 0]  # in every other step it has recovered


def test_a_node_missing_from_the_checkpoint_starts_from_the_parameters():
    method, start = EASGDTree(degree=2, period=1, slow_period=2), np.arange(15.0).reshape(5, 3)
    saved = states(simulate(method, 5, start=start, eta=0.1, gradient=slope(1.0)).run(6))
    saved[2] = saved[3] = saved[4]  # ranks 2 and 3 had died, and with them all below their node
    resumed = simulate(method, 5, start=start, eta=0.1, gradient=slope(1.0))
    load(resumed, saved)
    resumed.run(20)
    assert np.abs(resumed.x()).max() < np.abs(start).max()
    assert np.isfinite(inner_nodes(resumed)).all()


@settings(max_examples=40)
@given(methods, st.integers(1, 6), st.integers(0, 9), st.integers(1, 9))
def test_state_reproduces_the_rest_of_the_run(method, p, before, after):
    def make(start):
        return simulate(
            method, p, start=start, eta=0.1, gradient=slope(1.0, 0.3), nodes=[0, 0, 1, 1, 2, 2][:p], largest_shard=8
        )

    whole = make(np.random.default_rng(p).normal(size=(p, 20))).run(before)
    saved = states(whole)
    whole.run(after)
    resumed = load(make(np.zeros(20)), saved).run(after)
    for a, b in zip(states(resumed), states(whole)):
        assert_states_equal(a, b)


def test_consensus_is_the_root_for_every_worker():
    method = EASGDTree(degree=2, period=1, slow_period=2)
    simulation = simulate(
        method, 5, start=np.random.default_rng(4).normal(size=(5, 6)), eta=0.1, schedule=RoundRobin()
    ).run(7)
    root = states(simulation)[0]["center_3"]
    assert all(same_bits(simulation.consensus(rank), root) for rank in range(5))


# ---- between ranks ----------------------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize(
    ("scheme", "degree", "n_nodes"),
    [(SCHEMES[0], None, 1), (SCHEMES[1], 2, 1), (SCHEMES[0], 2, 2), (SCHEMES[1], None, 2)],
)
def test_ranks_stay_in_the_hull_and_converge_to_one_value(scheme, degree, n_nodes):
    method = EASGDTree(degree=degree, scheme=scheme, period=1, slow_period=2)
    with ranks(n_nodes) as comm:
        start = np.random.default_rng(comm.rank).normal(size=1500)
        everyones = np.stack(comm.world.comm.allgather(start))
        low, high = everyones.min(0), everyones.max(0)
        run = RankRun(method, comm, start)

        def width():
            """Return the range of all nodes while all workers rest."""
            comm.barrier()
            found = run.states()
            values = np.stack(
                [state[name] for state in found for name in state if name == "parameters" or name.startswith("center")]
            )
            assert (values >= low - 1e-13).all()
            assert (values <= high + 1e-13).all()
            found_nodes = {members for one in branches(comm.size, degree, comm.nodes) for members in one[1:]}
            assert len(values) == comm.size + len(found_nodes)
            comm.barrier()
            return np.ptp(values, axis=0)

        first = width()
        run.run(8 + 3 * comm.rank, 0.0, slope())  # a different number of steps on each
        second = width()
        assert (second <= first + 1e-13).all()
        for _ in range(80):  # a rank alone would not bring the others together
            run.run(8, 0.0, slope())
            comm.barrier()
        assert (width() <= first / 20).all()


@ALL
@pytest.mark.parametrize("n_nodes", [1, 2])
def test_ranks_find_the_minimum_at_the_root(n_nodes):
    with ranks(n_nodes) as comm:
        run, out = RankRun(EASGDTree(period=2, slow_period=4), comm, np.zeros(700)), np.zeros(700)
        for _ in range(10):  # a rank that ran alone would leave the others far behind
            run.run(60, 0.1, slope(1.0, 0.7))
            run.worker.consensus(out)  # alone, while others may be at work
            comm.barrier()
        run.worker.consensus(out)
        np.testing.assert_allclose(out, 0.7, atol=1e-6)


@ALL
@pytest.mark.parametrize("n_nodes", [1, 2])
def test_ranks_continue_from_their_checkpoint(n_nodes):
    method = EASGDTree(degree=2, period=1, slow_period=2)
    with ranks(n_nodes) as comm:
        first = RankRun(method, comm, np.random.default_rng(5).normal(size=900))
        first.run(11, 0.1, slope(H, B))
        comm.barrier()
        saved = first.states()
        second = RankRun.resumed(method, comm, saved[comm.rank])
        for a, b in zip(second.states(), saved):
            assert_states_equal(a, b)
