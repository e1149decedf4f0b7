"""Sweeps of EASGD and ADMM, one worker at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpitrain import theory


@pytest.mark.parametrize(("p", "radius"), [(3, 0.9992697476), (8, 0.9991156981)])
def test_radius_of_an_easgd_sweep(p: int, radius: float) -> None:
    assert theory.spectral_radius(theory.round_robin_easgd_matrix(0.001, 0.0025, p)) == pytest.approx(radius, abs=1e-10)


@pytest.mark.parametrize(("p", "radius"), [(1, 0.9990024938), (2, 0.9990018719), (3, 1.0009738854), (8, 1.0022578662)])
def test_radius_of_an_admm_sweep(p: int, radius: float) -> None:
    assert theory.spectral_radius(theory.round_robin_admm_matrix(0.001, 2.5, p)) == pytest.approx(radius, abs=1e-10)


def test_the_easgd_sweep_is_the_algorithm() -> None:
    eh, alpha, p = 0.3, 0.2, 4
    s = np.random.default_rng(0).normal(size=p + 1)
    x, c = s[:p].copy(), s[p]
    for i in range(p):
        pull = alpha * (x[i] - c)
        x[i], c = x[i] - eh * x[i] - pull, c + pull
    np.testing.assert_allclose(theory.round_robin_easgd_matrix(eh, alpha, p) @ s, np.append(x, c), atol=1e-14)


@pytest.mark.parametrize("p", [1, 2, 5])
def test_the_admm_sweep_is_the_algorithm(p: int) -> None:
    eta, rho, h = 0.01, 3.0, 1.5
    s = np.random.default_rng(p).normal(size=2 * p + 1)
    lam, x, c = s[:p].copy(), s[p : 2 * p].copy(), s[2 * p]
    for i in range(p):
        lam[i] = lam[i] - (x[i] - c)
        x[i] = (x[i] - eta * h * x[i] + eta * rho * (lam[i] + c)) / (1 + eta * rho)
        c = sum(x[j] - lam[j] for j in range(p)) / p
    expected = np.concatenate([lam, x, [c]])
    np.testing.assert_allclose(theory.round_robin_admm_matrix(eta, rho, p, h) @ s, expected, atol=1e-13)


@given(eh=st.floats(0, 2), fraction=st.floats(0, 1), p=st.integers(1, 6))
@settings(max_examples=200, deadline=None)
def test_inside_the_bound_no_sweep_grows(eh: float, fraction: float, p: int) -> None:
    alpha = fraction * theory.round_robin_easgd_bound(eh)
    assert theory.spectral_radius(theory.round_robin_easgd_step(eh, alpha)) <= 1 + 1e-9
    assert theory.spectral_radius(theory.round_robin_easgd_matrix(eh, alpha, p)) <= 1 + 1e-9


@given(eh=st.floats(0, 2), excess=st.floats(1e-3, 1))
@settings(max_examples=200, deadline=None)
def test_outside_the_bound_a_single_turn_grows(eh: float, excess: float) -> None:
    alpha = theory.round_robin_easgd_bound(eh) + excess
    assert theory.spectral_radius(theory.round_robin_easgd_step(eh, alpha)) > 1


def test_just_outside_the_bound_a_sweep_may_still_be_stable() -> None:
    eh, alpha = 1.0885, 0.6598
    assert alpha > theory.round_robin_easgd_bound(eh)
    assert theory.spectral_radius(theory.round_robin_easgd_step(eh, alpha)) > 1
    assert theory.spectral_radius(theory.round_robin_easgd_matrix(eh, alpha, 2)) < 1


def test_admm_is_unstable_for_three_workers_and_more_and_easgd_never() -> None:
    grid = [(eta, rho) for eta in np.linspace(0.0005, 0.01, 12) for rho in np.linspace(0.5, 10, 12)]
    unstable = {
        p: np.mean([theory.spectral_radius(theory.round_robin_admm_matrix(*point, p)) > 1 for point in grid])
        for p in (1, 2, 3, 8)
    }
    assert unstable[1] == unstable[2] == 0
    assert 0.05 < unstable[3] < 0.25
    assert 0.25 < unstable[8] < 0.45
    for p in (3, 8):
        for eta, rho in grid:
            assert theory.spectral_radius(theory.round_robin_easgd_matrix(eta, eta * rho, p)) < 1


def test_admm_is_stable_at_the_largest_step_and_unstable_at_tiny_ones() -> None:
    for p in (3, 8):
        for rho in np.linspace(0.1, 10, 34):
            assert theory.spectral_radius(theory.round_robin_admm_matrix(0.01, rho, p)) < 1
            assert theory.spectral_radius(theory.round_robin_admm_matrix(1e-4, rho, p)) > 1


def test_admm_diverges_from_the_papers_start_where_easgd_converges() -> None:
    p, start = 8, 1000.0
    admm = np.concatenate([np.zeros(p), np.full(p + 1, start)])
    easgd = np.full(p + 1, start)
    sweep = theory.round_robin_admm_matrix(0.001, 2.5, p)
    elastic = theory.round_robin_easgd_matrix(0.001, 0.0025, p)
    centers = []
    for _ in range(6000):
        admm, easgd = sweep @ admm, elastic @ easgd
        centers.append(admm[-1])
    assert np.abs(centers[:4000]).min() < 200  # it comes near 0 first
    assert np.abs(centers[5000:]).max() > 2000
    assert np.abs(easgd).max() < 10
