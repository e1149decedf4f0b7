"""The EASGD family, checked against matrices written from the algorithms, powers, grids and random draws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mpitrain import theory
from mpitrain.errors import UsageError

H, B = np.array([0.5, 1.0, 2.0, 4.0]), np.array([1.0, -2.0, 0.5, 3.0])

rates = st.floats(-3, 3)


def synchronous_step(x: np.ndarray, c: float, eh: float, alpha: float, center_rate: float) -> tuple[np.ndarray, float]:
    """Return one step of EASGD's equations 5 and 6, all from the old values."""
    return x - eh * x - alpha * (x - c), c + center_rate * float(np.sum(x - c))


def as_matrix(step, n: int) -> np.ndarray:
    """Return the matrix of a linear function of an (n,) vector."""
    return np.column_stack([step(unit) for unit in np.eye(n)])


@pytest.mark.parametrize("tau", [1, 2, 5])
@pytest.mark.parametrize(("eh", "alpha", "beta", "p"), [(0.1, 0.225, 0.9, 4), (0.3, -0.2, 0.7, 3), (1.2, 0.1, 0.1, 1)])
def test_the_full_matrix_is_the_algorithm(eh: float, alpha: float, beta: float, p: int, tau: int) -> None:
    def period(s: np.ndarray) -> np.ndarray:
        x, c = synchronous_step(s[:p], s[p], eh, alpha, beta / p)
        for _ in range(tau - 1):
            x = x - eh * x
        return np.append(x, c)

    np.testing.assert_allclose(theory.easgd_full_matrix(eh, alpha, p, beta, tau), as_matrix(period, p + 1), atol=1e-14)


