"""Whole visits in one compiled call have the effect of lock, work and release, and none if the lock is taken."""

import ml_dtypes
import numpy as np
import pytest

from mpitrain.kernels import weighted_average
from mpitrain.kernels.compile.declare import as_bits
from mpitrain.kernels.native.lock_words import OWNER_BITS, STRIDE, release
from mpitrain.kernels.native.locked import TAKEN, average, write

DTYPES = pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
FREE, ME, OTHER = 5 << OWNER_BITS, 3, 4
TAG = 2


def vectors(dtype):
    rng = np.random.default_rng(1)
    return [rng.normal(size=37).astype(dtype) for _ in range(2)]


@DTYPES
def test_a_write_replaces_elements_and_tags_and_counts_an_update(dtype):
    words, tags, (values, data) = np.full(STRIDE, FREE), np.zeros(4), vectors(dtype)
    assert write(dtype)(words, 0, ME, *as_bits([data]), tags, *as_bits([values]), np.arange(4.0)) == 0
    assert data.tobytes() == values.tobytes()
    assert tags.tolist() == [0, 1, 2, 3]
    assert words[0] == 6 << OWNER_BITS


@DTYPES
@pytest.mark.parametrize("weight", [0.3, None])
def test_an_average_has_the_bits_of_the_kernel_and_counts_no_update(dtype, weight):
    words, tags, (x, z) = np.full(STRIDE, FREE), np.full(4, 0.7), vectors(dtype)
    x[3], z[5] = np.nan, np.inf
    before = x.copy()
    weights = np.array([0.4, np.nan if weight is None else weight])
    n_nonfinite = average(weighted_average, dtype, TAG)(words, 0, ME, *as_bits([x, z]), tags, weights)
    used = 0.7 if weight is None else weight
    assert n_nonfinite == weighted_average(before, z, used / (0.4 + used)) == 2
    assert x.tobytes() == before.tobytes()
    assert weights.tolist() == [0.4, used]
    assert words[0] == FREE


def test_nothing_happens_if_the_lock_is_taken():
    words, tags, (x, z) = np.full(STRIDE, FREE | OTHER), np.zeros(4), vectors(np.float32)
    before = x.copy(), z.copy()
    assert write(np.float32)(words, 0, ME, x, tags, z, np.ones(4)) == TAKEN
    assert average(weighted_average, np.float32, TAG)(words, 0, ME, x, z, tags, np.ones(2)) == TAKEN
    assert x.tobytes() == before[0].tobytes()
    assert z.tobytes() == before[1].tobytes()
    assert not tags.any()
    assert words[0] == FREE | OTHER


def test_only_the_owner_releases_a_lock():
    words = np.array([FREE | ME, FREE | OTHER, FREE])
    assert [release()(words, at, ME, 1) for at in range(3)] == [FREE | ME, FREE | OTHER, FREE]
    assert words.tolist() == [6 << OWNER_BITS, FREE | OTHER, FREE]
