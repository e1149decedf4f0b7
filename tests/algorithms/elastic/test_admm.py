"""ADMM in its three modes (arXiv 1412.6651, section 4): radii, divergence, exact consensus, delays."""

import time

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.on_ranks import RankRun, ranks
from support.quadratic import (
    assert_states_equal,
    change,
    load,
    radius,
    same_bits,
    simulate,
    slope,
    states,
    statistics,
)

from mpitrain import UsageError
from mpitrain.algorithms import ADMM, EASGD
from mpitrain.algorithms.base.replica import ParamGroupSlice
from mpitrain.simulation.schedules import RandomOrder, RoundRobin, Scripted, VirtualTime

H, B = [0.5, 1.0, 2.0, 4.0, 0.3], [1.0, -2.0, 0.5, 3.0, -1.0]
ALL = pytest.mark.ranks(2, 3)


def column(simulation, name):
    """Return one entry of the state of every worker, (p, n)."""
    return np.stack([state[name] for state in states(simulation)])


def in_turn(script, x, rho, eta, h, b, decay=0.0, arrivals=1):
    """Make the paper's three assignments, one worker's turn per entry of the script; the center after every K-th.

    All contributions start as the center, which is worker 0's x.
    """
    x, c, lam = x.copy(), x[0].copy(), np.zeros_like(x)
    s = np.repeat(x[:1], len(x), axis=0)
    for k, i in enumerate(script, 1):
        g = h[i] * (x[i] - b[i]) + decay * x[i]
        lam[i] = lam[i] - (x[i] - c)
        x[i] = (x[i] - eta * g + eta * rho * (lam[i] + c)) / (1 + eta * rho)
        s[i] = x[i] - lam[i]
        if k % arrivals == 0:
            c = s.mean(0)
    return x, lam, c


def at_once(steps, x, rho, eta, h, b):
    """Make the three assignments for all workers at once, from one center."""
    x, c, lam = x.copy(), x[0].copy(), np.zeros_like(x)
    h, b = np.array(h)[:, None], np.array(b)[:, None]
    for _ in range(steps):
        lam = lam - (x - c)
        x = (x - eta * h * (x - b) + eta * rho * (lam + c)) / (1 + eta * rho)
        c = (x - lam).mean(0)
    return x, lam, c


# ---- one after the other ----------------------------------------------------------------------------------------


def sweep(method, p, eta):
    """Return the matrix on (x_1, ..., x_p, lam_1, ..., lam_p) of one turn of each worker; c is the mean of x - lam.

    Any sweep ends with such a center, so that the paper's matrix, which has c as one more state, has one more
    eigenvalue and that is 0.
    """
    unit = np.eye(2 * p)
    x, lam = unit[:p], unit[p:]
    simulation = simulate(method, p, start=np.zeros(2 * p), eta=eta)
    change(simulation, parameters=x, multiplier=lam, contribution=x - lam, center=(x - lam).mean(0)).run(1)
    return np.vstack([simulation.x(), column(simulation, "multiplier")])


@pytest.mark.parametrize("mode", ["round_robin", "async"])
@pytest.mark.parametrize(("p", "wanted"), [(1, 0.9990024938), (2, 0.9990018718), (3, 1.0009738854), (8, 1.0022578662)])
def test_a_sweep_in_turn_has_the_known_radius(mode, p, wanted):
    assert radius(sweep(ADMM(mode=mode, rho=2.5), p, 0.001)) == pytest.approx(wanted, abs=5e-11)


@given(st.integers(1, 5), st.floats(0.05, 10), st.floats(0.01, 0.5), st.integers(0, 2**16))
def test_round_robin_is_the_papers_three_assignments(p, rho, eta, seed):
    start = np.random.default_rng(seed).normal(size=(p, 6))
    simulation = simulate(
        ADMM(mode="round_robin", rho=rho), p, start=start, eta=eta, decay=0.1, gradient=slope(H, B), largest_shard=4
    ).run(9)
    x, lam, c = in_turn(list(range(p)) * 9, start, rho, eta, H, B, decay=0.1)
    scale = 1 + np.abs(lam).max()
    np.testing.assert_allclose(simulation.x(), x, atol=1e-12 * scale)
    np.testing.assert_allclose(column(simulation, "multiplier"), lam, atol=1e-12 * scale)
    np.testing.assert_allclose(simulation.consensus(), c, atol=1e-12 * scale)