@given(eh=st.floats(0, 2), alpha=st.floats(-1, 2), p=st.integers(1, 5), tau=st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_the_full_matrix_is_the_reduced_one_and_the_disagreement(eh: float, alpha: float, p: int, tau: int) -> None:
    full = theory.easgd_full_matrix(eh, alpha, p, tau=tau)
    mean = np.vstack([np.append(np.full(p, 1 / p), 0), np.eye(p + 1)[p]])
    np.testing.assert_allclose(mean @ full, theory.easgd_matrix(eh, alpha, p * alpha, tau) @ mean, atol=1e-12)
    if p > 1:
        difference = np.eye(p + 1)[0] - np.eye(p + 1)[1]
        factor = theory.easgd_disagreement_factor(eh, alpha, tau)
        np.testing.assert_allclose(difference @ full, factor * difference, atol=1e-12)


def test_radius_at_the_papers_setting() -> None:
    assert theory.spectral_radius(theory.easgd_matrix(0.1, 0.225, 0.9)) == pytest.approx(0.9215002341, abs=1e-10)


@given(eh=rates, alpha=rates, beta=rates, p=st.integers(1, 5))
@settings(max_examples=500, deadline=None)
def test_stable_is_a_radius_below_one(eh: float, alpha: float, beta: float, p: int) -> None:
    reduced = theory.spectral_radius(theory.easgd_matrix(eh, alpha, beta))
    full = theory.spectral_radius(theory.easgd_full_matrix(eh, alpha, p, beta))
    assume(abs(reduced - 1) > 1e-6 and abs(full - 1) > 1e-6)
    assert theory.easgd_is_stable(eh, alpha, beta, p=1) == (reduced < 1)
    assert theory.easgd_is_stable(eh, alpha, beta, p) == (full < 1)


def test_stable_is_a_radius_below_one_in_twenty_thousand_draws() -> None:
    rng = np.random.default_rng(0)
    eh, alpha, beta = rng.uniform([0, -2, 0], [3, 3, 3], (20_000, 3)).T
    reduced = np.array([[1 - eh - alpha, alpha], [beta, 1 - beta]]).transpose(2, 0, 1)
    radius = np.abs(np.linalg.eigvals(reduced)).max(axis=1)
    radius_of_two = np.maximum(radius, np.abs(1 - eh - alpha))
    clear = (np.abs(radius - 1) > 1e-9) & (np.abs(radius_of_two - 1) > 1e-9)
    assert clear.mean() > 0.99
    for one, r, r2 in zip(np.column_stack([eh, alpha, beta])[clear], radius[clear], radius_of_two[clear]):
        assert theory.easgd_is_stable(*one, p=1) == (r < 1)
        assert theory.easgd_is_stable(*one) == (r2 < 1)


@given(eh=st.floats(1e-3, 3), alpha=st.floats(0, 3), beta=st.floats(1e-3, 3), p=st.integers(1, 5))
@settings(max_examples=500, deadline=None)
def test_with_a_positive_moving_rate_the_region_is_that_of_the_thesis(
    eh: float, alpha: float, beta: float, p: int
) -> None:
    margins = ((2 - eh) * (2 - beta) - 2 * alpha, (2 - eh) + (2 - beta) - alpha)
    assume(min(map(abs, margins)) > 1e-9)
    assert theory.easgd_is_stable(eh, alpha, beta, p) == (min(margins) > 0)


def test_with_a_negative_moving_rate_the_thesis_region_is_not_enough() -> None:
    eh, alpha, beta = 0.1, -0.95, 0.9
    assert (2 - eh) * (2 - beta) > 2 * alpha
    assert (2 - eh) + (2 - beta) > alpha
    assert theory.spectral_radius(theory.easgd_matrix(eh, alpha, beta)) > 1
    assert not theory.easgd_is_stable(eh, alpha, beta, p=1)


@pytest.mark.parametrize(
    ("eh", "alpha", "p"), [(0.1, 0.225, 4), (0.5, 0.3, 3), (0.1, 0.0, 2), (0.02, -0.01, 5), (1, 1, 1)]
)
def test_mean_of_the_center(eh: float, alpha: float, p: int) -> None:
    x = np.random.default_rng(p).normal(size=p)
    c, start = 0.7, x
    for t in range(30):
        assert theory.easgd_mean(t, eh, alpha, p, start, 0.7) == pytest.approx(c, abs=1e-10)
        x, c = synchronous_step(x, c, eh, alpha, alpha)


def test_mean_of_the_center_at_rest() -> None:
    assert theory.easgd_mean(3, 0.5, 0.0, 1, [1.0], 1.0) == 1.0  # a center that nothing moves
    assert theory.easgd_mean(4, 0.0, 0.0, 2, [1.0, 2.0], 3.0) == 3.0  # G = F = 1


@pytest.mark.parametrize(("tau", "center"), [(1, 0.9840053316), (5, 0.7260236371)])
def test_fixed_point_of_unequal_workers(tau: int, center: float) -> None:
    eta, rho = 0.1, 1.5
    found, workers = theory.easgd_fixed_point(H, B, eta, eta * rho, tau)
    assert found == pytest.approx(center, abs=1e-10)
    x, c = np.zeros(4), 0.0
    for _ in range(3000):
        x, c = x - eta * H * (x - B) - eta * rho * (x - c), c + eta * rho * float(np.sum(x - c))
        for _ in range(tau - 1):
            x = x - eta * H * (x - B)
    assert found == pytest.approx(c, abs=1e-10)
    np.testing.assert_allclose(workers, x, atol=1e-10)


def test_fixed_point_is_that_of_the_moreau_envelopes_and_not_the_minimum() -> None:
    rho = 1.5
    center, workers = theory.easgd_fixed_point(H, B, 0.1, 0.1 * rho)
    w = H * rho / (H + rho)
    assert center == pytest.approx(w @ B / w.sum(), abs=1e-12)
    np.testing.assert_allclose(workers, (H * B + rho * center) / (H + rho), atol=1e-12)
    assert abs(center - H @ B / H.sum()) > 0.5
    equal = np.ones(4)
    assert theory.easgd_fixed_point(equal, B, 0.1, 0.15, 5)[0] == pytest.approx(B.mean(), abs=1e-12)


@pytest.mark.parametrize(
    ("eh", "delta", "radius"),
    [
        (0.1, 0, 0.921500),
        (0.1, 0.5, 0.833718),
        (0.1, 0.9, 0.890256),
        (0.1, 0.99, 0.934531),
        (0.01, 0, 0.992014),
        (0.01, 0.5, 0.983959),
        (0.01, 0.9, 0.942998),
        (0.01, 0.99, 0.989103),
    ],
)
def test_radius_of_eamsgd(eh: float, delta: float, radius: float) -> None:
    assert theory.spectral_radius(theory.eamsgd_matrix(eh, 0.225, 0.9, delta)) == pytest.approx(radius, abs=1e-6)


@pytest.mark.parametrize("tau", [1, 3])
def test_the_eamsgd_matrix_is_the_algorithm(tau: int) -> None:
    eh, alpha, beta, delta = 0.2, 0.15, 0.6, 0.8

    def period(s: np.ndarray) -> np.ndarray:
        v, x, c = s
        for step in range(tau):
            pull, old = (alpha, beta) if step == 0 else (0.0, 0.0), x
            v = delta * v - eh * (old + delta * v)
            x, c = old + v - pull[0] * (old - c), c + pull[1] * (old - c)
        return np.array([v, x, c])

    np.testing.assert_allclose(theory.eamsgd_matrix(eh, alpha, beta, delta, tau), as_matrix(period, 3), atol=1e-14)


def test_eamsgd_without_momentum_is_easgd() -> None:
    matrix = theory.eamsgd_matrix(0.1, 0.225, 0.9, 0.0, tau=3)
    np.testing.assert_allclose(matrix[1:, 1:], theory.easgd_matrix(0.1, 0.225, 0.9, tau=3), atol=1e-15)


def test_optimal_moving_rate_at_the_papers_center_rate() -> None:
    assert theory.optimal_moving_rate(0.1, 0.9) == pytest.approx((-0.4, 0.7), abs=1e-12)


@given(eh=st.floats(0.01, 1.5), beta=st.floats(0.05, 1.5))
@settings(max_examples=30, deadline=None)
def test_no_moving_rate_on_a_grid_is_better_than_the_optimal_one(eh: float, beta: float) -> None:
    best, radius = theory.optimal_moving_rate(eh, beta)
    grid = np.linspace(best - 0.5, best + 0.5, 1001)  # holds the optimum in its middle
    radii = [theory.spectral_radius(theory.easgd_matrix(eh, alpha, beta)) for alpha in grid]
    if eh * beta < 1:  # beyond, 1 - sqrt(eh*beta) is negative and its modulus is no minimum
        assert best <= 0
        assert min(radii) > radius - 1e-6
        assert abs(grid[int(np.argmin(radii))] - best) < 0.0011
        assert theory.spectral_radius(theory.easgd_matrix(eh, best, beta)) == pytest.approx(radius, abs=1e-6)


def test_a_negative_moving_rate_is_momentum() -> None:
    eh, delta = 0.1, 0.6
    dh = delta * (1 - eh)
    elastic = np.linalg.eigvals(theory.easgd_matrix(eh, -dh, 1.0))
    momentum = np.linalg.eigvals(theory.msgd_matrix(eh, delta))
    np.testing.assert_allclose(np.sort_complex(elastic), np.sort_complex(momentum), atol=1e-12)


def test_workers_move_apart_under_the_optimal_moving_rate() -> None:
    best, _ = theory.optimal_moving_rate(0.1, 0.9)
    assert theory.easgd_disagreement_factor(0.1, best) == pytest.approx(1.3)
    assert theory.easgd_is_stable(0.1, best, 0.9, p=1)
    assert not theory.easgd_is_stable(0.1, best, 0.9, p=4)


@pytest.mark.parametrize("rates", [(0.0, 0.9), (0.1, 0.0), (-0.1, 0.9)])
def test_optimal_moving_rate_needs_positive_rates(rates: tuple[float, float]) -> None:
    with pytest.raises(UsageError, match="positive"):
        theory.optimal_moving_rate(*rates)


@pytest.mark.parametrize("tau", [1, 3])
@pytest.mark.parametrize("grad_point", ["pre", "post"])
@pytest.mark.parametrize("order", ["jacobi", "center_first", "worker_first"])
def test_the_matrix_of_an_order_is_the_algorithm(order: str, grad_point: str, tau: int) -> None:
    eh, alpha, beta = 0.2, 0.3, 0.7

    def period(s: np.ndarray) -> np.ndarray:
        x, c = s
        g = eh * x if grad_point == "pre" else 0.0
        if order == "center_first":
            c = c + beta * (x - c)
            x = x - g - alpha * (x - c)
        elif order == "worker_first":
            x = x - g - alpha * (x - c)
            c = c + beta * (x - c)
        else:
            x, c = x - g - alpha * (x - c), c + beta * (x - c)
        for _ in range(tau - (grad_point == "pre")):
            x = x - eh * x
        return np.array([x, c])

    matrix = theory.elastic_order_matrix(eh, alpha, beta, order=order, grad_point=grad_point, tau=tau)
    np.testing.assert_allclose(matrix, as_matrix(period, 2), atol=1e-14)


@pytest.mark.parametrize("order", ["center_first", "worker_first"])
def test_both_gauss_seidel_orders_have_the_stated_spectrum(order: str) -> None:
    eh, alpha, beta = 0.05, 0.3, 0.7
    matrix = theory.elastic_order_matrix(eh, alpha, beta, order=order)
    assert np.trace(matrix) == pytest.approx(2 - eh - alpha - beta + alpha * beta, abs=1e-14)
    assert np.linalg.det(matrix) == pytest.approx((1 - eh - alpha) * (1 - beta), abs=1e-14)


@given(eh=rates, alpha=rates, beta=rates)
@settings(max_examples=500, deadline=None)
def test_gauss_seidel_stable_is_a_radius_below_one(eh: float, alpha: float, beta: float) -> None:
    radii = [
        theory.spectral_radius(theory.elastic_order_matrix(eh, alpha, beta, order=order))
        for order in ("center_first", "worker_first")
    ]
    assume(all(abs(r - 1) > 1e-6 for r in (*radii, abs(1 - eh - alpha))))
    assert theory.gauss_seidel_is_stable(eh, alpha, beta, p=1) == (radii[0] < 1) == (radii[1] < 1)
    assert theory.gauss_seidel_is_stable(eh, alpha, beta) == (max(*radii, abs(1 - eh - alpha)) < 1)


def test_the_gauss_seidel_region_strictly_contains_the_jacobi_region() -> None:
    draws = np.random.default_rng(1).uniform([0, 0, 0], [2, 2, 1], (5000, 3))
    jacobi = np.array([theory.easgd_is_stable(*one) for one in draws])
    gauss_seidel = np.array([theory.gauss_seidel_is_stable(*one) for one in draws])
    assert (gauss_seidel >= jacobi).all()
    assert gauss_seidel.sum() > jacobi.sum() + 100


def test_full_exchange_is_sgd_in_gauss_seidel_order_and_unstable_in_jacobi_order() -> None:
    for eh in (0.01, 0.1, 1.0):
        for order in ("center_first", "worker_first"):
            matrix = theory.elastic_order_matrix(eh, 1.0, 1.0, order=order)
            assert theory.spectral_radius(matrix) == pytest.approx(1 - eh, abs=1e-12)
        assert theory.spectral_radius(theory.elastic_order_matrix(eh, 1.0, 1.0)) > 1


def test_downpour_and_averaging_are_members_of_the_family() -> None:
    eh, p, start = 0.05, 4, np.ones(2)
    downpour = theory.elastic_order_matrix(eh, 1.0, p, order="center_first", grad_point="post")
    averaging = theory.elastic_order_matrix(eh, 1.0, 1.0, order="center_first", grad_point="post", tau=5)
    for k in range(8):
        # The center of the k-th exchange is the first row's start: k periods, then the exchange's center.
        assert (np.linalg.matrix_power(downpour, k + 1) @ start)[1] == pytest.approx((1 - p * eh) ** k, abs=1e-12)
        assert (np.linalg.matrix_power(averaging, k + 1) @ start)[1] == pytest.approx((1 - eh) ** (5 * k), abs=1e-12)
