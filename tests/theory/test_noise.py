"""Variances and moments, checked against Lyapunov equations of the algorithms and by Monte Carlo."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mpitrain import theory
from mpitrain.errors import UsageError

SETTINGS = [(0.1, 1.0, 4, 0.225), (0.5, 1.0, 4, 0.1), (0.05, 2.0, 16, 0.05)]


@pytest.mark.parametrize(
    ("setting", "center"), list(zip(SETTINGS, [0.0104558397, 0.0340909091, 0.0007447538])), ids=str
)
def test_variance_of_the_center(setting: tuple[float, float, int, float], center: float) -> None:
    eta, h, p, alpha = setting
    assert theory.easgd_center_variance(eta, h, 1.0, p, alpha) == pytest.approx(center, abs=1e-10)


def test_variance_of_a_worker() -> None:
    assert theory.easgd_worker_variance(0.1, 1.0, 1.0, 4, 0.225) == pytest.approx(0.0245017222, abs=1e-10)


@given(
    eta=st.floats(0.01, 1.5),
    h=st.floats(0.1, 1.5),
    p=st.integers(1, 6),
    alpha=st.floats(-0.5, 1),
    beta=st.floats(0.05, 1.5),
)
@settings(max_examples=200, deadline=None)
def test_variances_solve_the_lyapunov_equation(eta: float, h: float, p: int, alpha: float, beta: float) -> None:
    sigma = 0.7
    matrix = theory.easgd_full_matrix(eta * h, alpha, p, beta)
    assume(theory.spectral_radius(matrix) < 0.999)
    covariance = theory.stationary_covariance(matrix, np.diag([eta**2 * sigma**2] * p + [0]))
    assert theory.easgd_center_variance(eta, h, sigma, p, alpha, beta) == pytest.approx(covariance[p, p], rel=1e-8)
    assert theory.easgd_worker_variance(eta, h, sigma, p, alpha, beta) == pytest.approx(covariance[0, 0], rel=1e-8)


def test_variances_by_simulation() -> None:
    eta, h, p, alpha = SETTINGS[0]
    rng = np.random.default_rng(3)
    n = 20_000  # independent coordinates
    x, c = np.zeros((p, n)), np.zeros(n)
    for _ in range(100):  # 0.92^200 of the variance is still to come
        g = h * x - rng.standard_normal((p, n))
        x, c = x - eta * g - alpha * (x - c), c + alpha * (x - c).sum(axis=0)
    standard_error = np.sqrt(2 / n)  # of a variance estimated from n normal numbers, relative
    assert (c**2).mean() == pytest.approx(theory.easgd_center_variance(eta, h, 1, p, alpha), rel=4 * standard_error)
    assert (x[0] ** 2).mean() == pytest.approx(
        theory.easgd_worker_variance(eta, h, 1, p, alpha), rel=4 * standard_error
    )


def test_a_negative_moving_rate_raises_the_variance_of_the_center() -> None:
    best, _ = theory.optimal_moving_rate(0.1, 0.9)
    assert theory.easgd_center_variance(0.1, 1, 1, 4, best, 0.9) > 2 * theory.easgd_center_variance(0.1, 1, 1, 4, 0.225)


def test_variance_of_the_center_of_many_workers() -> None:
    p, eh, beta = 10**7, 0.1, 0.9
    limit = theory.easgd_center_variance_limit(eh, beta, 2.0, 0.5)
    assert p * theory.easgd_center_variance(eh / 0.5, 0.5, 2.0, p, beta / p) == pytest.approx(limit, rel=1e-6)
    sgd = 7 * theory.allreduce_variance(eh / 0.5, 0.5, 2.0, 7)
    assert theory.easgd_center_variance_limit(eh, 1.0, 2.0, 0.5) == pytest.approx(sgd, rel=1e-12)


@pytest.mark.parametrize(("eta", "alpha"), [(0.1, 0.225), (0.3, 0.05), (0.02, 0.4)])
def test_the_averaged_center_is_efficient(eta: float, alpha: float) -> None:
    # T * Var of a time average tends to the spectral density at frequency zero: (I-M)^-1 Q (I-M)^-T.
    h, sigma, p = 1.5, 0.8, 4
    inverse = np.linalg.inv(np.eye(2) - theory.easgd_matrix(eta * h, alpha, p * alpha))
    density = inverse @ np.diag([eta**2 * sigma**2 / p, 0]) @ inverse.T
    assert theory.averaged_center_variance(h, sigma, p, 1000) == pytest.approx(density[1, 1] / 1000, rel=1e-10)


@pytest.mark.parametrize(("eta", "h", "p"), [(0.1, 1.0, 4), (0.5, 3.0, 2)])
def test_variance_of_allreduce_sgd(eta: float, h: float, p: int) -> None:
    covariance = theory.stationary_covariance([[1 - eta * h]], [[eta**2 * 0.49 / p]])
    assert theory.allreduce_variance(eta, h, 0.7, p) == pytest.approx(covariance[0, 0], rel=1e-12)


@pytest.mark.parametrize(("delta", "variance"), [(0.5, 0.0941558442), (0.9, 0.2706339713)])
def test_variance_of_momentum_sgd(delta: float, variance: float) -> None:
    assert theory.msgd_variance(0.1, 1.0, 1.0, delta) == pytest.approx(variance, abs=1e-10)


@given(eta=st.floats(0.05, 1.2), h=st.floats(0.1, 1.5), delta=st.floats(-0.5, 0.95))
@settings(max_examples=100, deadline=None)
def test_variance_of_momentum_sgd_solves_the_lyapunov_equation(eta: float, h: float, delta: float) -> None:
    matrix = theory.msgd_matrix(eta * h, delta)
    assume(theory.spectral_radius(matrix) < 0.999)
    covariance = theory.stationary_covariance(matrix, np.full((2, 2), eta**2))  # the same noise in v and x
    assert theory.msgd_variance(eta, h, 1.0, delta) == pytest.approx(covariance[1, 1], rel=1e-8)


def test_momentum_sgd_is_a_second_order_recursion() -> None:
    eh, delta = 0.3, 0.7
    dh, s, x = delta * (1 - eh), np.array([0.0, 1.0]), [1.0]
    for _ in range(10):
        v = delta * s[0] - eh * (s[1] + delta * s[0])  # v <- delta*v - eta*g(x + delta*v)
        np.testing.assert_allclose(theory.msgd_matrix(eh, delta) @ s, [v, s[1] + v], atol=1e-14)
        s = np.array([v, s[1] + v])
        x.append(s[1])
    for t in range(1, 10):
        assert x[t + 1] == pytest.approx((1 - eh + dh) * x[t] - dh * x[t - 1], abs=1e-14)


@given(eh=st.floats(0.01, 1.95))
@settings(max_examples=30, deadline=None)
def test_no_momentum_on_a_grid_beats_the_critical_one(eh: float) -> None:
    delta, radius = theory.critical_momentum(eh)
    assert delta * (1 - eh) == pytest.approx((1 - np.sqrt(eh)) ** 2, abs=1e-12)
    assert (delta < 0) == (eh > 1)
    # A double eigenvalue is known to half the digits.
    assert theory.spectral_radius(theory.msgd_matrix(eh, delta)) == pytest.approx(radius, abs=1e-6)
    radii = [theory.spectral_radius(theory.msgd_matrix(eh, d)) for d in np.linspace(delta - 0.3, delta + 0.3, 401)]
    assert min(radii) > radius - 1e-6


def test_unstable_recursions_have_no_stationary_variance() -> None:
    with pytest.raises(UsageError, match=r"spectral radius is 1\.1"):
        theory.stationary_covariance([[1.1]], [[1.0]])


def test_the_strongly_convex_bound_is_the_papers_recursion() -> None:
    eta, mu, smoothness, sigma, p, alpha, beta = 0.1, 1.0, 4.0, 2.0, 4, 0.2, 0.6
    matrix, offset = theory.easgd_error_bound(eta, mu, smoothness, sigma, p, alpha, beta)
    # g1 = 2 * 0.1 * 1 * 4 / 5 = 0.16, g2 = 2 * 0.1 * 4 * (1 - 2 * 2 / 5) = 0.16
    np.testing.assert_allclose(matrix, [[0.48, 0.16, 0.2], [0, 0.64, 0.2], [0.6, 0, 0.4]], atol=1e-15)
    np.testing.assert_allclose(offset, [0.01, 0.04, 0], atol=1e-15)
    matrix, _ = theory.easgd_error_bound(eta, mu, mu, sigma, p, alpha, beta)
    assert matrix[0, 1] == pytest.approx(0, abs=1e-15)  # with one curvature the mean does not feel the spread


def test_errors_stay_below_the_strongly_convex_bound() -> None:
    p, alpha, eta, noise = 4, 0.225, 0.2, 0.3
    h = np.array([0.5, 1.0, 3.0])  # coordinates of a quadratic: mu = 0.5, L = 3
    mu, smoothness = h.min(), h.max()
    assert eta <= 2 * (1 - alpha) / (mu + smoothness)
    matrix, offset = theory.easgd_error_bound(eta, mu, smoothness, noise * np.sqrt(len(h)), p, alpha, p * alpha)
    start = np.random.default_rng(0).normal(size=(len(h), p + 1))
    moments = np.array([np.outer(s, s) for s in start])  # exact second moments, per coordinate
    full = [theory.easgd_full_matrix(eta * one, alpha, p) for one in h]
    added = np.diag([eta**2 * noise**2] * p + [0])
    mean = np.append(np.full(p, 1 / p), 0)

    def errors() -> np.ndarray:
        total = moments.sum(axis=0)
        return np.array([mean @ total @ mean, np.trace(total[:p, :p]) / p, total[p, p]])

    bound = errors()
    for _ in range(300):
        moments = np.array([m @ s @ m.T + added for m, s in zip(full, moments)])
        bound = matrix @ bound + offset
        assert (errors() <= bound * (1 + 1e-12)).all()
    assert (errors() > 0.1 * bound).all()  # it says something


@pytest.mark.parametrize(("p", "best"), [(1, 2 / 3), (16, 1 / 9)])
def test_best_rate_under_input_spread(p: int, best: float) -> None:
    eta, factor = theory.spread_sgd_optimum(0.5, 0.5, p)
    assert factor == pytest.approx(best, abs=1e-12)
    assert theory.spread_sgd_factor(eta, 0.5, 0.5, p) == pytest.approx(best, abs=1e-12)
    grid = np.linspace(0, theory.spread_sgd_bound(0.5, 0.5, p), 2001)
    factors = theory.spread_sgd_factor(grid, 0.5, 0.5, p)
    assert factors.min() >= best - 1e-12
    assert abs(grid[np.argmin(factors)] - eta) <= grid[1]
    assert factors[-1] == pytest.approx(1, abs=1e-12)
    assert (factors[1:-1] < 1).all()


@pytest.mark.parametrize(("shape", "p"), [(0.5, 1), (0.5, 16), (2.0, 4)])
def test_rate_under_input_spread_by_simulation(shape: float, p: int) -> None:
    eta, n = theory.spread_sgd_optimum(shape, shape, p)[0], 200_000
    u = np.random.default_rng(5).gamma(shape, 1 / shape, (n, p)).mean(axis=1)
    squares = (1 - eta * u) ** 2
    error = squares.std() / np.sqrt(n)
    assert theory.spread_sgd_factor(eta, shape, shape, p) == pytest.approx(squares.mean(), abs=4 * error)


@pytest.mark.parametrize("p", [1, 2, 4])
def test_second_moments_of_easgd_by_simulation(p: int) -> None:
    eta, alpha, beta, shape, rate, n = 0.3, 0.1, 0.6, 0.5, 0.5, 100_000
    rng = np.random.default_rng(p)
    x, c = np.ones((p, n)), np.full(n, -0.5)
    expected = np.array([1.0, 1.0, -0.5, 0.25])
    matrix = theory.easgd_second_moment(eta, alpha, beta, p, shape, rate)
    for _ in range(6):
        u = rng.gamma(shape, 1 / rate, (p, n))
        x, c = x - eta * u * x - alpha * (x - c), (1 - beta) * c + beta * x.mean(axis=0)
        expected = matrix @ expected
        samples = np.array([x[0] ** 2, x[0] * x[-1], x[0] * c, c**2])
        if p == 1:
            samples[1] = 0  # there is no other worker
        tolerance = 4 * samples.std(axis=1) / np.sqrt(n)
        kept = [0, 2, 3] if p == 1 else [0, 1, 2, 3]
        assert (np.abs(samples.mean(axis=1) - expected)[kept] <= tolerance[kept] + 1e-12).all()


def test_second_moments_without_spread_are_products_of_the_means() -> None:
    eta, alpha, beta, p, curvature = 0.2, 0.15, 0.6, 4, 1.5
    shape = 1e14  # no spread
    moments = theory.easgd_second_moment(eta, alpha, beta, p, shape, shape / curvature)
    m, c = 0.7, -0.4
    m2, c2 = theory.easgd_matrix(eta * curvature, alpha, beta) @ [m, c]
    np.testing.assert_allclose(moments @ [m * m, m * m, m * c, c * c], [m2 * m2, m2 * m2, m2 * c2, c2 * c2], atol=1e-10)


def test_without_coupling_mean_square_stability_is_that_of_sgd() -> None:
    bound = theory.spread_sgd_bound(0.5, 0.5, 1)
    for factor, stable in ((0.99, True), (1.01, False)):
        moments = theory.easgd_second_moment(factor * bound, 0.0, 0.5, 4, 0.5, 0.5)
        assert (theory.spectral_radius(moments) < 1) == stable
        assert theory.easgd_is_mean_square_stable(factor * bound, 0.0, 0.5, 4, 0.5, 0.5) == stable


def test_coupling_helps_under_wide_input_spread() -> None:
    eta, beta, p, shape = 0.3, 0.9, 16, 0.5
    alone, coupled = (
        theory.spectral_radius(theory.easgd_second_moment(eta, alpha, beta, p, shape, shape)) for alpha in (0.0, 0.1)
    )
    assert coupled < alone - 0.05
