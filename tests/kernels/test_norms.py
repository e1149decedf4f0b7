"""Norms of vectors of any dtype and length are those of float64, and allocate no vector."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from mpitrain.kernels.norms import BLOCK, distance, norm, powers, powers_of_sum, root, total

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 17])
def test_norms_are_those_of_float64(dtype, n):
    x, y = np.random.default_rng(n).normal(size=(2, n)).astype(dtype)
    wide_x, wide_y = x.astype(np.float64), y.astype(np.float64)
    assert norm(x) == pytest.approx(np.sqrt((wide_x**2).sum()), rel=1e-13)
    assert distance(x, y) == pytest.approx(np.sqrt(((wide_x - wide_y) ** 2).sum()), rel=1e-13)


def test_many_small_elements_count_beside_a_large_one():
    x = np.full(2**21, 1.0, np.float32)
    x[0] = 2.0**13  # its square is 2^26: each 1 is below half of its float32 unit
    assert norm(x) == np.sqrt(2.0**26 + 2**21 - 1)


def test_float16_does_not_overflow():
    x = np.full(1000, 300.0, np.float16)
    assert norm(x) == pytest.approx(300 * np.sqrt(1000), rel=1e-14)
    assert distance(x, -x) == pytest.approx(600 * np.sqrt(1000), rel=1e-14)


def test_norms_of_non_finite_vectors_are_not_finite():
    assert norm(np.array([1.0, np.inf])) == np.inf
    assert np.isnan(norm(np.array([1.0, np.nan])))
    assert np.isnan(distance(np.array([np.inf]), np.array([np.inf])))


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_allocate_no_vector(dtype):
    x, y = np.random.default_rng(0).normal(size=(2, 500_000)).astype(dtype)
    norm(x)
    tracemalloc.start()
    try:
        norm(x)
        distance(x, y)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < x.nbytes / 15


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, np.inf])
@pytest.mark.parametrize("k", [1, 3])
def test_a_norm_of_any_order_comes_from_the_powers_of_the_parts_of_a_sum(order, k):
    addends = np.random.default_rng(k).normal(size=(k, 2 * BLOCK + 17)).astype(np.float32)
    wanted = np.linalg.norm(addends.astype(np.float64).sum(axis=0), order)
    found = [powers_of_sum(list(addends[:, part]), order) for part in (slice(0, 5), slice(5, 5), slice(5, None))]
    assert root(total(found, order), order) == pytest.approx(wanted, rel=1e-13)
    if k == 1:
        assert root(powers(addends[0], order), order) == pytest.approx(wanted, rel=1e-13)


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, np.inf])
@pytest.mark.parametrize("at", [0, BLOCK + 3])
def test_norms_of_any_order_keep_a_nan(order, at):
    x = np.ones(3 * BLOCK, np.float32)
    x[at] = np.nan
    assert np.isnan(powers(x, order))
    assert np.isnan(root(total([1.0, powers(x, order), 2.0], order), order))
