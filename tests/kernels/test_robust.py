"""Distances, weighted sums and trimmed means across vectors match NumPy, for any length and dtype."""

import ml_dtypes
import numpy as np
import pytest

from mpitrain.kernels import accumulate
from mpitrain.kernels.robust import BLOCK, Rows

LENGTHS = [0, 1, BLOCK - 1, BLOCK, 2 * BLOCK + 5]
DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


def rows(k, n, dtype):
    made = Rows(k, n, dtype)
    made.values[...] = np.random.default_rng(n).normal(size=(k, n)).astype(dtype)
    return made, made.values.astype(np.float64)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_distances_are_those_of_the_chosen_rows(n, dtype):
    made, values = rows(6, n, dtype)
    chosen = np.array([1, 3, 4])
    found = made.squared_distances(chosen)
    expected = np.zeros((6, 6))
    for i in chosen:
        for j in chosen:
            expected[i, j] = ((values[i] - values[j]) ** 2).sum()
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert (found == found.T).all()
    assert not made.squared_distances(np.array([], int)).any()


def test_equal_rows_are_exactly_zero_apart_also_with_a_large_common_part():
    made = Rows(3, 5000, np.float32)
    made.values[:2] = 1e20 * np.random.default_rng(0).normal(size=5000)
    made.values[2] = made.values[0]
    made.values[2, 17] += 1e16
    squares = made.squared_distances(np.arange(3))
    assert squares[0, 1] == 0
    assert squares[0, 2] == squares[1, 2] == float(made.values[2, 17] - np.float64(made.values[0, 17])) ** 2


def test_a_distance_can_be_infinite():
    made = Rows(2, 3, np.float64)
    made.values[0] = 1e200
    assert made.squared_distances(np.arange(2)).tolist() == [[0, np.inf], [np.inf, 0]]


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_and_trimmed_means_are_rounded_once(n, dtype):
    made, values = rows(7, n, dtype)
    out = np.empty(n, dtype)
    weights = np.array([0.0, 0.3, -1.0, 0.0, 0.25, 0.2, 0.5])
    made.weighted_sum(weights, out)
    total = np.zeros(n)
    for weight, row in zip(weights, values, strict=True):
        total = total + weight * row
    assert out.tobytes() == total.astype(dtype).tobytes()
    for chosen in (np.arange(7), np.array([5, 0, 2, 6])):
        for n_cut in range((len(chosen) + 1) // 2):
            made.trimmed_mean(chosen, n_cut, out)
            expected = np.sort(values[chosen], axis=0)[n_cut : len(chosen) - n_cut].mean(axis=0)
            np.testing.assert_array_equal(out, expected.astype(dtype))
    assert (made.values.astype(np.float64) == values).all()


def test_rows_of_weight_zero_are_not_read():
    made = Rows(2, 4, np.float64)
    made.values[0], made.values[1], out = np.nan, 3.0, np.ones(4)
    made.weighted_sum(np.array([0.0, 2.0]), out)
    assert (out == 6).all()
    made.weighted_sum(np.zeros(2), out)
    assert (out == 0).all()


def test_a_non_finite_sum_is_reset_to_zero():
    sums = np.array([1.0, 3e38, 2.0, np.inf], np.float32)
    assert accumulate(sums, np.array([0.5, 3e38, np.nan, 1.0], np.float32), 1.0) == 3
    assert sums.tolist() == [1.5, 0, 0, 0]
