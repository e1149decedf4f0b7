"""The node barrier: it orders memory and counts waiting."""

import time

import numpy as np
import pytest

ALL = pytest.mark.ranks(1, 2, 3, 5)


@pytest.fixture
def node_barrier(comm):
    from mpitrain.collectives.rma.node_barrier import NodeBarrier

    made = NodeBarrier(comm.world, comm.statistics)
    yield made
    comm.barrier()
    made.free()


@ALL
def test_writes_before_the_barrier_are_visible_after_it(comm, node_barrier, window):
    """All ranks write, and read the vectors of their node, again and again."""
    mine = window(1000, np.int64)
    peers = [mine.of(rank) for rank in comm.world.node_ranks]
    for number in range(50):
        mine.local[:] = number * 10 + comm.rank
        node_barrier.wait()
        for rank, peer in zip(comm.world.node_ranks, peers, strict=True):
            assert np.all(peer == number * 10 + rank)
        node_barrier.wait()


@ALL
def test_a_long_wait_is_counted(comm, node_barrier):
    from mpitrain.kernels.native.node_barrier import STRIDE

    late = comm.world.node_ranks[-1]
    node_barrier.wait()
    before = comm.statistics.wait_seconds
    if comm.rank == late:
        while np.any(node_barrier.words[:-STRIDE:STRIDE] == node_barrier.number):  # the others have not arrived yet
            time.sleep(0.001)
        time.sleep(0.3)  # longer than a rank polls before it sleeps
    node_barrier.wait()
    if comm.rank != late:
        assert comm.statistics.wait_seconds > before


@ALL
@pytest.mark.parametrize("cores", [0.5, 1.0, 8.0])
def test_a_rank_without_a_core_of_its_own_spins_less(monkeypatch, one_node, cores):
    from mpitrain.collectives.rma.locks import NodeWords
    from mpitrain.collectives.rma.node_barrier import SPIN_LIMIT, SPIN_LIMIT_WITHOUT_A_CORE, NodeBarrier
    from mpitrain.collectives.world.statistics import Statistics

    monkeypatch.setattr(one_node, "cores", cores)
    node_barrier, words = NodeBarrier(one_node, Statistics()), NodeWords(one_node, [1] * one_node.size)
    assert {node_barrier.spin_limit, words._spin_limit} == {SPIN_LIMIT_WITHOUT_A_CORE if cores < 1 else SPIN_LIMIT}
    one_node.barrier()
    words.free()
    node_barrier.free()


@pytest.mark.ranks(2, 3)
def test_a_waiting_rank_serves_one_sided_operations(comm, node_barrier):
    """MPI serves a window over a rank's own memory only while the rank calls MPI, so a waiting rank must call it."""
    from mpi4py import MPI

    exposed = np.full(4, comm.rank, np.int64)
    mpi = MPI.Win.Create(exposed, exposed.itemsize, comm=comm.world.comm)
    seen = np.full(4, -1, np.int64)
    if comm.rank == 0:
        for _ in range(20):
            mpi.Lock(comm.size - 1, MPI.LOCK_EXCLUSIVE)
            mpi.Get(seen, comm.size - 1)
            mpi.Unlock(comm.size - 1)
        assert np.all(seen == comm.size - 1)
    node_barrier.wait()
    mpi.Free()
