"""Synchronous EASGD against the reduced dynamics of Zhang, Choromanska, LeCun (arXiv 1412.6651), eq. 5-6."""

import numpy as np
import pytest
from support.quadratic import change, radius, simulate, slope, standard_error, statistics, sweep_matrix

from mpitrain.algorithms import EASGD

ETA, H, ALPHA, P = 0.1, 1.0, 0.225, 4
EH, BETA = ETA * H, P * ALPHA
METHOD = EASGD(moving_rate=ALPHA, period=1, synchronous=True)

# M on (mean x, c): x' = (1 - eh - alpha) x + alpha c;  c' = beta x + (1 - beta) c
REDUCED = np.array([[1 - EH - ALPHA, ALPHA], [BETA, 1 - BETA]])


def reduced_of(matrix):
    """Reduce a matrix on (x_1, ..., x_p, c) to (mean x, c), for equal workers."""
    p = len(matrix) - 1
    return np.array(
        [[matrix[:p, :p].sum() / p, matrix[:p, p].mean()], [matrix[p, :p].sum(), matrix[p, p]]]
    )  # fmt: skip


@pytest.mark.parametrize("tau", [1, 5])
def test_mean_and_center_follow_the_reduced_dynamics(tau):
    matrix = sweep_matrix(EASGD(moving_rate=ALPHA, period=tau, synchronous=True), P, eh=EH, steps=tau)
    per_period = np.diag([(1 - EH) ** (tau - 1), 1]) @ REDUCED
    np.testing.assert_allclose(reduced_of(matrix), per_period, atol=1e-14)
    assert radius(matrix) == pytest.approx(radius(per_period), abs=1e-12)


def test_radius_is_the_papers():
    assert radius(sweep_matrix(METHOD, P, eh=EH)) == pytest.approx(0.9215002341, abs=5e-11)


def test_disagreement_shrinks_by_its_own_factor():
    start = np.random.default_rng(0).normal(size=(P, 7))
    simulation = simulate(METHOD, P, start=start, eta=ETA).run(3)
    before, after = start - start.mean(0), simulation.x() - simulation.x().mean(0)
    np.testing.assert_allclose(after, (1 - EH - ALPHA) ** 3 * before, atol=1e-14)


def test_exchanges_conserve_the_sum_of_workers_and_center():
    start = np.random.default_rng(1).normal(size=(5, 40))
    method = EASGD(moving_rate=0.31, period=1, synchronous=True)
    simulation = simulate(method, 5, start=start, eta=0.0)
    total = start.sum(0) + start[0]
    simulation.run(20)
    np.testing.assert_allclose(simulation.x().sum(0) + simulation.consensus(), total, atol=1e-13)
    assert np.ptp(simulation.x(), axis=0).max() < 1e-2  # and they were exchanges


def test_stationary_variances_are_the_closed_form():
    # Var(c) = beta^2 eta^2 (sigma^2/p) (2 - a + q2) / ((a - q2) q2 (4 - 2a + q2)), a = eh+alpha+beta, q2 = eh*beta
    a, q2 = EH + ALPHA + BETA, EH * BETA
    formula = BETA**2 * ETA**2 / P * (2 - a + q2) / ((a - q2) * q2 * (4 - 2 * a + q2))
    assert formula == pytest.approx(0.0104558397, abs=5e-11)
    d = 40_000  # coordinates are independent replicates
    simulation = simulate(METHOD, P, start=np.zeros(d), eta=ETA, gradient=slope(H, sigma=1.0, seed=2)).run(150)
    assert simulation.consensus().var() == pytest.approx(formula, abs=4 * standard_error(formula, d))
    worker = 0.0245017222
    for x in simulation.x():
        assert x.var() == pytest.approx(worker, abs=4 * standard_error(worker, d))


@pytest.mark.parametrize(("p", "alpha"), [(1, 0.3), (3, 0.2), (4, 0.225), (5, 0.05)])
def test_mean_of_the_center_is_the_closed_form(p, alpha):
    # G, F = 1 - (a -+ sqrt(a^2 - 4 q))/2, a = eh + (p+1) alpha, q = eh p alpha
    # E[c_t - x*] = G^t (c_0 - x*) + (G^t - F^t)/(G - F) alpha u_0
    # u_0 = sum_i (x_i0 - x* - alpha/(1 - p alpha - F) (c_0 - x*))
    best, rng = 0.7, np.random.default_rng(12)
    start, c = rng.normal(size=(p, 6)), rng.normal(size=6)
    a, q = EH + (p + 1) * alpha, EH * p * alpha
    root = np.sqrt(a * a - 4 * q)
    g, f = 1 - (a - root) / 2, 1 - (a + root) / 2
    u = (start - best - alpha / (1 - p * alpha - f) * (c - best)).sum(0)
    method = EASGD(moving_rate=alpha, period=1, synchronous=True)
    simulation = simulate(method, p, start=start, eta=ETA, gradient=slope(H, best))
    change(simulation, center=c)
    for t in range(1, 16):
        wanted = best + g**t * (c - best) + (g**t - f**t) / (g - f) * alpha * u
        np.testing.assert_allclose(simulation.run(1).consensus(), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("eta", "alpha"), [(0.1, 0.225), (0.2, 0.1)])