@settings(max_examples=40)
@given(st.integers(1, 5), st.integers(0, 2**16))
def test_round_robin_is_the_same_at_any_speeds(p, seed):
    # Bits: asynchronous workers served in turn; workers that take turns, in their turns and in any other order.
    start = np.random.default_rng(seed).normal(size=40)
    ends = [
        simulate(ADMM(mode=mode), p, start=start, eta=0.1, gradient=slope(H, B), schedule=schedule, **more).run(7)
        for mode, schedule, more in (
            ("async", RoundRobin(), {}),
            ("round_robin", RoundRobin(), {}),
            ("round_robin", RandomOrder(seed), {"interleave_locks": True, "largest_shard": 8}),
            ("round_robin", VirtualTime(np.random.default_rng(seed).uniform(1, 9, p)), {"largest_shard": 8}),
        )
    ]
    for end in ends[1:]:
        assert same_bits(end.x(), ends[0].x())
        assert same_bits(end.consensus(), ends[0].consensus())


def test_admm_in_turn_diverges_where_easgd_converges():
    # The paper's figure 1 and its start: x_i = c = 1000, no multipliers. alpha = eta*rho.
    eta, rho, p, sweeps = 0.001, 2.5, 8, 5000
    centers = []

    def look(simulation, rank):
        if rank == p - 1:
            centers.append(abs(simulation.consensus()[0]))

    simulate(ADMM(mode="round_robin", rho=rho), p, start=[1000.0], eta=eta).run(sweeps, look)
    assert min(centers) < 100  # it comes down first
    assert max(centers[:2500]) < 1000 < 2000 < max(centers)
    for method in (
        EASGD(moving_rate=eta * rho, period=1),
        ADMM(mode="sync", rho=rho),
        ADMM(mode="round_robin", rho=30.0),
    ):
        end = simulate(method, p, start=[1000.0], eta=eta).run(sweeps // 2)
        assert abs(end.consensus()[0]) < 150  # (1 - eta)^2500 is 0.08


# ---- all at once, and whenever they come ------------------------------------------------------------------------


@given(st.integers(1, 5), st.floats(0.05, 10), st.floats(0.01, 0.5), st.integers(0, 2**16))
def test_sync_is_the_three_assignments_from_one_center(p, rho, eta, seed):
    start = np.random.default_rng(seed).normal(size=(p, 6))
    simulation = simulate(ADMM(mode="sync", rho=rho), p, start=start, eta=eta, gradient=slope(H, B)).run(9)
    x, lam, c = at_once(9, start, rho, eta, H[:p], B[:p])
    scale = 1 + np.abs(lam).max()
    np.testing.assert_allclose(simulation.x(), x, atol=1e-12 * scale)
    np.testing.assert_allclose(column(simulation, "multiplier"), lam, atol=1e-12 * scale)
    for rank in range(p):
        np.testing.assert_allclose(simulation.consensus(rank), c, atol=1e-12 * scale)


@pytest.mark.parametrize("p", [1, 2, 3, 5])
def test_a_center_after_every_p_arrivals_in_turn_is_sync(p):
    start = np.random.default_rng(p).normal(size=20)
    run_on_survivors, barrier = (
        simulate(method, p, start=start, eta=0.1, gradient=slope(H, B), largest_shard=8).run(30)
        for method in (ADMM(mode="sync"), ADMM(arrivals=p))
    )
    np.testing.assert_allclose(barrier.x(), run_on_survivors.x(), atol=1e-12)
    np.testing.assert_allclose(barrier.consensus(), run_on_survivors.consensus(), atol=1e-12)


@given(st.integers(1, 4), st.sampled_from([0.0, 0.1]), st.lists(st.integers(0, 2), max_size=60))
def test_any_order_of_events_follows_the_equations(arrivals, decay, script):
    rng = np.random.default_rng(5)
    start, h, b = rng.normal(size=(3, 6)), rng.uniform(0.2, 2, 3), rng.normal(size=3)
    simulation = simulate(
        ADMM(rho=0.7, arrivals=arrivals), 3, start=start, eta=0.1, decay=decay, gradient=slope(h, b),
        schedule=Scripted(script), largest_shard=4,
    ).run(10**6)  # fmt: skip
    x, lam, c = in_turn(script, start, 0.7, 0.1, h, b, decay, arrivals)
    np.testing.assert_allclose(simulation.x(), x, atol=1e-12)
    np.testing.assert_allclose(column(simulation, "multiplier"), lam, atol=1e-12)
    np.testing.assert_allclose(simulation.consensus(), c, atol=1e-12)


@settings(max_examples=60)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 50), st.integers(1, 40), st.data())
def test_the_center_is_the_mean_of_the_contributions_at_any_moment(arrivals, p, n, largest_shard, data):
    script = data.draw(st.lists(st.integers(0, p - 1), max_size=120))
    start = np.random.default_rng(n).normal(size=(p, n))
    simulation = simulate(
        ADMM(arrivals=arrivals), p, start=start, eta=0.1, gradient=slope(H, B), schedule=Scripted(script),
        interleave_locks=True, largest_shard=largest_shard,
    ).run(10**6)  # fmt: skip
    # The script ends it, perhaps in the middle of a visit. With K > 1 the mean is the center to come.
    name = "center" if arrivals == 1 else "mean"
    contributions = column(simulation, "contribution")
    np.testing.assert_allclose(states(simulation)[0][name], contributions.mean(0), atol=1e-11)


