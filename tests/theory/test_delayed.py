"""Bounds of parameter servers, checked against eigenvalues and against the recursions themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mpitrain import theory
from mpitrain.errors import UsageError


def round_robin_centers(p: int, eh: float, tau: int, n_pushes: int, scale: float = 1.0) -> list[float]:
    """Return the centers when p workers in turn push ``scale`` times the displacement of tau steps, and pull."""
    c, pulled, centers = 1.0, [1.0] * p, []
    for k in range(n_pushes):
        i = k % p
        moved = pulled[i]
        for _ in range(tau):
            moved -= eh * moved
        c += scale * (moved - pulled[i])
        pulled[i] = c
        centers.append(c)
    return centers


@pytest.mark.parametrize(
    ("p", "bound"),
    [(1, 2.0), (2, 1.0), (3, 0.6180339887), (4, 0.4450418679), (8, 0.2090569265), (16, 0.1012983377)],
)
def test_bound(p: int, bound: float) -> None:
    assert theory.downpour_bound(p) == pytest.approx(bound, abs=1e-10)


@pytest.mark.parametrize("p", [1, 2, 3, 4, 5, 8, 16, 40])
def test_the_bound_is_where_the_radius_is_one(p: int) -> None:
    bound = theory.downpour_bound(p)
    assert theory.delayed_radius(bound, p) == pytest.approx(1, abs=1e-9)
    assert theory.delayed_radius(bound * (1 - 1e-4), p) < 1 < theory.delayed_radius(bound * (1 + 1e-4), p)


@given(p=st.integers(1, 12), q=st.floats(-0.5, 2.5))
@settings(max_examples=200, deadline=None)
def test_stable_is_a_radius_below_one(p: int, q: float) -> None:
    radius = theory.delayed_radius(q, p)
    assume(abs(radius - 1) > 1e-6)
    assert (0 < q < theory.downpour_bound(p)) == (radius < 1)


@pytest.mark.parametrize(
    ("p", "tau", "stable"), [(3, 40, False), (10, 5, False), (10, 1, True), (1, 200, True), (2, 40, True)]
)
def test_downpour_at_a_twentieth(p: int, tau: int, stable: bool) -> None:
    assert theory.downpour_is_stable(0.05, p, tau) == stable
    centers = np.abs(round_robin_centers(p, 0.05, tau, 400 * p))
    assert (centers[-p:].max() < 1e-3) == stable
    assert (centers[-p:].max() > 1e3) == (not stable)


@pytest.mark.parametrize("method", ["downpour", "agn", "dynsgd"])
def test_the_recursion_is_the_method_round_robin_centers(method: str) -> None:
    p, eh, tau = 4, 0.07, 3
    scale = {"downpour": 1.0, "agn": 1 / tau, "dynsgd": 1 / p}[method]
    q = {
        "downpour": theory.downpour_q(eh, tau),
        "agn": theory.agn_q(eh, tau),
        "dynsgd": theory.dynsgd_q(eh, tau, p),
    }[method]
    centers = round_robin_centers(p, eh, tau, 60, scale)
    state = np.ones(p)
    for c in centers:
        state = theory.delayed_matrix(q, p) @ state
        assert state[0] == pytest.approx(c, abs=1e-12)


@given(p=st.integers(1, 30), tau=st.integers(1, 50))
@settings(max_examples=100, deadline=None)
def test_largest_curvature_of_downpour(p: int, tau: int) -> None:
    eh = theory.downpour_largest_eh(p, tau)
    for fraction in (0.01, 0.5):
        assert theory.downpour_is_stable(fraction * eh, p, tau)
    if p > 2:  # with two workers an even period is stable beyond eh = 1 too
        assert theory.downpour_is_stable(eh * 0.999, p, tau)
        assert not theory.downpour_is_stable(eh * 1.001, p, tau)


@given(p=st.integers(1, 40), eh=st.floats(0.01, 1.99))
@settings(max_examples=200, deadline=None)
def test_largest_period_of_downpour(p: int, eh: float) -> None:
    largest = theory.downpour_largest_period(p, eh)
    n_stable = 0
    while n_stable < 30 and theory.downpour_is_stable(eh, p, n_stable + 1):
        n_stable += 1
    assert n_stable == min(largest, 30)


@pytest.mark.parametrize("p", range(3, 20))
def test_the_largest_period_excludes_a_period_exactly_at_the_bound(p: int) -> None:
    for tau in range(1, 40):
        eh = 1 - (1 - theory.downpour_bound(p)) ** (1 / tau)  # q(tau) is the bound, up to rounding
        largest = int(theory.downpour_largest_period(p, eh))
        assert largest == 0 or theory.downpour_is_stable(eh, p, largest)
        assert not theory.downpour_is_stable(eh, p, largest + 1) or largest == tau - 1


def test_largest_period_in_edge_cases() -> None:
    assert theory.downpour_largest_period(2, 0.05) == math.inf
    assert theory.downpour_largest_period(1, 1.5) == math.inf
    assert theory.downpour_largest_period(3, 0.05) == 18  # 0.95^18 = 0.397 > 1 - 0.618 > 0.95^19
    assert theory.downpour_largest_period(3, 0.7) == 0
    assert theory.downpour_largest_period(3, 0.0) == 0
    bound = theory.downpour_bound(5)
    assert theory.downpour_largest_period(5, bound) == 0  # the bound itself is unstable


@pytest.mark.parametrize("p", range(1, 65))
def test_safe_period_of_agn(p: int) -> None:
    safe, bound = theory.agn_safe_period(p), theory.downpour_bound(p)
    for eh in (0.01, 0.3, 0.99, 1.0):
        for tau in (safe, safe + 1, 3 * safe):
            assert theory.agn_q(eh, tau) <= min(eh, 1 / tau) * (1 + 1e-12)
            assert theory.agn_q(eh, tau) <= bound
    if safe > 1:
        assert theory.agn_q(1.0, safe - 1) > bound
    assert abs(safe - 0.64 * p) < 1.5


@given(p=st.integers(1, 64), tau=st.integers(1, 60))
@settings(max_examples=100, deadline=None)
def test_largest_curvature_of_agn(p: int, tau: int) -> None:
    eh, bound = theory.agn_largest_eh(p, tau), theory.downpour_bound(p)
    assert (eh == 1) == (tau >= theory.agn_safe_period(p))
    assert theory.agn_q(0.999 * eh, tau) < bound
    if eh < 0.999:
        assert theory.agn_q(1.001 * eh, tau) > bound


@given(p=st.integers(1, 200), tau=st.integers(1, 1000), eh=st.floats(1e-6, 0.999))
@settings(max_examples=100, deadline=None)
def test_dynsgd_is_always_stable_when_round_robin_centers(p: int, tau: int, eh: float) -> None:
    assert 0 < theory.dynsgd_q(eh, tau, p) < theory.downpour_bound(p)


@pytest.mark.parametrize("wrong", [(0, 1), (3, 0)])
def test_workers_and_steps_must_be_positive(wrong: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="at least one"):
        theory.downpour_largest_eh(*wrong)


@pytest.mark.parametrize(("p", "delta"), [(1, 0.9), (3, 0.0), (4, 0.6)])
def test_the_mdownpour_matrix_is_the_method_round_robin_centers(p: int, delta: float) -> None:
    eh, c, v = 0.03, 1.0, 0.0
    pulled = [1.0] * p
    state = np.array([1.0, 0.0] + [1.0] * p)
    for k in range(40):
        v = delta * v - eh * pulled[k % p]
        c += v
        pulled[k % p] = c + delta * v
        state = theory.mdownpour_matrix(eh, delta, p) @ state
        np.testing.assert_allclose(state[:3], [c, v, pulled[k % p]], atol=1e-12)


def test_mdownpour_is_momentum_sgd_with_one_worker_and_downpour_without_momentum() -> None:
    one, momentum = theory.mdownpour_matrix(0.1, 0.6, 1), theory.msgd_matrix(0.1, 0.6)
    assert theory.spectral_radius(one) == pytest.approx(theory.spectral_radius(momentum), abs=1e-12)
    for p in (1, 2, 4, 8):
        assert theory.mdownpour_largest_eh(p, 0.0) == pytest.approx(theory.downpour_bound(p), abs=1e-6)


@pytest.mark.parametrize(("p", "delta"), [(1, 0.9), (4, 0.5), (8, 0.99)])
def test_mdownpour_is_stable_up_to_its_largest_curvature(p: int, delta: float) -> None:
    largest = theory.mdownpour_largest_eh(p, delta)
    for fraction in (0.01, 0.3, 0.7, 0.99):
        assert theory.spectral_radius(theory.mdownpour_matrix(fraction * largest, delta, p)) < 1
    assert theory.spectral_radius(theory.mdownpour_matrix(1.01 * largest, delta, p)) > 1
    with pytest.raises(UsageError, match="momentum"):
        theory.mdownpour_largest_eh(4, 1.0)


@pytest.mark.parametrize(("eh", "p"), [(0.3, 5), (0.9, 2), (0.05, 16), (0.5, 1)])
def test_geometric_staleness_is_momentum(eh: float, p: int) -> None:
    mean = theory.geometric_staleness_mean(eh, p, 60)
    state = np.array([1.0, 1.0])
    for t in range(60):
        state = theory.implicit_momentum_matrix(eh, p) @ state
        assert mean[t + 1] == pytest.approx(state[0], abs=1e-14)
    assert theory.implicit_momentum(p) == 1 - 1 / p


def test_geometric_staleness_by_simulation() -> None:
    eh, p, n, n_steps = 0.4, 4, 20_000, 8
    rng = np.random.default_rng(0)
    x = np.zeros((n_steps + 1, n))
    x[0] = 1
    for t in range(n_steps):
        age = rng.geometric(1 / p, n) - 1
        gradient = np.where(age <= t, x[np.maximum(t - age, 0), np.arange(n)], 0)
        x[t + 1] = x[t] - eh * gradient
    expected = theory.geometric_staleness_mean(eh, p, n_steps)
    tolerance = 4 * x.std(axis=1) / np.sqrt(n)
    assert (np.abs(x.mean(axis=1) - expected) <= tolerance).all()


def test_the_equilibrium_is_the_limit_of_local_steps() -> None:
    h, rho, eta, minimum, center = 2.0, 5.0, 0.05, 1.0, -0.5
    x = 3.0
    for _ in range(500):
        x -= eta * h * (x - minimum) + eta * rho * (x - center)
    assert theory.elastic_equilibrium(h, rho, minimum, center) == pytest.approx(x, abs=1e-12)


@given(
    h=st.floats(0.1, 10), eh=st.floats(0.05, 1.5), rho=st.floats(0, 10), x=st.floats(-20, 20), center=st.floats(-5, 5)
)
@settings(max_examples=200, deadline=None)
def test_the_early_exchange_is_the_first_step_that_satisfies_the_rule(
    h: float, eh: float, rho: float, x: float, center: float
) -> None:
    eta = eh / h
    step = theory.early_exchange_step(h, eta, rho, x, center)
    margins = []
    for _ in range(step + 1):
        margins.append(abs(eta * h * x) - abs(eta * rho * (x - center)) - eta)
        x -= eta * h * x
    assume(min(map(abs, margins)) > 1e-9)
    assert margins[-1] < 0
    assert all(margin > 0 for margin in margins[:-1])


def test_the_early_exchange_without_coupling_waits_for_a_gradient_below_one() -> None:
    assert theory.early_exchange_step(2.0, 0.05, 0.0, 4.0, 0.0) == 20  # 8 * 0.9^20 = 0.97, 8 * 0.9^19 = 1.08
    with pytest.raises(UsageError, match="eta"):
        theory.early_exchange_step(2.0, 1.5, 0.0, 4.0, 0.0)
