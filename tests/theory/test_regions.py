"""Warnings before a run: when they appear, and that the settings they recommend are stable."""

from __future__ import annotations

import re

import numpy as np
import pytest

from mpitrain import theory


@pytest.mark.parametrize("p", [1, 2, 3, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("tau", [1, 2, 5, 10, 20, 64])
def test_downpour_is_warned_about_below_a_twentieth(p: int, tau: int) -> None:
    warning = theory.downpour_warning(p, tau)
    assert (warning is None) == theory.downpour_is_stable(0.05 * (1 - 1e-9), p, tau)
    if warning is not None:
        assert f"{theory.downpour_largest_eh(p, tau):.2g}" in warning
        inside = re.search(r"period (\d+) or less", warning)
        if inside:
            assert theory.downpour_warning(p, int(inside[1])) is None
            assert theory.downpour_warning(p, int(inside[1]) + 1) is not None
        else:
            assert theory.downpour_warning(p, 1) is not None
            assert f"divide the learning rate by {p}" in warning


@pytest.mark.parametrize("p", [1, 4, 16, 32, 64, 128])
def test_agn_is_warned_about_below_a_twentieth(p: int) -> None:
    for tau in range(1, 100):
        warning = theory.agn_warning(p, tau)
        assert (warning is None) == (theory.agn_largest_eh(p, tau) >= 0.05)
        if warning is not None:
            inside = re.search(r"period (\d+) or more", warning)
            assert inside
            assert theory.agn_warning(p, int(inside[1])) is None
    assert theory.agn_warning(4, 1) is None
    assert theory.agn_warning(64, 1) is not None


def test_momentum_at_the_master_is_warned_about() -> None:
    assert theory.mdownpour_warning(1, 0.9) is None
    assert theory.mdownpour_warning(8, 0.0) is None
    assert "below 0.0017; without momentum it is stable below 0.21" in (theory.mdownpour_warning(8, 0.99) or "")


@pytest.mark.parametrize("p", [1, 2, 4, 16, 100])
@pytest.mark.parametrize("synchronous", [True, False])
def test_the_papers_moving_rate_gets_no_warning(p: int, synchronous: bool) -> None:
    assert theory.elastic_warning(p, 0.9 / p, synchronous=synchronous) is None
    assert theory.elastic_warning(p, 0.43 / p, 0.43, synchronous=synchronous) is None
    assert theory.elastic_warning(p, 0.0, synchronous=synchronous) is None


@pytest.mark.parametrize(
    ("p", "alpha", "beta", "synchronous", "expected"),
    [
        (4, -0.4, None, True, "momentum on the workers' mean, and workers move apart"),
        (1, -0.4, None, True, "momentum on the workers' mean; moving_rate 0.9 "),
        (4, -0.1, 0.9, False, "negative"),
        (8, 0.5, None, True, "for no learning rate: .* below 2 .*p.moving_rate, 4.*0.113"),
        (4, 1.0, 1.2, True, "center rate 1.2 is stable for no learning rate"),
        (8, 0.5, None, False, "p.moving_rate is 4, and above 1"),
        (4, 0.3, None, True, r"p.moving_rate is 1.2, and above 1 .*0.225 \(0.9/p\) is inside"),
        (4, 0.1, 1.2, True, "the center rate is 1.2"),
        (4, 0.98, 1.0, True, "only where learning rate times curvature is below 0.04"),
        (4, 1.2, None, False, "moving_rate must be below 1"),
        (4, 0.1, 7.8, False, "center rate 1.95 is stable for no learning rate: moving rate . center rate must"),
        (4, 0.99, None, False, "only where learning rate times curvature is below 0.04"),
    ],
)
def test_elastic_settings_outside_the_region_get_a_warning(
    p: int, alpha: float, beta: float | None, synchronous: bool, expected: str
) -> None:
    warning = theory.elastic_warning(p, alpha, beta, synchronous=synchronous)
    assert warning is not None
    assert re.search(expected, warning)
    assert "\n" not in warning


def test_elastic_warnings_agree_with_the_stable_region() -> None:
    for alpha in (0.0, 0.1, 0.3, 0.5, 0.9, 1.1, 1.5):
        for beta in (0.1, 0.45, 0.85, 1.3, 1.95, 2.5):
            warning = theory.elastic_warning(4, alpha, beta) or ""
            stable_somewhere = any(theory.easgd_is_stable(eh / 100, alpha, beta) for eh in range(1, 300))
            assert ("no learning rate" in warning) == (not stable_somewhere)
    for alpha in (0.1, 0.5, 0.97, 0.999, 1.0, 1.5):
        warning = theory.elastic_warning(1, alpha, synchronous=False) or ""
        assert ("below" in warning) == (alpha > theory.round_robin_easgd_bound(0.05))


@pytest.mark.parametrize("p", [1, 3])
def test_warnings_about_separate_rates_agree_with_a_round_robin_sweep(p: int) -> None:
    for a_w in (0.1, 0.6, 1.2, 1.7):
        for a_c in (0.05, 0.4, 0.9, 1.5, 1.95):
            warning = theory.elastic_warning(p, a_w, p * a_c, synchronous=False) or ""
            stable_somewhere = any(_sweep_radius(p, eh / 100, a_w, a_c) < 1 for eh in range(1, 200, 3))
            assert ("no learning rate" in warning) == (not stable_somewhere)


def _sweep_radius(p: int, eh: float, a_w: float, a_c: float) -> float:
    """Return the spectral radius of a sweep: each worker in turn takes a gradient and exchanges."""
    sweep = np.eye(p + 1)
    for i in range(p):
        turn = np.eye(p + 1)
        turn[i, i], turn[i, p] = 1 - eh - a_w, a_w
        turn[p, i], turn[p, p] = a_c, 1 - a_c
        sweep = turn @ sweep
    return float(np.abs(np.linalg.eigvals(sweep)).max())


def test_slow_and_outer_momentum() -> None:
    assert theory.slowmo_warning(1.0, 0.5) is None
    assert theory.slowmo_warning(2.99, 0.5) is None
    assert "between 0 and 3" in (theory.slowmo_warning(3.0, 0.5) or "")
    assert theory.slowmo_warning(0.0, 0.5) is not None
    assert theory.diloco_warning(0.7, 0.9) is None
    assert "between 0 and 1.36" in (theory.diloco_warning(1.4, 0.9) or "")
    for alpha, momentum in ((1.0, 0.5), (2.9, 0.5), (3.1, 0.5), (1.4, 0.9), (1.3, 0.9)):
        long = 10_000  # local steps reduce the error to nothing
        assert (theory.slowmo_warning(alpha, momentum) is None) == theory.slowmo_is_stable(0.1, long, alpha, momentum)
        assert (theory.diloco_warning(alpha, momentum) is None) == theory.diloco_is_stable(0.1, long, alpha, momentum)
