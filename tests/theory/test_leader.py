"""Followers and traps, checked by iteration, gradient flow and finite differences."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mpitrain import theory


@given(eh=st.floats(0, 2), lam=st.floats(-1, 3))
@settings(max_examples=50, deadline=None)
def test_a_follower_converges_to_its_leader_where_its_factor_is_below_one(eh: float, lam: float) -> None:
    leader, follower = 1.0, 1.5
    new_leader, new_follower = leader - eh * leader, follower - eh * follower - lam * (follower - leader)
    factor = theory.follower_factor(eh, lam)
    assert new_follower - new_leader == pytest.approx(factor * (follower - leader), abs=1e-12)
    assume(abs(abs(factor) - 1) > 1e-9)
    assert theory.follower_is_stable(eh, lam) == (abs(factor) < 1)


@pytest.mark.parametrize(("lam", "rest"), [(0.024, -0.6), (0.026, 1.0), (0.01, -0.8873), (0.02, -0.7236)])
def test_the_limit_of_a_follower_in_the_other_well(lam: float, rest: float) -> None:
    eta, leader, follower = 0.1, 0.9, -0.85
    for _ in range(20_000):
        leader, follower = (
            leader - eta * theory.double_well_gradient(leader),
            follower - eta * theory.double_well_gradient(follower) - lam * (follower - leader),
        )
    assert follower == pytest.approx(rest, abs=1e-4)
    trapped = theory.trapped_follower(lam, eta)
    assert (trapped is None) == (lam / eta > theory.LEADER_TRAP)
    assert (1.0 if trapped is None else trapped) == pytest.approx(follower, abs=1e-9)


def test_the_gradient_is_the_derivative_of_the_double_well() -> None:
    x, step = np.linspace(-2, 2, 41), 1e-6
    above, below = ((1 - (x + side) ** 2) ** 2 / 4 for side in (step, -step))
    np.testing.assert_allclose(theory.double_well_gradient(x), (above - below) / (2 * step), atol=1e-8)


def elastic_gradient(s: np.ndarray, rho: float) -> np.ndarray:
    """Return the gradient of sum f(x_i) + rho/2 sum (x_i - c)^2 at s = (x_1, ..., x_p, c)."""
    x, c = s[:-1], s[-1]
    return np.append(x**3 - x + rho * (x - c), -rho * (x - c).sum())


def test_the_hessian_is_the_derivative_of_the_gradient() -> None:
    s, rho, step = np.array([0.3, -0.8, 1.2, 0.1]), 0.7, 1e-6
    columns = [
        (elastic_gradient(s + step * e, rho) - elastic_gradient(s - step * e, rho)) / (2 * step) for e in np.eye(4)
    ]
    np.testing.assert_allclose(theory.elastic_double_well_hessian(s[:3], rho), columns, atol=1e-8)


@given(rho=st.floats(0.01, 1.5))
@settings(max_examples=100, deadline=None)
def test_the_trap_is_a_minimum_below_two_thirds(rho: float) -> None:
    trap = theory.trapped_easgd(rho)
    assert (trap is None) == (rho >= 1)
    if trap is not None:
        np.testing.assert_allclose(elastic_gradient(np.array(trap), rho), 0, atol=1e-12)
        smallest = np.linalg.eigvalsh(theory.elastic_double_well_hessian(trap[:2], rho))[0]
        assume(abs(smallest) > 1e-9)
        assert (smallest > 0) == (rho < theory.EASGD_TRAP)


@pytest.mark.parametrize("rho", [0.3, 0.6, 0.7, 0.9])
def test_easgd_ends_in_the_trap_below_two_thirds(rho: float) -> None:
    eta, s = 0.05, np.array([0.9, -0.899, 0.0])
    for _ in range(40_000):
        s = s - eta * elastic_gradient(s, rho)
    expected = theory.trapped_easgd(rho) if rho < theory.EASGD_TRAP else (1, 1, 1)
    np.testing.assert_allclose(s, expected, atol=1e-8)
