"""Broadcast and reduce along a tree, for every root and for sizes around that of a chunk."""

import sys

import ml_dtypes
import numpy as np
import pytest

ALL = pytest.mark.ranks(1, 2, 3, 4, 5)
CHUNK_BYTES = 64


@pytest.fixture(params=["as small vectors", "in chunks"])
def small_chunks(monkeypatch, request):
    """Send the same sizes as small vectors, through MPI or the memory of the node, and in chunks along the tree."""
    from mpitrain.collectives import node_tree, tree

    monkeypatch.setattr(tree, "CHUNK_BYTES", CHUNK_BYTES)
    if request.param == "in chunks":
        monkeypatch.setattr(tree, "SMALL_BYTES", -1)
        monkeypatch.setattr(node_tree, "LARGEST_BYTES", -1)


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


@ALL
@pytest.mark.parametrize("n_bytes", [1 << 14, (1 << 14) + 8])
def test_the_largest_small_vector_and_the_next_one_follow_each_other(comm, n_bytes):
    for turn in range(6):
        root = turn % comm.size
        array = np.full(n_bytes // 8, float(comm.rank + turn))
        comm.reduce(array, root)
        comm.broadcast(array, root)
        assert np.all(array == comm.size * turn + comm.size * (comm.size - 1) // 2)


@pytest.mark.ranks(1, 2)
def test_small_vectors_of_a_node_take_few_python_calls(one_node):
    """A call into Python costs a tenth of a microsecond or more, and the whole reduction two."""
    from mpitrain.collectives.mpi import MPICommunicator

    comm, array, calls = MPICommunicator(one_node), np.ones(100, np.float32), []

    def both():
        comm.reduce(array)
        comm.broadcast(array)

    both()
    profile = lambda frame, event, _: calls.append(frame.f_code.co_qualname) if event == "call" else None  # noqa: E731
    sys.setprofile(profile)
    try:
        both()
    finally:
        sys.setprofile(None)
    comm.barrier()
    comm.free()
    # Of each: the method, whether the array is on a GPU, which tree, whether it is small, and the tree's.
    assert comm.size == 1 or len(calls) <= 1 + 2 * 7, calls
