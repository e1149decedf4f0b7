"""SlowMo against its algorithm 1, its matrix on a quadratic, and the methods that it contains."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.on_ranks import RankRun, ranks
from support.quadratic import change, load, radius, same_bits, simulate, slope, states, statistics

from mpitrain import theory
from mpitrain.algorithms import LocalSGD, SlowMo

P = 3
H, B = np.array([0.5, 1.0, 2.0]), np.array([1.0, -2.0, 0.5])
START = np.random.default_rng(0).normal(size=6)


def round_matrix(method, eh):
    """Return the matrix on (gamma*u, x0) of one round, from a run of unit vectors with equal workers."""
    unit = np.eye(2)
    simulation = simulate(method, P, start=np.zeros(2), eta=eh)
    change(simulation, parameters=unit[1], theta=unit[1], momentum=unit[0] / eh).run(method.period)
    return np.stack([eh * states(simulation)[0]["momentum"], simulation.consensus()])


@settings(max_examples=60)
@given(st.floats(0.01, 1.9), st.integers(1, 6), st.floats(0.05, 5), st.floats(0, 0.95))
def test_a_round_is_the_two_by_two_matrix_and_its_region(eh, tau, alpha, beta):
    # u' = beta u + (1-q) x0;  x0' = x0 - alpha u'
    moved = 1 - (1 - eh) ** tau
    found = round_matrix(SlowMo(slow_learning_rate=alpha, slow_momentum=beta, period=tau), eh)
    np.testing.assert_allclose(found, [[beta, moved], [-alpha * beta, 1 - alpha * moved]], rtol=0, atol=1e-12)
    np.testing.assert_allclose(found, theory.slowmo_matrix(eh, tau, alpha, beta), rtol=0, atol=1e-12)
    assume(abs(alpha * moved - 2 * (1 + beta)) > 1e-6)
    assert (radius(found) < 1) == (0 < alpha * moved < 2 * (1 + beta))


@pytest.mark.parametrize("tau", [1, 4])
def test_without_slow_momentum_it_is_local_sgd(tau):
    ends = [
        simulate(method, P, start=START, eta=0.1, gradient=slope(H, B)).run(5 * tau).x()
        for method in (SlowMo(slow_momentum=0.0, period=tau), LocalSGD(period=tau))
    ]
    np.testing.assert_allclose(*ends, rtol=0, atol=1e-12)


def test_with_rounds_of_one_step_it_is_allreduce_sgd_with_a_heavy_ball():
    alpha, beta = 0.8, 0.6
    method = SlowMo(slow_learning_rate=alpha, slow_momentum=beta, period=1)
    simulation = simulate(method, P, start=START, eta=0.1, gradient=slope(H, B))
    x, v = START.copy(), np.zeros(6)
    for t in range(30):
        simulation.learning_rate = eta = 0.1 / (1 + t // 10)  # torch's momentum has the gradients' units too
        simulation.run(1)
        v = beta * v + np.mean([h * (x - b) for h, b in zip(H, B, strict=True)], 0)
        x = x - alpha * eta * v
        np.testing.assert_allclose(simulation.x(), np.tile(x, (P, 1)), rtol=0, atol=1e-12)


RATES = [0.1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.002, 0.002, 0.002, 0.002]


@pytest.mark.parametrize("interrupted_at", [None, 2, 6, 7])
def test_slow_momentum_averages_gradients_at_any_learning_rates(interrupted_at):
    # With the constant gradient 1 a round of 4 steps has the mean displacement 4 gamma, gamma the mean learning rate.
    def simulation():
        return simulate(method, 2, start=np.zeros(3), eta=0.0, gradient=lambda rank, x: np.ones(3))

    method = SlowMo(slow_learning_rate=0.9, slow_momentum=0.5, period=4)
    ours, u, x0 = simulation(), 0.0, 0.0
    for t, rate in enumerate(RATES):
        if t == interrupted_at:
            ours = load(simulation(), states(ours))
        ours.learning_rate = rate
        ours.run(1)
        if t % 4 == 3:
            u = 0.5 * u + 4
            x0 -= 0.9 * np.mean(RATES[t - 3 : t + 1]) * u
            np.testing.assert_allclose(states(ours)[1]["momentum"], u, rtol=1e-12)
            np.testing.assert_allclose(ours.consensus(), x0, rtol=1e-12)


def test_nothing_moves_while_the_learning_rate_is_zero():
    method = SlowMo(period=2)
    simulation = simulate(method, P, start=START, eta=0.1, gradient=slope(H, B)).run(4)
    x, u = simulation.consensus(), states(simulation)[0]["momentum"]
    simulation.learning_rate = 0.0
    simulation.run(2)
    np.testing.assert_array_equal(simulation.consensus(), x)
    np.testing.assert_array_equal(states(simulation)[0]["momentum"], 0.5 * u)


def test_all_workers_start_a_round_from_the_same_bits():
    start = np.random.default_rng(1).normal(size=(P, 9)).astype(np.float32)
    simulation = simulate(SlowMo(period=3), P, start=start, eta=0.1, gradient=slope(H, B)).run(6)
    for rank in range(P):
        assert same_bits(simulation.x()[rank], simulation.consensus(0))
        assert same_bits(simulation.x()[rank], simulation.consensus(rank))


def test_the_outcome_of_the_last_round_is_evaluated():
    simulation = simulate(SlowMo(period=5), P, start=START, eta=0.1, gradient=slope(H, B)).run(5)
    end = simulation.consensus()
    assert same_bits(simulation.run(4).consensus(2), end)
    assert not np.array_equal(simulation.run(1).consensus(), end)


def test_a_worker_that_is_not_finite_is_left_out_of_a_round():
    def gradient(rank, x):
        return np.full(6, np.nan) if rank == 1 and np.array_equal(x, START) else x - rank

    method = SlowMo(slow_momentum=0.5, period=2)
    simulation = simulate(method, 3, start=START, eta=0.1, gradient=gradient).run(2)
    d = START - np.mean([START * 0.81 + rank * 0.19 for rank in (0, 2)], 0)
    np.testing.assert_allclose(states(simulation)[2]["momentum"], d / 0.1, rtol=1e-10)
    np.testing.assert_allclose(simulation.x(), np.tile(START - d, (3, 1)), rtol=1e-12)
    assert statistics(simulation, "n_nonfinite") == [0, 6, 0]
    # the next round has all three again: theta_1 = mean of the three ends, less the momentum
    wanted = (START - d) * 0.81 + 0.19 - 0.5 * d
    np.testing.assert_allclose(simulation.run(2).consensus(), wanted, rtol=1e-12)


def test_a_round_without_finite_workers_moves_by_momentum_only():
    method = SlowMo(slow_momentum=0.5, period=1)
    simulation = simulate(method, 2, start=START, eta=0.1, gradient=lambda rank, x: x).run(1)
    theta, u = simulation.consensus(), states(simulation)[0]["momentum"]
    simulation.gradient = lambda rank, x: x * np.inf
    np.testing.assert_allclose(simulation.run(1).x(), np.tile(theta - 0.1 * 0.5 * u, (2, 1)), rtol=1e-12)


def test_a_slow_learning_rate_that_is_unstable_for_every_period_gives_a_warning():
    assert not list(SlowMo(slow_learning_rate=2.9).warnings(4, 0.1))
    (told,) = SlowMo(slow_learning_rate=3.1).warnings(4, 0.1)
    assert "3" in told


@pytest.mark.ranks(3)
@pytest.mark.parametrize("n_nodes", [1, 2])
def test_between_ranks_a_round_is_the_papers(world, n_nodes):
    with ranks(n_nodes) as comm:
        start = np.random.default_rng(7).normal(size=300)
        run = RankRun(SlowMo(slow_learning_rate=0.9, slow_momentum=0.5, period=3), comm, start)
        own, x0, u = np.random.default_rng(comm.rank), start.copy(), np.zeros(300)
        for _ in range(4):
            used = run.run(3, 0.1, lambda rank, x: own.normal(size=300))
            u = 0.5 * u + run.sum(used) / comm.size
            x0 = x0 - 0.9 * 0.1 * u
            np.testing.assert_allclose(run.worker.x.local, x0, rtol=0, atol=1e-12)
        everyones = np.stack([state["parameters"] for state in run.states()])
        assert same_bits(everyones, np.tile(everyones[0], (comm.size, 1)))
