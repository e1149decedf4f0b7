"""The ring all-reduce: the sum, with the same bits everywhere and in every run."""

import numpy as np
import pytest

from mpitrain.collectives.topology.partition import split

ALL = pytest.mark.ranks(1, 2, 3, 4, 5)


@ALL
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [0, 1, 16, 100, 40_003])
def test_every_rank_gets_the_sum(one_node, n, dtype):
    from mpitrain.collectives import ring

    comm = one_node.comm
    everyones = [np.random.default_rng([rank, n]).normal(size=n).astype(dtype) for rank in range(comm.size)]
    incoming = np.zeros(max(part.stop - part.start for part in split(n, comm.size)), dtype)
    results = []
    for _ in range(3):
        total = everyones[comm.rank].copy()
        ring.allreduce(comm, total, incoming)
        results.append(total.tobytes())
        exact = np.sum([values.astype(np.float64) for values in everyones], axis=0)
        np.testing.assert_allclose(total, exact, rtol=0, atol=comm.size * 8 * np.finfo(dtype).eps)
    assert len(set(comm.allreduce(results))) == 1


@pytest.mark.ranks(2, 3, 4, 5)
@pytest.mark.parametrize("n", [1, 100, 5003])
def test_a_ring_agrees_with_the_all_reduce_of_mpi(two_nodes, n, monkeypatch):
    from mpitrain.collectives import allreduce, ring
    from mpitrain.collectives.mpi import MPICommunicator

    calls = []
    original = ring.allreduce
    monkeypatch.setattr(ring, "allreduce", lambda *arguments: (calls.append(1), original(*arguments)))
    comm = MPICommunicator(two_nodes)
    vector, found = comm.vector(n, np.float64), []
    mine = np.random.default_rng(comm.rank).normal(size=n)
    for ring_bytes in (1 << 40, 0):
        monkeypatch.setattr(allreduce, "RING_BYTES", ring_bytes)
        vector.local[:] = mine
        comm.allreduce(vector, mean=True)
        found.append(vector.local.copy())
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=1e-14)
    assert calls == [1] * (two_nodes.local_rank < two_nodes.n_rails)
    two_nodes.comm.Barrier()
    comm.free()
