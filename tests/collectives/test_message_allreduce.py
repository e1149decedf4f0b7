"""All-reduce by messages: the sum, with the same bits on all ranks and in every run."""

import numpy as np
import pytest

from mpitrain.collectives.topology.allreduce_steps import ALGORITHMS, buffer_size

ALL = pytest.mark.ranks(1, 2, 3, 4, 5)


@ALL
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [0, 1, 17, 100, 40_003])
def test_every_rank_gets_the_sum(one_node, algorithm, n, dtype):
    from mpitrain.collectives import message_allreduce

    comm = one_node.comm
    everyones = [np.random.default_rng([rank, n]).normal(size=n).astype(dtype) for rank in range(comm.size)]
    incoming = np.zeros(buffer_size(algorithm, comm.size, n), dtype)
    results = []
    for _ in range(3):
        total = everyones[comm.rank].copy()
        message_allreduce.allreduce(comm, algorithm, total, incoming)
        results.append(total.tobytes())
        exact = np.sum([values.astype(np.float64) for values in everyones], axis=0)
        np.testing.assert_allclose(total, exact, rtol=0, atol=comm.size * 8 * np.finfo(dtype).eps)
    assert len(set(comm.allreduce(results))) == 1


@pytest.mark.ranks(2, 3, 4, 5)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("n", [1, 100, 5003])
def test_nodes_sum_by_the_chosen_algorithm_as_mpi_does(two_nodes, algorithm, n, monkeypatch):
    from mpitrain.collectives import message_allreduce
    from mpitrain.collectives.mpi import MPICommunicator
    from mpitrain.collectives.topology import allreduce_cost

    calls, original = [], message_allreduce.allreduce
    monkeypatch.setattr(
        message_allreduce, "allreduce", lambda comm, name, *rest: (calls.append(name), original(comm, name, *rest))[1]
    )
    comm = MPICommunicator(two_nodes)
    vector, found = comm.vector(n, np.float64), []
    mine = np.random.default_rng(comm.rank).normal(size=n)
    for choice in (allreduce_cost.MPI, algorithm):
        monkeypatch.setattr(allreduce_cost, "choose", lambda *_, choice=choice: choice)
        vector.local[:] = mine
        comm.allreduce(vector, mean=True)
        found.append(vector.local.copy())
    two_nodes.comm.Barrier()
    comm.free()
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=1e-14)
    assert calls == [algorithm] * (two_nodes.local_rank < two_nodes.n_rails)


@pytest.mark.ranks(2, 3)
def test_the_size_and_the_network_decide(two_nodes, monkeypatch):
    """If MPI is slow with long messages, long vectors travel by our own, and short ones by MPI's."""
    from mpitrain.collectives import message_allreduce
    from mpitrain.collectives.mpi import MPICommunicator
    from mpitrain.collectives.topology.allreduce_cost import Link

    calls, original = [], message_allreduce.allreduce
    monkeypatch.setattr(
        message_allreduce, "allreduce", lambda comm, name, *rest: (calls.append(name), original(comm, name, *rest))[1]
    )
    comm = MPICommunicator(two_nodes)
    long, short = comm.vector(400_000, np.float32), comm.vector(100, np.float32)
    monkeypatch.setattr(two_nodes, "link", Link(latency=1e-5, overhead=1e-5, bandwidth=1e9, mpi_bandwidth=1e8))
    for vector in (long, short):
        vector.local[:] = comm.rank
        comm.allreduce(vector)
        assert (vector.local == sum(range(comm.size))).all()
    two_nodes.comm.Barrier()
    comm.free()
    assert calls == ["ring"] * (two_nodes.local_rank < two_nodes.n_rails)
