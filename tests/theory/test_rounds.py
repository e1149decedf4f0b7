"""Local SGD, SlowMo, DiLoCo, Parle and SafeguardSGD, checked against the algorithms written out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mpitrain import theory
from mpitrain.errors import UsageError

H, B = np.array([0.5, 1.0, 2.0, 4.0]), np.array([1.0, -2.0, 0.5, 3.0])


def test_fixed_point_of_local_sgd() -> None:
    eta, tau, x = 0.1, 10, 0.0
    for _ in range(500):
        workers = np.full(4, x)
        for _ in range(tau):
            workers -= eta * H * (workers - B)
        x = workers.mean()
    assert theory.local_sgd_fixed_point(H, B, eta, tau) == pytest.approx(0.8596979111, abs=1e-10)
    assert theory.local_sgd_fixed_point(H, B, eta, tau) == pytest.approx(x, abs=1e-12)
    assert theory.local_sgd_fixed_point(H, B, eta, 1) == pytest.approx(H @ B / H.sum(), abs=1e-12)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (1.0, 0.5), (0.7, 0.9)])
def test_the_slowmo_matrix_is_the_algorithm(alpha: float, beta: float) -> None:
    eta, h, tau = 0.1, 1.5, 4
    x, u, state = 1.0, 0.2, np.array([0.2 * eta, 1.0])
    for _ in range(10):
        average = x
        for _ in range(tau):
            average -= eta * h * average
        u = beta * u + (x - average) / eta
        x -= alpha * eta * u
        state = theory.slowmo_matrix(eta * h, tau, alpha, beta) @ state
        np.testing.assert_allclose(state, [eta * u, x], atol=1e-13)


def test_slowmo_without_momentum_is_local_sgd_and_with_one_step_is_heavy_ball() -> None:
    assert theory.spectral_radius(theory.slowmo_matrix(0.1, 5, 1.0, 0.0)) == pytest.approx(0.9**5, abs=1e-14)
    eh, beta, x = 0.1, 0.6, [1.0, 1.0]
    for _ in range(10):
        x.append(x[-1] - eh * x[-1] + beta * (x[-1] - x[-2]))
    state = np.array([0.0, 1.0])
    for expected in x[2:]:
        state = theory.slowmo_matrix(eh, 1, 1.0, beta) @ state
        assert state[1] == pytest.approx(expected, abs=1e-13)


methods = st.tuples(st.floats(0, 2), st.integers(1, 6), st.floats(-1, 6), st.floats(0, 0.999))


@given(methods)
@settings(max_examples=300, deadline=None)
def test_slowmo_stable_is_a_radius_below_one(setting: tuple[float, int, float, float]) -> None:
    radius = theory.spectral_radius(theory.slowmo_matrix(*setting))
    assume(abs(radius - 1) > 1e-6)
    assert theory.slowmo_is_stable(*setting) == (radius < 1)


@given(methods)
@settings(max_examples=300, deadline=None)
def test_diloco_stable_is_a_radius_below_one(setting: tuple[float, int, float, float]) -> None:
    radius = theory.diloco_radius(*setting)
    assume(abs(radius - 1) > 1e-6)
    assert theory.diloco_is_stable(*setting) == (radius < 1)


def test_radius_of_diloco() -> None:
    assert theory.diloco_radius(0.05, 20, 0.7, 0.9) == pytest.approx(0.7041634264, abs=1e-10)
    assert theory.diloco_radius(0.05, 20, 1.0, 0.0) == pytest.approx(0.95**20, abs=1e-12)


def test_the_diloco_matrix_is_nesterovs_step_on_the_outer_gradient() -> None:
    eh, tau, alpha, delta = 0.05, 20, 0.7, 0.9
    theta, buffer, state = 1.0, 0.3, np.array([0.3, 1.0])
    for _ in range(10):
        gradient = theta - (1 - eh) ** tau * theta
        buffer = delta * buffer + gradient
        theta -= alpha * (gradient + delta * buffer)
        state = theory.diloco_matrix(eh, tau, alpha, delta) @ state
        np.testing.assert_allclose(state, [buffer, theta], atol=1e-13)


def test_parle_inner_steps() -> None:
    h, coupling, eta, x, y = 1.0, 0.5, 0.1, 1.0, 1.0
    for _ in range(25):
        y -= eta * (h * y + coupling * (y - x))
    assert theory.parle_inner_iterate(h, coupling, eta, x, 25) == pytest.approx(0.3447985399, abs=1e-10)
    assert theory.parle_inner_iterate(h, coupling, eta, x, 25) == pytest.approx(y, abs=1e-14)
    assert theory.parle_inner_fixed_point(h, coupling, x) == pytest.approx(1 / 3, abs=1e-15)
    assert theory.parle_inner_iterate(h, coupling, eta, x, 1000) == pytest.approx(1 / 3, abs=1e-12)


@given(n_good=st.integers(1, 12), drift=st.floats(0.05, 5), threshold=st.floats(0.1, 10))
@settings(max_examples=200, deadline=None)
def test_a_drifting_worker_is_detected_at_the_predicted_step(n_good: int, drift: float, threshold: float) -> None:
    ratio = 2 * threshold * n_good / drift
    assume(abs(ratio - round(ratio)) > 1e-6)  # a tie is decided by rounding
    step, distance = 0, 0.0
    while distance <= 2 * threshold:
        step, distance = step + 1, distance + drift / n_good
    assert theory.safeguard_detection_step(drift, threshold, n_good) == step
    assert theory.safeguard_detection_step(drift, threshold, n_good, window=step) == step
    assert theory.safeguard_detection_step(drift, threshold, n_good, window=step - 1) is None


def test_detection_in_edge_cases() -> None:
    assert theory.safeguard_detection_step(1.0, 2.0, 5) == 21  # 20 steps reach 2 * 2 exactly, which is not beyond it
    assert theory.safeguard_detection_step(0.0, 2.0, 5) is None
    with pytest.raises(UsageError, match="threshold"):
        theory.safeguard_detection_step(1.0, 0.0, 5)
