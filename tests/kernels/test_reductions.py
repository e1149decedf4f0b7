"""Reductions of many vectors have the bits of NumPy's sequential sum, whatever their number and length."""

import ml_dtypes
import numpy as np
import pytest

from mpitrain.kernels import reduce_broadcast, reduce_sum, sum_everywhere, sum_into, weighted_mix
from mpitrain.kernels.reductions import BLOCK

COUNTS = [1, 2, 3, 8, 9, 13]  # declared kernels up to 8, blocks beyond; tails of a group


def sequential_sum(vectors, scale):
    wide = np.float64 if vectors[0].dtype == np.float64 else np.float32
    total = vectors[0].astype(wide)
    for vector in vectors[1:]:
        total = total + vector.astype(wide)
    return (wide(scale) * total).astype(vectors[0].dtype)


def random_vectors(k, n, dtype, offset=1):
    rng = np.random.default_rng(k + n)
    return [rng.normal(size=n + offset).astype(dtype)[offset:] for _ in range(k)]


CASES = [
    *((k, np.float32) for k in COUNTS),
    *((k, dtype) for k in (3, 10) for dtype in (np.float64, np.float16)),
    (10, ml_dtypes.bfloat16),
]


@pytest.mark.parametrize(("k", "dtype"), CASES)
def test_reductions_are_the_sequential_sum_bit_for_bit(k, dtype):
    for n in (0, 1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 17):
        vectors = random_vectors(k, n, dtype)
        expected = sequential_sum(vectors, 1 / k)
        for vector in vectors:
            vector.flags.writeable = False
        out = np.full(n, 7, dtype)
        reduce_sum(out, vectors, 1 / k)
        assert out.tobytes() == expected.tobytes()
        targets = [vector.copy() for vector in vectors]
        reduce_broadcast(targets, 1 / k)
        assert all(target.tobytes() == expected.tobytes() for target in targets)


@pytest.mark.parametrize("k", [3, 9])
def test_the_sum_may_replace_one_of_its_terms(k):
    vectors = random_vectors(k, BLOCK + 3, np.float32)
    expected = sequential_sum(vectors, 1.0)
    reduce_sum(vectors[k - 1], vectors)
    assert vectors[k - 1].tobytes() == expected.tobytes()


@pytest.mark.parametrize("k", [3, 9])
def test_vectors_that_are_not_alike_are_refused(k):
    ones = [np.ones(4, np.float32) for _ in range(k)]
    read_only = np.ones(4, np.float32)
    read_only.flags.writeable = False
    for bad in (np.ones(5, np.float32), np.ones(8, np.float32)[::2], [1.0] * 4, np.ones((4, 1), np.float32)):
        with pytest.raises(ValueError):
            reduce_broadcast([*ones[1:], bad])
        with pytest.raises(ValueError):
            reduce_sum(np.ones(4, np.float32), [*ones[1:], bad])
    with pytest.raises(ValueError):
        reduce_broadcast([*ones[1:], read_only])
    with pytest.raises(ValueError):
        reduce_sum(read_only, ones)


@pytest.mark.parametrize("k", [0, 65])
def test_a_number_of_vectors_that_is_out_of_range_is_refused(k):
    many = [np.ones(3)] * k
    for call in (
        lambda: reduce_broadcast(many),
        lambda: reduce_sum(np.ones(3), many),
        lambda: weighted_mix(k),
        lambda: sum_into(k),
        lambda: sum_everywhere(k),
    ):
        with pytest.raises(ValueError, match=f"{k} vectors"):
            call()
