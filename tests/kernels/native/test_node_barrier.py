"""The barrier in shared words: no rank leaves before all have arrived, and fused sums have NumPy's bits."""

import threading

import ml_dtypes
import numpy as np
import pytest
from support.threads import in_threads

from mpitrain.kernels.compile.declare import as_bits
from mpitrain.kernels.native.node_barrier import STRIDE, sum_on_node, wait_for_all
from mpitrain.kernels.reductions import DIRECT

SPIN_LIMIT = 1


@pytest.mark.parametrize("n", [1, 2, 5])
def test_no_rank_leaves_the_barrier_before_all_have_arrived(n):
    words, arrived = np.zeros(STRIDE * n, np.int64), np.zeros(n, np.int64)
    function, rng = wait_for_all(), np.random.default_rng(n)
    late = rng.integers(0, n, 60)

    def body(rank):
        for number in range(1, 61):
            if late[number - 1] == rank:
                threading.Event().wait(0.001)
            arrived[rank] = number
            first = 0
            while first != n:
                first = function(words, rank, n, number, first, SPIN_LIMIT)
            assert np.all(arrived >= number)

    in_threads(n, body)
    assert np.all(words[::STRIDE] == 60)


def test_a_long_wait_returns_the_first_missing_rank():
    words = np.zeros(STRIDE * 3, np.int64)
    words[STRIDE * 1] = 1
    assert wait_for_all()(words, 0, 3, 1, 0, SPIN_LIMIT) == 2
    words[STRIDE * 2] = 1
    assert wait_for_all()(words, 0, 3, 1, 2, SPIN_LIMIT) == 3


@pytest.mark.parametrize("k", [1, 2, 3, DIRECT])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_the_sum_has_numpys_bits(k, dtype):
    n, rounds = 1003, 5
    vectors = [np.random.default_rng([k, rank]).normal(size=n).astype(dtype) for rank in range(k)]
    wide = np.float64 if dtype == np.float64 else np.float32
    expected = vectors[0].astype(wide)
    for round in range(rounds):
        total = expected.copy()
        others = [v.astype(wide) for v in vectors[1:]] if round == 0 else [expected] * (k - 1)
        for other in others:
            total = total + other
        expected = (wide(1 / k) * total).astype(dtype).astype(wide)
    words, function = np.zeros(STRIDE * k, np.int64), sum_on_node(k, np.dtype(dtype))
    arguments = as_bits(vectors) if np.dtype(dtype).itemsize == 2 else vectors

    def body(rank):
        start, stop = rank * n // k, (rank + 1) * n // k
        for round in range(rounds):
            progress = 0
            while progress != 2 * k:
                progress = function(words, rank, 2 * round + 1, progress, SPIN_LIMIT, *arguments, start, stop, 1 / k)

    in_threads(k, body)
    for vector in vectors:
        assert vector.tobytes() == expected.astype(dtype).tobytes()
