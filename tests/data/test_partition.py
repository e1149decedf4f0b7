"""Partitions of the training set by a Dirichlet distribution over the classes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpitrain.data import Sampler
from mpitrain.data.partition import dirichlet_partition
from mpitrain.data.sampler import parse_sampling
from mpitrain.errors import UsageError

LABELS = np.random.default_rng(5).integers(10, size=4000)


def shares(labels: np.ndarray, parts: list[np.ndarray]) -> np.ndarray:
    """Return the share of each class in each part, (p, k)."""
    counts = np.array([np.bincount(labels[part], minlength=labels.max() + 1) for part in parts])
    return counts / counts.sum(axis=1, keepdims=True)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=12, max_size=90),
    st.lists(st.integers(1, 4), min_size=1, max_size=5),
    st.floats(1e-4, 1e4),
    st.integers(0, 3),
)
def test_every_sample_belongs_to_one_worker_and_sizes_are_proportional(labels, sizes, alpha, seed):
    labels = np.array(labels)
    parts = dirichlet_partition(labels, sizes, alpha, seed)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))
    for part, size in zip(parts, sizes, strict=True):
        assert abs(len(part) - len(labels) * size / sum(sizes)) <= 1
    again = dirichlet_partition(labels, sizes, alpha, seed)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


def test_another_seed_gives_another_partition():
    one, other = (dirichlet_partition(LABELS, [1, 1], 1.0, seed)[0] for seed in (0, 1))
    assert not np.array_equal(one, other)


def test_a_large_alpha_gives_every_worker_the_classes_of_the_whole_set():
    found = shares(LABELS, dirichlet_partition(LABELS, [1] * 4, 1e6, 0))
    expected = np.bincount(LABELS) / len(LABELS)
    assert abs(found - expected).max() < 5 * np.sqrt(0.1 * 0.9 / 1000)  # five deviations of a share of 1,000 samples


def test_a_small_alpha_gives_a_worker_few_classes():
    def largest(alpha: float) -> float:
        found = [shares(LABELS, dirichlet_partition(LABELS, [1] * 20, alpha, seed)) for seed in range(5)]
        return float(np.mean([of_one.max(axis=1).mean() for of_one in found]))

    by_alpha = [largest(alpha) for alpha in (0.1, 10.0, 1e4)]
    assert by_alpha == sorted(by_alpha, reverse=True)
    assert by_alpha[0] > 0.6
    assert by_alpha[2] < 0.2


def test_shares_have_the_variance_of_the_dirichlet_distribution():
    """Var q = p(1 - p)/(alpha + 1) for Dirichlet(alpha*p); sampling adds E[q(1 - q)]/m for m samples of a worker."""
    alpha, labels = 9.0, np.arange(40_000) % 2
    found = [shares(labels, dirichlet_partition(labels, [1] * 50, alpha, seed))[:, 0] for seed in range(40)]
    expected = 0.25 / (alpha + 1)
    assert np.var(np.concatenate(found)) == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("sizes", [[4, 4, 4], [2, 4, 6]])
def test_workers_draw_every_sample_once_in_each_pass(sizes):
    n = 120
    labels = LABELS[:n]
    drawn = []
    for rank, b in enumerate(sizes):
        sampler = Sampler(n, b, rank=rank, size=3, seed=3, mode="dirichlet:0.3", all_sizes=sizes, labels=labels)
        own = len(sampler.shard(0))
        first = np.concatenate([sampler.draw() for _ in range(own // b)])
        assert len(np.unique(first)) == len(first) == own
        np.testing.assert_array_equal(np.sort(first), sampler.shard(5))
        drawn.append(first)
    np.testing.assert_array_equal(np.sort(np.concatenate(drawn)), np.arange(n))


def test_a_restored_sampler_continues_and_another_alpha_is_refused():
    def sampler(mode: str) -> Sampler:
        return Sampler(120, 5, rank=1, size=2, mode=mode, labels=LABELS[:120])

    one, other = sampler("dirichlet:0.3"), sampler("dirichlet:0.3")
    one.draw()
    other.load(one.state())
    np.testing.assert_array_equal(one.draw(), other.draw())
    with pytest.raises(UsageError, match=r"alpha 0.3, this run 0.4"):
        sampler("dirichlet:0.4").load(one.state())


@pytest.mark.parametrize(
    "text", ["dirichlet", "dirichlet:", "dirichlet:0", "dirichlet:-1", "dirichlet:nan", "dirichlet:inf"]
)
def test_alpha_must_be_above_zero(text):
    with pytest.raises(UsageError, match="needs a number above 0"):
        parse_sampling(text)


@pytest.mark.parametrize("text", ["random", "sharded:2", "dirichlett:1"])
def test_unknown_sampling_is_refused(text):
    with pytest.raises(UsageError, match="unknown sampling"):
        parse_sampling(text)


def test_data_without_classes_are_refused():
    with pytest.raises(UsageError, match="needs data with one class per sample"):
        Sampler(50, 5, mode="dirichlet:1")


def test_parts_smaller_than_a_batch_are_refused():
    with pytest.raises(UsageError, match="fewer workers"):
        Sampler(50, 20, size=3, mode="dirichlet:1", labels=LABELS[:50])
