"""Other calls of the communicator between ranks: reading peers, gathering, waiting, freeing."""

import time

import ml_dtypes
import numpy as np
import pytest

ALL = pytest.mark.ranks(1, 2, 3, 4, 5)


@ALL
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_reads_see_the_vector_of_the_peer(comm, dtype):
    for n in (1000, 7):
        vector = comm.vector(n, dtype)
        vector.local[:] = comm.rank + 1
        comm.barrier()
        for peer in range(comm.size):
            found = []
            comm.read(vector, peer, lambda array, found=found: found.append(array.copy()))
            assert np.array_equal(found[0], np.full(n, peer + 1, dtype))
    assert comm.statistics.bytes_sent == 0  # evaluation is not communication of the method


@ALL
def test_publishing_a_host_vector_orders_writes(monkeypatch, comm):
    synchronized = []
    for vector in (comm.numbers(2), comm.vector(10, np.float32)):
        monkeypatch.setattr(vector, "sync", lambda vector=vector: synchronized.append(vector))
        comm.publish(vector)
        assert synchronized[-1:] == [vector]


@ALL
def test_all_ranks_gather_the_numbers_of_all(comm):
    gathered = comm.gather([comm.rank, comm.rank**2 + 0.5])
    assert gathered.dtype == np.float64
    assert np.array_equal(gathered, [[rank, rank**2 + 0.5] for rank in range(comm.size)])
    assert comm.gather([]).shape == (comm.size, 0)


@ALL
def test_a_communicator_frees_all_it_allocated(comm):
    for _ in range(2):
        comm.vector(100, np.float32)
        comm.shared_vector(100, np.float32)
        comm.mailboxes(100, np.float32, 2)
        comm.barrier()
        comm.free()
    assert comm._made == []


@ALL
def test_a_long_wait_polls_seldom(comm):
    from mpitrain.collectives import mpi

    seconds, polls = 0.3, 0
    end = time.perf_counter() + seconds

    def is_over():
        nonlocal polls
        polls += 1
        return time.perf_counter() >= end

    comm.wait_until(is_over)
    longest = mpi.LONGEST_BACKOFF_SECONDS if comm.world.n_nodes == 1 else mpi.LONGEST_BACKOFF_BETWEEN_NODES_SECONDS
    assert polls <= 1 + mpi.POLLS_BEFORE_BACKOFF + 10 + seconds / longest  # 10 while the sleeps become longer
    assert comm.statistics.wait_seconds >= 0.9 * seconds
