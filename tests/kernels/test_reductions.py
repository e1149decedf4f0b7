"""Reductions of many vectors have the bits of NumPy's sequential sum, for any number and length."""

import ml_dtypes
import numpy as np
import pytest

from mpitrain.kernels import (
    mean_step,
    reduce_broadcast,
    reduce_sum,
    sgd_step,
    sum_everywhere,
    sum_into,
    torch_momentum_step,
    torch_nesterov_step,
    weighted_mix,
)
from mpitrain.kernels.reductions import BLOCK

COUNTS = [1, 2, 3, 8, 9, 13, 64]  # declared kernels up to 8, then blocks; groups of 4 with tails; the largest number


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
def test_vectors_of_other_lengths_or_types_are_refused(k):
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


@pytest.mark.parametrize("k", [1, 2, 8])
@pytest.mark.parametrize(
    ("kind", "step"), [("sgd", sgd_step), ("momentum", torch_momentum_step), ("nesterov", torch_nesterov_step)]
)
def test_a_mean_step_is_the_step_with_the_mean_gradient(kind, step, k):
    rng = np.random.default_rng(k)
    gradients, (x, v) = list(rng.normal(size=(k, 101))), rng.normal(size=(2, 101))
    state = [x.copy()] if kind == "sgd" else [x.copy(), v.copy()]
    scalars = [0.1, 0.02] if kind == "sgd" else [0.1, 0.9, 0.02]
    mean_step(kind, k)(*state, *gradients, 1 / k, *scalars)
    wanted = [x, v][: len(state)]
    step(*wanted, sum(gradients) / k, *scalars)
    for got, want in zip(state, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("k", [0, 9])
def test_a_step_refuses_too_many_gradients(k):
    with pytest.raises(ValueError, match=f"{k} gradients"):
        mean_step("sgd", k)


@pytest.mark.parametrize("k", [0, 65])
def test_too_few_or_too_many_vectors_are_refused(k):
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