def test_a_contribution_is_x_minus_the_multiplier():
    for dtype, tolerance in ((np.float64, 1e-13), (np.float32, 1e-5), (ml_dtypes.bfloat16, 2e-2)):
        start = np.random.default_rng(2).normal(size=50).astype(dtype)
        simulation = simulate(ADMM(), 3, start=start, eta=0.1, gradient=slope(H, B), schedule=RandomOrder(1)).run(40)
        wanted = simulation.x().astype(np.float64) - column(simulation, "multiplier")
        np.testing.assert_allclose(column(simulation, "contribution"), wanted, atol=tolerance)
        # Sixteen bits hold the model only: the center's rounding is that of float32.
        error = column(simulation, "contribution").astype(np.float64).mean(0) - states(simulation)[0]["center"]
        assert np.abs(error).max() < 1e-4


def test_rounding_of_the_center_stays_below_half_a_unit_a_turn():
    start, turns = np.random.default_rng(3).normal(size=200).astype(np.float32), 2000
    largest = 0.0

    def look(simulation, rank):
        nonlocal largest
        largest = max(largest, np.abs(simulation.consensus()).max())

    simulation = simulate(ADMM(), 4, start=start, eta=0.1, gradient=slope(H, B, sigma=1.0)).run(turns // 4, look)
    drift = column(simulation, "contribution").astype(np.float64).mean(0) - simulation.consensus()
    assert 0 < np.abs(drift).max() < turns * 2.0**-24 * largest
    assert np.sqrt(np.mean(drift**2)) < 2 * np.sqrt(turns) * 2.0**-24 * largest  # as independent errors add up


@pytest.mark.parametrize(
    "method",
    [
        ADMM(mode="sync"),
        ADMM(mode="round_robin"),
        ADMM(),
        ADMM(arrivals=3),
        ADMM(max_delay=2),
        ADMM(arrivals=2, max_delay=1, rho=3.0),
    ],
)
def test_different_workers_agree_exactly_on_the_minimum_of_the_sum(method):
    # f_i = h_i (x - b_i)^2 / 2; EASGD's center rests elsewhere, its workers at p different points.
    h, b = np.array([0.5, 1.0, 2.0, 4.0]), np.array([1.0, -2.0, 0.5, 3.0])
    optimum = (h * b).sum() / h.sum()
    assert optimum == pytest.approx(1.5333333333, abs=1e-10)
    schedule = RoundRobin() if method.is_synchronous else RandomOrder(4)
    simulation = simulate(method, 4, start=np.zeros(3), eta=0.1, gradient=slope(h, b), schedule=schedule)
    simulation.run(1200)
    np.testing.assert_allclose(simulation.consensus(), optimum, atol=1e-10)
    np.testing.assert_allclose(simulation.x(), optimum, atol=1e-10)
    multipliers = column(simulation, "multiplier")
    np.testing.assert_allclose(multipliers.sum(0), 0, atol=1e-10)
    np.testing.assert_allclose(multipliers[:, 0], h * (optimum - b) / method.rho, atol=1e-10)  # rho lam_i = g_i(c)
    easgd = simulate(EASGD(period=1, synchronous=True), 4, start=np.zeros(3), eta=0.1, gradient=slope(h, b)).run(500)
    assert np.abs(easgd.consensus() - optimum).min() > 0.1


# ---- partial barrier and bounded delay --------------------------------------------------------------------------


def test_the_center_moves_with_every_kth_arrival_only():
    start = np.random.default_rng(6).normal(size=8)
    seen = []

    def look(simulation, rank):
        seen.append(simulation.consensus())

    script = [0, 1, 0, 0, 2, 2, 1, 0, 0, 0, 2, 1]
    simulate(
        ADMM(arrivals=4), 3, start=start, eta=0.1, gradient=slope(H, B), schedule=Scripted(script)
    ).run(10**6, look)  # fmt: skip
    moved = [not np.array_equal(a, b) for a, b in zip([start, *seen], seen)]
    # A step ends after its turn, so that the last one of the script is seen.
    assert moved == [(k + 1) % 4 == 0 for k in range(len(script))]


@pytest.mark.parametrize("max_delay", [1, 2, 5])
def test_no_turn_begins_with_a_contribution_older_than_the_bound(max_delay):
    def lead(method):
        """Return the largest number of turns by which a worker is ahead of another at the end of a step."""
        most = 0

        def look(simulation, rank):
            nonlocal most
            turns = [int(worker.t) for worker in simulation.workers]
            most = max(most, max(turns) - min(turns))

        schedule = VirtualTime([1.0, 1.3, 40.0])
        simulation = simulate(method, 3, start=np.ones(4), eta=0.1, gradient=slope(H, B), schedule=schedule)
        simulation.run(60, look)
        assert [worker.t for worker in simulation.workers] == [60, 60, 60]
        return most

    # A turn begins when no contribution is more than T_max turns older; after it, it is one more.
    assert lead(ADMM(max_delay=max_delay)) == max_delay + 1
    assert lead(ADMM()) > 30


def test_the_worker_ahead_waits_and_the_one_behind_does_not():
    def run(script):
        simulation = simulate(ADMM(max_delay=1), 2, start=np.ones(2), eta=0.1, schedule=Scripted(script)).run(9)
        return [worker.t for worker in simulation.workers]

    assert run([0, 0]) == [2, 0]
    assert run([0, 0, 0]) == [2, 0]  # it has begun its third step, and waits
    with pytest.raises(ValueError, match="worker 0"):
        run([0, 0, 0, 0])
    assert run([0, 0, 0, 1, 0]) == [3, 1]
    assert run([0, 0, 0, 1, 1, 1, 0]) == [3, 3]


@settings(max_examples=40)
@given(
    st.sampled_from([ADMM(max_delay=1), ADMM(max_delay=3), ADMM(mode="round_robin"), ADMM(max_delay=2, arrivals=3)]),
    st.integers(1, 5),
    st.integers(0, 2**16),
)
def test_waiting_never_deadlocks(method, p, seed):
    # RuntimeError if all wait. Twice, since a run may go on.
    simulation = simulate(
        method, p, start=np.ones(20), eta=0.1, gradient=slope(H, B), schedule=RandomOrder(seed),
        interleave_locks=True, largest_shard=8,
    ).run(5).run(4)  # fmt: skip
    assert [worker.t for worker in simulation.workers] == [9] * p


def test_methods_that_wait_declare_it():
    assert not ADMM().is_synchronous
    assert not ADMM(arrivals=4).is_synchronous
    assert all(method.is_synchronous for method in (ADMM(max_delay=1), ADMM(mode="sync"), ADMM(mode="round_robin")))
    for mode in ("sync", "round_robin"):
        for settings_ in ({"arrivals": 2}, {"max_delay": 3}):
            with pytest.raises(UsageError, match=f"for mode async, not for {mode}"):
                ADMM(mode=mode, **settings_)


def test_workers_without_a_bound_never_wait():
    simulation = simulate(ADMM(arrivals=2), 3, start=np.ones(4), eta=0.1, schedule=Scripted([1] * 20)).run(20)
    assert [worker.t for worker in simulation.workers] == [0, 20, 0]


# ---- everything else --------------------------------------------------------------------------------------------


def test_a_warning_names_a_penalty_that_is_inside():
    def found(method, size, eta):
        return list(method.warnings(size, eta))

    for size in (3, 4, 5, 6, 8, 16, 500):
        (text,) = found(ADMM(rho=2.5), size, 0.001)
        advised = float(text.split(": rho ")[1].split()[0])
        assert 8 < advised < 32
        assert found(ADMM(rho=advised, mode="round_robin"), size, 0.001) == []
    # A flat direction: the sweep enlarges it below the advice for 8 workers, not above.
    assert radius(sweep_without_curvature(8, 0.020)) > 1 + 1e-6
    assert radius(sweep_without_curvature(8, 0.025)) < 1 + 1e-9
    assert found(ADMM(rho=2.5), 2, 0.001) == found(ADMM(rho=2.5, mode="sync"), 8, 0.001) == []
    assert found(ADMM(), 8, 0.1) == []


def sweep_without_curvature(p, eta_rho):
    """Return the matrix of the sweep on (x, lam) for h = 0, column by column."""
    unit, columns = np.eye(2 * p), []
    for start in unit:
        x, lam = start[:p].copy(), start[p:].copy()
        c = (x - lam).mean()
        for i in range(p):
            lam[i] -= x[i] - c
            x[i] = (x[i] + eta_rho * (lam[i] + c)) / (1 + eta_rho)
            c = (x - lam).mean()
        columns.append(np.concatenate([x, lam]))
    return np.array(columns).T


@pytest.mark.parametrize(("arrivals", "row"), [(1, "center"), (3, "mean")])
def test_the_mean_is_repaired_when_a_worker_that_died_continues_with_the_part_of_another(arrivals, row):
    method, start = ADMM(arrivals=arrivals), np.random.default_rng(4).normal(size=(4, 6))
    parts = states(simulate(method, 4, start=start, eta=0.1, gradient=slope(H, B), largest_shard=4).run(9))
    intact = load(simulate(method, 4, start=0 * start, eta=0.1, largest_shard=4), parts)
    assert same_bits(states(intact)[0][row], parts[0][row])  # no worker had died: rounding stays as it was
    parts[2] = parts[3]
    repaired = load(simulate(method, 4, start=0 * start, eta=0.1, largest_shard=4), parts)
    wanted = column(repaired, "contribution").mean(0)
    np.testing.assert_allclose(states(repaired)[0][row], wanted, rtol=1e-14, atol=1e-14)
    assert np.abs(wanted - parts[0][row]).max() > 0.01


@pytest.mark.parametrize("mode", ["sync", "async", "round_robin"])
def test_parameter_groups_have_their_own_rates(mode):
    # Two groups whose border is inside a shard are two models.
    start, rates, decays, border, n = np.random.default_rng(8).normal(size=40), (0.1, 0.02), (0.0, 0.3), 13, 40
    parts = (slice(0, border), slice(border, n))
    run_on_survivors = simulate(ADMM(mode=mode), 3, start=start, eta=0.0, largest_shard=16)

    def program(comm):
        worker = run_on_survivors.workers[comm.rank]
        for _ in range(8):
            worker.g.local[...] = H[comm.rank] * (worker.x.local - B[comm.rank])
            worker.step([ParamGroupSlice(*each) for each in zip(parts, rates, decays)], None)
            comm.end_step()

    run_on_survivors.world.run(program)
    for part, eta, decay in zip(parts, rates, decays):
        alone = simulate(ADMM(mode=mode), 3, start=start[part], eta=eta, decay=decay, gradient=slope(H, B)).run(8)
        np.testing.assert_allclose(run_on_survivors.x()[:, part], alone.x(), atol=1e-13)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("method", [ADMM(mode="sync"), ADMM(), ADMM(arrivals=2), ADMM(mode="round_robin")])
def test_nonfinite_values_never_reach_the_center(method, bad):
    def gradient(rank, x):
        g = x.copy()
        if rank == 1:
            g[2] = bad
        return g

    simulation = simulate(method, 3, start=np.ones(5), eta=0.1, gradient=gradient).run(10)
    assert np.isfinite(simulation.consensus()).all()
    assert np.isfinite(simulation.x()[[0, 2]]).all()
    assert simulation.consensus()[2] < 0.95  # the others go on
    assert statistics(simulation, "n_nonfinite") == [0, 10, 0]


def test_a_turn_moves_two_vectors():
    # And waiting moves none.
    for method, vectors in ((ADMM(), 2), (ADMM(mode="round_robin"), 2), (ADMM(max_delay=1), 2), (ADMM(arrivals=2), 4)):
        simulation = simulate(method, 3, start=np.ones(100), eta=0.1).run(6)
        assert statistics(simulation, "bytes_sent") == [6 * vectors * 800] * 3
        assert statistics(simulation, "n_exchanges") == [6] * 3
    assert statistics(simulate(ADMM(mode="sync"), 4, start=np.ones(100), eta=0.1).run(6), "bytes_sent") == [7200] * 4


# ---- between ranks ----------------------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("n_nodes", [1, 2])
@pytest.mark.parametrize("mode", ["sync", "round_robin"])
def test_ranks_do_what_simulated_workers_do(mode, n_nodes):
    start, method = np.random.default_rng(9).normal(size=300), ADMM(mode=mode)
    with ranks(n_nodes) as comm:
        run, center = RankRun(method, comm, start), np.zeros(300)
        run.run(12, 0.1, slope(H, B))
        comm.barrier()
        run.worker.consensus(center)
        wanted = simulate(method, comm.size, start=start, eta=0.1, gradient=slope(H, B)).run(12)
        np.testing.assert_allclose(run.worker.x.local, wanted.x()[comm.rank], atol=1e-13)
        np.testing.assert_allclose(center, wanted.consensus(), atol=1e-13)


@ALL
@pytest.mark.parametrize("n_nodes", [1, 2])
@pytest.mark.parametrize(
    "method",
    [ADMM(mode="sync"), ADMM(mode="round_robin"), ADMM(), ADMM(max_delay=2), ADMM(arrivals=3, max_delay=1)],
)
def test_at_rest_the_center_is_the_mean_of_the_contributions(method, n_nodes):
    start = np.random.default_rng(10).normal(size=2000)
    with ranks(n_nodes) as comm:
        run = RankRun(method, comm, start)
        # Where nobody waits, a different number of steps on each.
        run.run(40 if method.is_synchronous else 40 + 7 * comm.rank, 0.1, slope(H, B))
        comm.barrier()
        states = run.states()
        mean = np.mean([state["parameters"] - state["multiplier"] for state in states], axis=0)
        np.testing.assert_allclose(states[0]["center" if method.arrivals == 1 else "mean"], mean, atol=1e-12)
        assert np.abs(mean - start).max() > 0.1


@ALL
@pytest.mark.parametrize("n_nodes", [1, 2])
def test_bounded_ranks_stay_together(n_nodes):
    # Everybody tells how far it is, and looks at the others: the last rank is slow, so that they would run away.
    with ranks(n_nodes) as comm:
        run, turns, leads = RankRun(ADMM(max_delay=2), comm, np.ones(500)), comm.vector(1, np.float64), [0.0]
        for t in range(60):
            run.run(1, 0.1, slope(H, B))
            for peer in range(comm.size):
                comm.read(turns, peer, lambda theirs, t=t: leads.append(t - float(theirs[0])))
            turns.local[0] = t + 1
            if comm.rank == comm.size - 1:
                time.sleep(0.002)
        # What a peer tells is its clock, or one less for a moment.
        assert max(leads) <= 2 + 1
        assert run.worker.t == 60


@ALL
@pytest.mark.parametrize("n_nodes", [1, 2])
@pytest.mark.parametrize("method", [ADMM(mode="sync"), ADMM(mode="round_robin"), ADMM(arrivals=3)])
def test_ranks_continue_from_their_checkpoint(method, n_nodes):
    with ranks(n_nodes) as comm:
        first = RankRun(method, comm, np.random.default_rng(5).normal(size=900))
        first.run(11, 0.1, slope(H, B))
        comm.barrier()
        saved = first.states()
        second = RankRun.resumed(method, comm, saved[comm.rank])
        for a, b in zip(second.states(), saved):
            assert_states_equal(a, b)
        if method.is_synchronous:  # clocks too: nobody waits for ever
            second.run(5, 0.1, slope(H, B))
            first.run(5, 0.1, slope(H, B))
            for a, b in zip(second.states(), first.states()):
                assert_states_equal(a, b)
