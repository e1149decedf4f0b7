"""Contraction of gossip, checked against all draws and by Monte Carlo."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mpitrain import theory
from mpitrain.errors import UsageError


def pull(x: np.ndarray, peers: np.ndarray) -> np.ndarray:
    """Average every worker with its peer. x: (n, p), peers: (n, p)."""
    return (x + np.take_along_axis(x, peers, axis=1)) / 2


def push(x: np.ndarray, peers: np.ndarray) -> np.ndarray:
    """Average every worker with all vectors it received. x: (n, p), peers: (n, p)."""
    total, count = x.copy(), np.ones_like(x)
    rows = np.arange(len(x))
    for i in range(x.shape[1]):
        total[rows, peers[:, i]] += x[:, i]
        count[rows, peers[:, i]] += 1
    return total / count


def all_draws(p: int) -> np.ndarray:
    """Return every choice of peers, shape ((p-1)^p, p)."""
    return np.array(list(itertools.product(*[[j for j in range(p) if j != i] for i in range(p)])))


def ratios(step, p: int, peers: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return V'/V and the squared shift of the mean over V for each draw."""
    x = np.random.default_rng(seed).normal(size=p)
    v = ((x - x.mean()) ** 2).sum()
    new = step(np.tile(x, (len(peers), 1)), peers)
    means = new.mean(axis=1)
    return ((new - means[:, None]) ** 2).sum(axis=1) / v, (means - x.mean()) ** 2 / v


@pytest.mark.parametrize(("p", "value"), [(2, 0.0), (3, 0.1875), (4, 0.2777777778), (5, 0.328125), (6, 0.36)], ids=str)
def test_contraction_of_pulls(p: int, value: float) -> None:
    assert theory.pull_contraction(p) == pytest.approx(value, abs=1e-10)
    contraction, shift = ratios(pull, p, all_draws(p))
    assert contraction.mean() == pytest.approx(value, abs=1e-10)
    assert theory.pull_mean_variance(p) == pytest.approx(shift.mean(), abs=1e-12)


@pytest.mark.parametrize(("p", "value"), [(2, 0.0), (3, 0.3541667), (4, 0.4482168), (5, 0.4946615), (6, 0.5223584)])
def test_contraction_of_pushes(p: int, value: float) -> None:
    assert theory.push_contraction(p) == pytest.approx(value, abs=1e-7)
    contraction, shift = ratios(push, p, all_draws(p))
    assert theory.push_contraction(p) == pytest.approx(contraction.mean(), abs=1e-12)
    assert theory.push_mean_variance(p) == pytest.approx(shift.mean(), abs=1e-12)


@pytest.mark.parametrize("p", [9, 32])
@pytest.mark.parametrize("scheme", ["pull", "push"])
def test_contraction_of_many_workers_by_simulation(scheme: str, p: int) -> None:
    n = 20_000
    rng = np.random.default_rng(p)
    peers = (np.arange(p) + rng.integers(1, p, (n, p))) % p
    step, contraction, shift = {
        "pull": (pull, theory.pull_contraction, theory.pull_mean_variance),
        "push": (push, theory.push_contraction, theory.push_mean_variance),
    }[scheme]
    measured, shifts = ratios(step, p, peers, seed=p)
    assert measured.mean() == pytest.approx(contraction(p), abs=4 * measured.std() / np.sqrt(n))
    assert shifts.mean() == pytest.approx(shift(p), abs=4 * shifts.std() / np.sqrt(n))


def test_pushing_is_slower_than_pulling_and_both_have_a_limit() -> None:
    for p in (3, 10, 100, 1000):
        assert theory.pull_contraction(p) < theory.push_contraction(p) < 1
    assert theory.pull_contraction(10**6) == pytest.approx(1 / 2, abs=1e-5)
    assert theory.push_contraction(10**6) == pytest.approx(1 - np.exp(-1), abs=1e-5)


@pytest.mark.parametrize("function", [theory.pull_contraction, theory.push_contraction, theory.push_mean_variance])
def test_gossip_needs_two_workers(function) -> None:
    with pytest.raises(UsageError, match="two workers"):
        function(1)


@pytest.mark.parametrize(("p", "error"), [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (12, 1 / 24), (6, 1 / 12)])
def test_one_period_of_the_exponential_graph(p: int, error: float) -> None:
    assert theory.exponential_graph_error(p) == pytest.approx(error, abs=1e-15)
