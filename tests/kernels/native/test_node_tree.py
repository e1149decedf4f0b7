"""Broadcast and sum through slots: no rank reads a slot while it is written, in any order of roots."""

import time

import ml_dtypes
import numpy as np
import pytest
from support.threads import in_threads

from mpitrain.kernels.compile.declare import as_bits
from mpitrain.kernels.native.node_barrier import STRIDE
from mpitrain.kernels.native.node_tree import add, get, put

LENGTH = 300


def until(end, function, *operands, first=0):
    """Call ``function(*operands[:at], first, *operands[at:])`` with its last result until that is ``end``."""
    at = next(k for k, operand in enumerate(operands) if operand is FIRST)
    while first != end:
        first = function(*operands[:at], first, *operands[at + 1 :])


FIRST = object()
"""The place of the progress among the operands."""


@pytest.mark.parametrize("spin_limit", [0, 4000])
@pytest.mark.parametrize("n", [2, 3, 5])
def test_vectors_pass_whole_in_any_order_of_roots_and_kinds(n, spin_limit):
    """A rank drawn at random is late, so that fast ones run ahead as far as they may."""
    words, slots = np.zeros(STRIDE * n, np.int64), np.zeros((n, 2, 4 * LENGTH), np.uint8)
    rng = np.random.default_rng(n)
    plan = [(int(rng.integers(n)), bool(rng.integers(2)), int(rng.integers(n))) for _ in range(300)]

    def collective(rank, vector, number, root, is_sum):
        shown, data = slots[rank if is_sum else root, number % 2], vector.view(np.uint8)
        operands = (words, rank, n, number, FIRST, spin_limit, shown, data)
        if is_sum and rank == root:
            summands = [slots[other, number % 2].view(np.float32) for other in range(n)]
            summands[root] = vector
            until(n, add(n, np.float32), words, rank, number, FIRST, spin_limit, vector, *summands)
            assert np.all(vector == n * number + n * (n - 1) // 2)
        elif is_sum or rank == root:
            until(n, put(), *operands)
        else:
            vector[:] = -1
            until(n, get(), *operands, first=root)
            assert np.all(vector == number + root)

    def body(rank):
        vector = np.zeros(LENGTH, np.float32)
        for number, (root, is_sum, slow) in enumerate(plan, 1):
            if rank == slow:
                time.sleep(1e-4)
            vector[:] = number + (rank if is_sum else root)
            collective(rank, vector, number, root, is_sum)

    in_threads(n, body)


def test_a_vector_is_shown_only_after_all_have_left_the_collective_before_the_last():
    words, slot, vector = np.zeros(2 * STRIDE, np.int64), np.zeros(4, np.uint8), np.arange(4, dtype=np.uint8)
    assert put()(words, 0, 2, 2, 0, 0, slot, vector) == 0  # rank 0 itself has not passed number 1
    words[0] = 1
    assert put()(words, 0, 2, 2, 0, 0, slot, vector) == 1
    assert not slot.any()
    assert words[0] == 1
    words[STRIDE] = 1
    assert put()(words, 0, 2, 2, 1, 0, slot, vector) == 2
    assert slot.tolist() == vector.tolist()
    assert words[0] == 2


def test_a_vector_is_copied_only_after_the_root_has_shown_it():
    words, slot, vector = np.zeros(2 * STRIDE, np.int64), np.ones(4, np.uint8), np.zeros(4, np.uint8)
    assert get()(words, 0, 2, 1, 1, 0, slot, vector) == 1
    assert not vector.any()
    words[STRIDE] = 1
    assert get()(words, 0, 2, 1, 1, 0, slot, vector) == 2
    assert vector.all()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("k", [2, 3, 8])
def test_sums_are_rounded_once_in_the_order_of_the_ranks(k, dtype):
    vectors = [np.random.default_rng(rank).normal(size=77).astype(dtype) for rank in range(k)]
    wide = [vector.astype(np.float32) if vector.itemsize == 2 else vector for vector in vectors]
    expected = sum(wide[1:], wide[0]).astype(dtype)
    words = np.ones(STRIDE * k, np.int64)
    assert add(k, dtype)(words, 0, 1, 0, 0, *as_bits([vectors[1], *vectors])) == k
    assert vectors[1].tobytes() == expected.tobytes()
