"""DiLoCo against torch's Nesterov step on its outer gradients, its matrix on a quadratic, and Local SGD."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.on_ranks import RankRun, ranks
from support.quadratic import change, radius, same_bits, simulate, slope, states, statistics

from mpitrain import theory
from mpitrain.algorithms import DiLoCo, LocalSGD

P = 3
H, B = np.array([0.5, 1.0, 2.0]), np.array([1.0, -2.0, 0.5])
START = np.random.default_rng(0).normal(size=6)


def round_matrix(method, eh):
    """Return the matrix on (buffer, theta) of one round, from a run of unit vectors with equal workers."""
    unit = np.eye(2)
    simulation = simulate(method, P, start=np.zeros(2), eta=eh)
    change(simulation, parameters=unit[1], theta=unit[1], momentum=unit[0]).run(method.period)
    return np.stack([states(simulation)[0]["momentum"], simulation.consensus()])


def test_radius_on_an_easy_quadratic_is_that_of_the_formula():
    found = radius(round_matrix(DiLoCo(outer_learning_rate=0.7, outer_momentum=0.9, period=20), eh=0.05))
    assert found == pytest.approx(0.7041634264, abs=5e-11)
    averaging = radius(round_matrix(DiLoCo(outer_learning_rate=1.0, outer_momentum=0.0, period=20), eh=0.05))
    assert averaging == pytest.approx(0.95**20, abs=1e-12)
    assert averaging == pytest.approx(0.3584859, abs=5e-8)


@settings(max_examples=60)
@given(st.floats(0.01, 1.9), st.integers(1, 6), st.floats(0.05, 3), st.floats(0, 0.95))
def test_a_round_is_the_two_by_two_matrix_and_its_region(eh, tau, a, m):
    # b' = m b + (1-q) theta;  theta' = theta - a ((1-q) theta + m b')
    moved = 1 - (1 - eh) ** tau
    found = round_matrix(DiLoCo(outer_learning_rate=a, outer_momentum=m, period=tau), eh)
    np.testing.assert_allclose(found, [[m, moved], [-a * m**2, 1 - a * moved * (1 + m)]], rtol=0, atol=1e-12)
    np.testing.assert_allclose(found, theory.diloco_matrix(eh, tau, a, m), rtol=0, atol=1e-12)
    assume(abs(a * moved - 2 * (1 + m) / (1 + 2 * m)) > 1e-6)
    assert (radius(found) < 1) == (0 < a * moved < 2 * (1 + m) / (1 + 2 * m))


@pytest.mark.parametrize("tau", [1, 4])
def test_outer_rate_1_without_momentum_is_local_sgd(tau):
    ends = [
        simulate(method, P, start=START, eta=0.1, gradient=slope(H, B)).run(5 * tau).x()
        for method in (DiLoCo(outer_learning_rate=1.0, outer_momentum=0.0, period=tau), LocalSGD(period=tau))
    ]
    np.testing.assert_allclose(*ends, rtol=0, atol=1e-12)


def test_the_outer_optimizer_is_torchs():
    tau, eta = 3, 0.1
    theta = torch.nn.Parameter(torch.from_numpy(START.copy()))
    outer = torch.optim.SGD([theta], lr=0.7, momentum=0.9, nesterov=True)
    simulation = simulate(DiLoCo(period=tau), P, start=START, eta=eta, gradient=slope(H, B))
    for _ in range(12):
        now = theta.detach().numpy()
        ends = [b + (1 - eta * h) ** tau * (now - b) for h, b in zip(H, B, strict=True)]
        theta.grad = torch.from_numpy(now - np.mean(ends, 0))
        outer.step()
        simulation.run(tau)
        np.testing.assert_allclose(simulation.x(), np.tile(theta.detach().numpy(), (P, 1)), rtol=0, atol=1e-12)


def test_nonfinite_islands_drop_out_of_a_round():
    def gradient(rank, x):
        return np.full(6, np.inf) if rank > 1 and np.array_equal(x, START) else x - rank

    simulation = simulate(DiLoCo(period=2), 4, start=START, eta=0.1, gradient=gradient).run(2)
    d = START - np.mean([START * 0.81 + rank * 0.19 for rank in (0, 1)], 0)
    theta = START - 0.7 * (d + 0.9 * d)
    np.testing.assert_allclose(simulation.x(), np.tile(theta, (4, 1)), rtol=1e-12)
    assert statistics(simulation, "n_nonfinite") == [0, 0, 6, 6]
    # and are present again in the next
    e = theta - np.mean([theta * 0.81 + rank * 0.19 for rank in range(4)], 0)
    wanted = theta - 0.7 * (e + 0.9 * (0.9 * d + e))
    np.testing.assert_allclose(simulation.run(2).x(), np.tile(wanted, (4, 1)), rtol=1e-12)


def test_all_workers_start_a_round_from_the_same_bits():
    start = np.random.default_rng(1).normal(size=(P, 9)).astype(np.float32)
    simulation = simulate(DiLoCo(period=3), P, start=start, eta=0.1, gradient=slope(H, B)).run(6)
    for rank in range(P):
        assert same_bits(simulation.x()[rank], simulation.consensus(0))
        assert same_bits(simulation.x()[rank], simulation.consensus(rank))


def test_an_outer_learning_rate_that_is_unstable_for_every_period_gives_a_warning():
    assert not list(DiLoCo(outer_learning_rate=1.35).warnings(4, 0.1))
    (told,) = DiLoCo(outer_learning_rate=1.36).warnings(4, 0.1)
    assert "1.36" in told


@pytest.mark.ranks(3)
@pytest.mark.parametrize("n_nodes", [1, 2])
def test_between_ranks_a_round_is_the_papers(world, n_nodes):
    with ranks(n_nodes) as comm:
        start = np.random.default_rng(7).normal(size=300)
        run = RankRun(DiLoCo(period=3), comm, start)
        own, theta, b = np.random.default_rng(comm.rank), start.copy(), np.zeros(300)
        for _ in range(4):
            used = run.run(3, 0.1, lambda rank, x: own.normal(size=300))
            d = 0.1 * run.sum(used) / comm.size
            b = 0.9 * b + d
            theta = theta - 0.7 * (d + 0.9 * b)
            np.testing.assert_allclose(run.worker.x.local, theta, rtol=0, atol=1e-12)
        everyones = np.stack([state["parameters"] for state in run.states()])
        assert same_bits(everyones, np.tile(everyones[0], (comm.size, 1)))
