"""Broadcast and reduce along a tree, for every root and for sizes around that of a chunk."""

import ml_dtypes
import numpy as np
import pytest

ALL = pytest.mark.ranks(1, 2, 3, 4, 5)
CHUNK_BYTES = 64


@pytest.fixture
def small_chunks(monkeypatch):
    from mpitrain.collectives import tree

    monkeypatch.setattr(tree, "CHUNK_BYTES", CHUNK_BYTES)


def sizes(dtype):
    chunk = CHUNK_BYTES // np.dtype(dtype).itemsize
    return (0, 1, chunk - 1, chunk, chunk + 1, 2 * chunk, 5 * chunk + 3)


@ALL
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [np.uint8, np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_all_ranks_get_the_array_of_the_root(comm, dtype):
    for root in range(comm.size):
        for n in sizes(dtype):
            theirs = (np.arange(n) % 97 + root).astype(dtype)
            array = theirs.copy() if comm.rank == root else np.zeros(n, dtype)
            comm.broadcast(array, root)
            assert np.array_equal(array, theirs)


@ALL
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_the_root_gets_the_sum(comm, dtype):
    for root in range(comm.size):
        for n in sizes(dtype):
            array = (np.arange(n) % 17 + comm.rank).astype(dtype)
            comm.reduce(array, root)
            if comm.rank == root:
                expected = comm.size * (np.arange(n) % 17) + sum(range(comm.size))  # small: exact in every dtype
                assert np.array_equal(array, expected.astype(dtype))


@ALL
def test_rounded_sums_have_the_same_bits_in_every_run(comm):
    n = 300_001  # more than one chunk of the real size
    x = np.random.default_rng(comm.rank).normal(size=n).astype(np.float32)
    first, second = x.copy(), x.copy()
    comm.reduce(first, comm.size - 1)
    comm.reduce(second, comm.size - 1)
    if comm.rank == comm.size - 1:
        assert first.tobytes() == second.tobytes()
        exact = sum(np.random.default_rng(rank).normal(size=n) for rank in range(comm.size))
        np.testing.assert_allclose(first, exact, rtol=0, atol=comm.size * 5 * 2.0**-23)


@ALL
def test_reduce_and_broadcast_make_an_all_reduce(comm):
    for root in range(comm.size):
        array = np.full(1000, 2.0**comm.rank)
        comm.reduce(array, root)
        comm.broadcast(array, root)
        assert np.all(array == 2.0**comm.size - 1)
