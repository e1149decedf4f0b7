"""DOWNPOUR as run by Zhang, Choromanska, LeCun (arXiv 1412.6651), with the split periods of Dean et al. 2012."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.parameter_server import OnRank, bound, delayed, not_committed, whole_numbers
from support.quadratic import radius, same_bits, simulate, slope, statistics, sweep_matrix

from mpitrain.algorithms import AGN, EASGD, ADownpour, Downpour, MVADownpour, ZealousDownpour
from mpitrain.simulation.schedules import RandomOrder, Scripted, VirtualTime

periods = st.builds(Downpour, period=st.integers(1, 3), push_period=st.none() | st.integers(1, 3),
                    fetch_period=st.none() | st.integers(1, 3))  # fmt: skip


@pytest.mark.parametrize(
    ("p", "tau", "eh", "converges"),
    [
        *((1, 7, 0.05, True), (2, 40, 0.05, True), (3, 1, 0.05, True), (3, 40, 0.05, False)),
        *((10, 1, 0.05, True), (10, 5, 0.05, False), (4, 16, 0.05, False), (4, 64, 0.05, False)),
    ],
)
def test_round_robin_is_the_delayed_recursion(p, tau, eh, converges):
    found = radius(sweep_matrix(Downpour(period=tau), p, eh=eh, steps=tau))
    assert found == pytest.approx(radius(delayed(1 - (1 - eh) ** tau, p)) ** p, rel=1e-9)
    assert (found < 1) == converges
    # Elastic averaging bears what DOWNPOUR does not.
    assert radius(sweep_matrix(EASGD(period=tau), p, eh=eh, steps=tau)) < 1


BOUNDS = [(2, 1.0), (3, 0.6180340), (4, 0.4450419), (8, 0.2090569), (16, 0.1012983)]


@pytest.mark.parametrize(("p", "wanted"), BOUNDS)
@pytest.mark.parametrize("tau", [1, 4])
def test_bound_is_where_it_becomes_unstable(p, wanted, tau):
    assert bound(p) == pytest.approx(wanted, abs=5e-8)
    for q, stable in ((0.999 * wanted, True), (1.001 * wanted, False)):
        if q < 1:  # or no tau steps change so much
            eh = 1 - (1 - q) ** (1 / tau)
            assert (radius(sweep_matrix(Downpour(period=tau), p, eh=eh, steps=tau)) < 1) == stable


@given(st.floats(0.01, 0.99), st.integers(1, 6), st.integers(1, 5))
def test_stable_exactly_inside_the_bound(eh, tau, p):
    q = 1 - (1 - eh) ** tau
    if abs(q - bound(p)) > 1e-6:
        assert (radius(sweep_matrix(Downpour(period=tau), p, eh=eh, steps=tau)) < 1) == (q < bound(p))


@settings(max_examples=100)
@given(periods, st.integers(1, 5), st.integers(1, 50), st.integers(1, 40), st.data())
def test_center_contains_exactly_the_commits_at_any_moment(method, p, n, largest_shard, data):
    script = data.draw(st.lists(st.integers(0, p - 1), max_size=150))
    start, gradient, noted = whole_numbers(p, n, seed=n)
    simulation = simulate(
        method, p, start=start, eta=1.0, gradient=gradient, schedule=Scripted(script), interleave_locks=True,
        largest_shard=largest_shard,
    ).run(10**6)  # fmt: skip
    # The script ends perhaps in the middle of a visit: each element is committed or not, never both or neither.
    applied = sum((g for _, g in noted), np.zeros(n))
    assert np.array_equal(simulation.consensus() + not_committed(simulation), start - applied)


@settings(max_examples=60)
@given(periods, st.integers(1, 4), st.integers(1, 12), st.integers(0, 2**16))
def test_center_is_the_start_plus_all_complete_periods(method, p, steps, seed):
    start, gradient, noted = whole_numbers(p, 37, seed)
    simulation = simulate(
        method, p, start=start, eta=1.0, gradient=gradient, schedule=RandomOrder(seed), interleave_locks=True,
        largest_shard=8,
    ).run(steps)  # fmt: skip
    pushed = np.zeros(37)
    for rank in range(p):
        mine = [g for i, g in noted if i == rank]
        pushed += sum(mine[: steps - steps % method.n_push], np.zeros(37))
    assert np.array_equal(simulation.consensus(), start - pushed)


def literal(script, start, eta, n_push, n_fetch, h, b):
    """Run Dean's client loop, one worker's step per entry of the script; the gradient is h_i (x - b_i)."""
    x, v, c, t = np.tile(start, (3, 1)), np.zeros((3, start.size)), start.copy(), np.zeros(3, int)
    for i in script:
        d = -eta * h[i] * (x[i] - b[i])
        x[i], v[i], t[i] = x[i] + d, v[i] + d, t[i] + 1
        if t[i] % n_push == 0:
            c, v[i] = c + v[i], 0
        if t[i] % n_fetch == 0:
            x[i] = c
    return x, c


@given(periods, st.lists(st.integers(0, 2), max_size=60))
def test_any_order_of_events_follows_the_papers_loop(method, script):
    rng = np.random.default_rng(5)
    start, h, b = rng.normal(size=6), rng.uniform(0.2, 2, 3), rng.normal(size=3)
    simulation = simulate(method, 3, start=start, eta=0.1, gradient=slope(h, b), schedule=Scripted(script)).run(10**6)
    x, c = literal(script, start, 0.1, method.n_push, method.n_fetch, h, b)
    np.testing.assert_allclose(simulation.x(), x, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(simulation.consensus(), c, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("method", [Downpour(period=1), Downpour(period=5), Downpour(push_period=2, fetch_period=6)])
def test_one_worker_is_sgd(method):
    start = np.random.default_rng(4).normal(size=8)
    simulation = simulate(method, 1, start=start, eta=0.1, decay=0.01, gradient=slope(2.0)).run(30)
    np.testing.assert_allclose(simulation.x()[0], (1 - 0.1 * 2.01) ** 30 * start, rtol=1e-12)
    np.testing.assert_allclose(simulation.consensus(), simulation.x()[0], rtol=1e-15)


@given(periods, st.integers(1, 4), st.integers(0, 2**16))
def test_without_steps_nothing_moves(method, p, seed):
    start = np.random.default_rng(seed).normal(size=33)
    simulation = simulate(method, p, start=start, eta=0.0, schedule=RandomOrder(seed), interleave_locks=True).run(7)
    assert same_bits(simulation.x(), np.tile(start, (p, 1)))
    assert same_bits(simulation.consensus(), start)


def test_a_pull_sees_the_push_before_it():
    simulation = simulate(Downpour(), 3, start=np.ones(4), eta=0.1, schedule=RandomOrder(3))
    simulation.run(20, lambda s, rank: np.testing.assert_array_equal(s.workers[rank].x.local, s.consensus()))


def test_a_push_leaves_the_worker_and_a_fetch_the_center_alone():
    start, eta = np.full(3, 8.0), 0.5
    only_push = Downpour(push_period=1, fetch_period=100)
    simulation = simulate(only_push, 2, start=start, eta=eta, schedule=Scripted([0, 1, 0])).run(9)
    assert simulation.x()[:, 0].tolist() == [2.0, 4.0]
    assert simulation.consensus()[0] == 8 - 6 - 4
    only_fetch = Downpour(push_period=100, fetch_period=1)
    simulation = simulate(only_fetch, 2, start=start, eta=eta, schedule=Scripted([0, 1, 0])).run(9)
    assert simulation.x().tolist() == [[8.0] * 3] * 2
    assert simulation.consensus().tolist() == [8.0] * 3
    assert not_committed(simulation).tolist() == [-12.0] * 3  # two steps of worker 0, one of worker 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    "method", [Downpour(), Downpour(push_period=1, fetch_period=2), Downpour(push_period=2, fetch_period=1)]
)
def test_nonfinite_values_never_reach_the_center_and_leave_the_worker(method, bad):
    steps = [0, 0, 0]

    def gradient(rank, x):
        steps[rank] += 1
        g = x.copy()
        if rank == 1 and steps[1] in (2, 5):
            g[2] = bad
        return g

    simulation = simulate(method, 3, start=np.ones(5), eta=0.1, gradient=gradient).run(20)
    assert np.isfinite(simulation.consensus()).all()
    assert np.isfinite(simulation.x()).all()
    assert simulation.consensus()[2] < 0.9
    assert statistics(simulation, "n_nonfinite")[1] >= 2
    assert statistics(simulation, "n_nonfinite")[::2] == [0, 0]


def test_periods_are_counted_by_each_worker():
    method = Downpour(period=4, push_period=2, fetch_period=3)
    simulation = simulate(method, 2, start=np.ones(3), eta=0.1, schedule=VirtualTime([1, 2])).run(12)
    assert statistics(simulation, "n_exchanges") == [8, 8]  # at 2 3 4 6 8 9 10 12


def test_push_and_fetch_periods_default_to_the_period():
    assert (Downpour(period=7).n_push, Downpour(period=7).n_fetch) == (7, 7)
    assert (Downpour(period=7, push_period=2).n_push, Downpour(period=7, push_period=2).n_fetch) == (2, 7)


def test_the_end_commits_the_remaining_steps():
    start, gradient, noted = whole_numbers(3, 9, seed=1)
    simulation = simulate(Downpour(period=4), 3, start=start, eta=1.0, gradient=gradient).run(6)
    assert not np.array_equal(simulation.consensus(), start - sum(g for _, g in noted))
    for _ in range(2):  # the second has nothing to do
        for worker in simulation.workers:
            worker.finalize()
    assert np.array_equal(simulation.consensus(), start - sum(g for _, g in noted))
    assert statistics(simulation, "n_exchanges") == [2, 2, 2]


def test_a_push_leaves_nothing_for_the_end():
    simulation = simulate(Downpour(push_period=2, fetch_period=3), 2, start=np.ones(4), eta=0.1).run(4)
    before = statistics(simulation, "n_exchanges")  # the last step pushed and did not fetch
    for worker in simulation.workers:
        worker.finalize()
    assert statistics(simulation, "n_exchanges") == before


def test_warnings_name_settings_outside_the_bound():
    assert not list(Downpour(period=1).warnings(4, 0.05))
    for method in (Downpour(period=16), Downpour(push_period=16), ADownpour(period=16), ZealousDownpour(period=16)):
        (text,) = method.warnings(4, 0.05)
        assert "DOWNPOUR with 4 workers and period 16" in text


EXACT = [Downpour(period=3), Downpour(push_period=1, fetch_period=2), Downpour(push_period=3, fetch_period=1),
         AGN(period=4), AGN(period=4, normalise="gradient"), ZealousDownpour(period=3)]  # fmt: skip


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("method", EXACT)
def test_ranks_commit_every_step_exactly_once(world, method):
    start = np.arange(1000.0)
    rng, total, n_steps = np.random.default_rng(world.rank), np.zeros(1000), 12 * (4 + world.rank)
    with OnRank(world, method, start, eta=1.0) as rank:
        for _ in range(n_steps):
            g = rng.integers(-50, 50, 1000).astype(float)
            rank.step(g)
            total += g
        if method.name == "agn":
            total /= method.period
        rank.worker.finalize()
        assert np.array_equal(rank.consensus(), start - world.comm.allreduce(total))


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("method", [ADownpour(period=2), MVADownpour(rate=1.0)])
def test_ranks_average_their_commits(world, method):
    with OnRank(world, method, np.zeros(1000), eta=1.0) as rank:
        for _ in range(40):
            rank.step(-np.ones(1000))
        n_commits = world.size * 40 // method.period
        centers = method.period * np.arange(1, n_commits + 1)  # whatever the order, each commit adds as much
        wanted = centers.mean() if method.name == "adownpour" else centers[-1]
        np.testing.assert_allclose(rank.consensus(), wanted, rtol=1e-12)
