"""Local SGD and post-local SGD: the mean of all parameters every H steps, and its consequences."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.on_ranks import RankRun, ranks
from support.quadratic import load, same_bits, simulate, slope, states, statistics

from mpitrain.algorithms import AllReduceSGD, LocalSGD, PostLocalSGD
from mpitrain.simulation.schedules import RandomOrder

H, B = np.array([0.5, 1.0, 2.0, 4.0]), np.array([1.0, -2.0, 0.5, 3.0])
START = np.random.default_rng(0).normal(size=6)


def curved(rank, x):
    """Return gradients that are not those of a quadratic: h_i sin(x - b_i)."""
    return H[rank] * np.sin(x - B[rank])


@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_averaging_every_step_is_allreduce_sgd(p):
    ends = [
        simulate(method, p, start=START, eta=0.1, decay=0.02, gradient=curved).run(30).x()
        for method in (AllReduceSGD(), LocalSGD(period=1))
    ]
    np.testing.assert_allclose(*ends, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tau", [1, 2, 10])
def test_fixed_point_weighs_workers_by_the_contraction_of_a_round(tau):
    # mean_i (b_i + q_i (x - b_i)) = x with q_i = (1 - eta h_i)^H, so x* = sum (1 - q_i) b_i / sum (1 - q_i)
    eta = 0.1
    weights = 1 - (1 - eta * H) ** tau
    formula = (weights * B).sum() / weights.sum()
    if tau == 10:
        assert formula == pytest.approx(0.8596979111, abs=5e-11)
    end = simulate(LocalSGD(period=tau), 4, start=START, eta=eta, gradient=slope(H, B)).run(tau * 400)
    np.testing.assert_allclose(end.x(), formula, rtol=0, atol=1e-10)
    np.testing.assert_allclose(end.consensus(2), formula, rtol=0, atol=1e-10)


def test_workers_are_independent_within_a_round_and_equal_at_its_end():
    start, tau, eta = np.random.default_rng(1).normal(size=(3, 5)), 4, 0.1
    simulation = simulate(LocalSGD(period=tau), 3, start=start, eta=eta, gradient=slope(H)).run(tau - 1)
    np.testing.assert_allclose(simulation.x(), (1 - eta * H[:3, None]) ** 3 * start, rtol=1e-13)
    before = (1 - eta * H[:3, None]) ** 4 * start
    after = simulation.run(1).x()
    np.testing.assert_allclose(after, np.tile(before.mean(0), (3, 1)), rtol=1e-13)
    assert same_bits(after[0], after[1])
    assert same_bits(after[0], after[2])


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 20), st.integers(0, 2**16))
def test_averages_conserve_the_sum_in_any_order_of_events(p, tau, steps, seed):
    rng = np.random.default_rng(seed)
    start, used = rng.normal(size=(p, 7)), np.zeros(7)

    def gradient(rank, x):
        nonlocal used
        g = rng.normal(size=7)
        used = used + g
        return g

    method, schedule = LocalSGD(period=tau), RandomOrder(seed)
    end = simulate(method, p, start=start, eta=0.1, gradient=gradient, schedule=schedule).run(steps)
    np.testing.assert_allclose(end.x().sum(0), start.sum(0) - 0.1 * used, rtol=0, atol=1e-12)
    np.testing.assert_allclose(end.consensus(p - 1), end.x().mean(0), rtol=0, atol=1e-12)


def test_a_nonfinite_worker_is_left_out_and_returns():
    def gradient(rank, x):
        return np.where(np.arange(6) == 2, np.nan, 0.0) if rank == 1 and np.array_equal(x, START) else x - rank

    simulation = simulate(LocalSGD(period=2), 3, start=START, eta=0.1, gradient=gradient)
    two_steps = [START * 0.81 + rank * 0.19 for rank in (0, 2)]
    np.testing.assert_allclose(simulation.run(2).x(), np.tile(np.mean(two_steps, 0), (3, 1)), rtol=1e-12)
    assert statistics(simulation, "n_nonfinite") == [0, 1, 0]
    assert np.isfinite(simulation.run(10).x()).all()
    assert statistics(simulation, "n_nonfinite") == [0, 1, 0]


def test_the_mean_is_nan_if_no_worker_is_finite():
    simulation = simulate(LocalSGD(period=1), 2, start=START, eta=0.1, gradient=lambda rank, x: x * np.inf).run(1)
    assert np.isnan(simulation.x()).all()


@pytest.mark.parametrize("method", [PostLocalSGD(period=3, switch_step=0), PostLocalSGD(period=3)])
@pytest.mark.parametrize("steps", [1, 4, 9])
def test_post_local_is_one_of_the_two_when_it_never_or_always_is_local(method, steps):
    other = AllReduceSGD() if method.switch_step is None else LocalSGD(period=3)
    ends = [simulate(m, 3, start=START, eta=0.1, gradient=curved).run(steps) for m in (method, other)]
    assert same_bits(ends[0].x(), ends[1].x())


def test_post_local_switches_at_its_step():
    method = PostLocalSGD(period=3, switch_step=5)
    ours = simulate(method, 3, start=START, eta=0.1, gradient=curved).run(14)
    first = simulate(AllReduceSGD(), 3, start=START, eta=0.1, gradient=curved).run(5)
    # t = 5 is the first local step: averages after steps t = 5, 8, 11
    then = simulate(LocalSGD(period=3), 3, start=first.x(), eta=0.1, gradient=curved)
    moved = [{**state, "t": 5} for state in states(then)]
    assert same_bits(ours.x(), load(then, moved).run(9).x())
    assert np.ptp(ours.x(), axis=0).min() > 0  # in the middle of a round


@pytest.mark.parametrize(
    ("rates", "first_local"),
    [
        ([0.1, 0.1, 0.1, 0.05, 0.05, 0.05], 3),
        ([0.02, 0.05, 0.1, 0.1, 0.09, 0.1], 4),  # a warm-up is no decay, and there is no way back
        ([0.1, 0.0999, 0.0998, 0.0997, 0.0996, 0.0995], 1),
    ],
)
@pytest.mark.parametrize("interrupted_at", [None, 2, 3, 4, 5])
def test_post_local_switches_when_the_learning_rate_first_falls(rates, first_local, interrupted_at):
    method = PostLocalSGD(period=100)
    simulation = simulate(method, 3, start=START, eta=0.0, gradient=curved)
    for t, rate in enumerate(rates):
        if t == interrupted_at:
            simulation = load(simulate(method, 3, start=0 * START, eta=0.0, gradient=curved), states(simulation))
        simulation.learning_rate = rate
        simulation.run(1)
        is_apart = np.ptp(simulation.x(), axis=0).max() > 0
        assert is_apart == (t >= first_local)


@pytest.mark.ranks(3)
@pytest.mark.parametrize("n_nodes", [1, 2])
@pytest.mark.parametrize("method", [LocalSGD(period=3), PostLocalSGD(period=3, switch_step=4)])
def test_between_ranks_the_mean_follows_the_mean_gradient_step(world, n_nodes, method):
    with ranks(n_nodes) as comm:
        start = np.random.default_rng(7).normal(size=300)
        run = RankRun(method, comm, start)
        own = np.random.default_rng(comm.rank)
        used = run.run(8, 0.1, lambda rank, x: np.sin(x) + own.normal(size=300))
        wanted = comm.size * start - 0.1 * run.sum(used)
        np.testing.assert_allclose(run.sum(run.worker.x.local), wanted, rtol=0, atol=1e-12)
        run.run(1, 0.1, lambda rank, x: own.normal(size=300))  # the 9th step ends a round
        everyones = np.stack([state["parameters"] for state in run.states()])
        assert same_bits(everyones, np.tile(everyones[0], (comm.size, 1)))