def test_time_average_of_the_center_is_asymptotically_optimal(eta, alpha):
    # T Var((1/T) sum c_t) -> sigma^2/(p h^2), whatever eta and alpha. For finite T: c_t sums eta M^(t-1-k)[c, x] xi_k.
    t_end, d = 1000, 2000
    matrix, powers, total = np.array([[1 - eta - alpha, alpha], [P * alpha, 1 - P * alpha]]), np.eye(2), 0.0
    weights = []
    for _ in range(t_end):
        total += eta * powers[1, 0]
        powers = matrix @ powers
        weights.append(total)
    exact = np.square(weights).sum() / P / t_end
    assert exact == pytest.approx(1 / P, rel=0.05)
    mean = np.zeros(d)

    def add(simulation, rank):
        nonlocal mean
        if rank == 0:
            mean = mean + simulation.consensus() / t_end

    method = EASGD(moving_rate=alpha, period=1, synchronous=True)
    simulate(method, P, start=np.zeros(d), eta=eta, gradient=slope(H, sigma=1.0, seed=13)).run(t_end, add)
    assert t_end * mean.var() == pytest.approx(exact, abs=4 * standard_error(exact, d))


@pytest.mark.parametrize(("tau", "center"), [(1, 0.9840053316), (5, 0.7260236371)])
def test_fixed_point_of_unlike_workers_is_that_of_their_envelopes(tau, center):
    h, b, rho, eta = np.array([0.5, 1, 2, 4]), np.array([1, -2, 0.5, 3]), 1.5, 0.1
    # tau = 1: c* = sum w_i b_i / sum w_i, w_i = h_i rho / (h_i + rho). In general sum (1 - k_i)(b_i - c) = 0.
    g, alpha = 1 - eta * h, eta * rho
    a = g ** (tau - 1)
    weights = 1 - a * alpha / (1 - a * (g - alpha))
    formula = (weights * b).sum() / weights.sum()
    assert formula == pytest.approx(center, abs=5e-11)
    method = EASGD(rho=rho, period=tau, synchronous=True)
    simulation = simulate(method, 4, start=np.zeros(3), eta=eta, gradient=slope(h, b)).run(1000)
    np.testing.assert_allclose(simulation.consensus(), formula, atol=1e-8)
    if tau == 1:
        x = (h * b + rho * formula) / (h + rho)
        np.testing.assert_allclose(simulation.x(), x[:, None] * np.ones(3), atol=1e-8)


@pytest.mark.parametrize(("rho", "trapped"), [(0.3, True), (0.6, True), (0.7, False), (0.9, False)])
def test_double_well_traps_exactly_below_two_thirds(rho, trapped):
    # f(x) = (1 - x^2)^2 / 4: (s, -s, 0) with s = sqrt(1 - rho) is a strict local minimum iff rho < 2/3.
    method = EASGD(rho=rho, period=1, synchronous=True)
    start = np.array([[0.9], [-0.899]])
    simulation = simulate(method, 2, start=start, eta=0.05, gradient=lambda rank, x: -x * (1 - x**2))
    change(simulation, center=np.zeros(1)).run(4000)
    s = np.sqrt(1 - rho)
    x1, x2, c = [s, -s, 0] if trapped else [1, 1, 1]
    np.testing.assert_allclose([*simulation.x()[:, 0], simulation.consensus()[0]], [x1, x2, c], atol=1e-6)


def test_without_a_moving_rate_workers_are_alone_and_the_center_rests():
    start, h = np.random.default_rng(3).normal(size=(3, 5)), np.array([0.5, 1.0, 3.0])
    method = EASGD(moving_rate=0.0, period=1, synchronous=True)
    simulation = simulate(method, 3, start=start, eta=ETA, gradient=slope(h)).run(7)
    np.testing.assert_allclose(simulation.x(), (1 - ETA * h[:, None]) ** 7 * start, rtol=1e-13)
    assert np.array_equal(simulation.consensus(), start[0])


def test_one_worker_is_the_two_by_two_system():
    matrix = sweep_matrix(METHOD, 1, eh=EH)
    np.testing.assert_allclose(matrix, [[1 - EH - ALPHA, ALPHA], [ALPHA, 1 - ALPHA]], atol=1e-15)


def test_all_workers_start_with_one_center():
    start = np.random.default_rng(4).normal(size=(3, 5))
    simulation = simulate(METHOD, 3, start=start, eta=ETA)
    for rank in range(3):
        assert np.array_equal(simulation.consensus(rank), start[0])
    simulation.run(4)
    assert np.array_equal(simulation.consensus(1), simulation.consensus(0))
    assert np.array_equal(simulation.consensus(2), simulation.consensus(0))


def test_moving_rate_is_constant_and_rho_follows_when_the_learning_rate_decays():
    fixed, following = EASGD(moving_rate=0.2), EASGD(rho=2.0)
    assert [fixed.alpha(4, eta) for eta in (0.1, 0.01)] == [0.2, 0.2]
    assert [following.alpha(4, eta) for eta in (0.1, 0.01)] == [0.2, 0.02]
    assert EASGD().alpha(4, 0.1) == 0.9 / 4


def test_nan_never_reaches_the_center():
    def gradient(rank, x):
        g = x.copy()
        if rank == 1:
            g[2] = np.nan
        return g

    simulation = simulate(METHOD, 3, start=np.ones(5), eta=ETA, gradient=gradient).run(10)
    assert np.isfinite(simulation.consensus()).all()
    assert np.isfinite(simulation.x()[[0, 2]]).all()
    assert simulation.consensus()[2] < 0.9  # drawn on by the others
    assert statistics(simulation, "n_nonfinite") == [0, 5, 0]  # in every other step it has recovered
