"""Each rank gets its slice of the sum, in memory that is lent to it; the slices of a node make a whole."""

import numpy as np
import pytest

from mpitrain.collectives import allreduce as module
from mpitrain.simulation.world import SimulatedWorld

ALL = pytest.mark.ranks(1, 2, 3, 4, 5)
DTYPES = [np.float32, np.float64]


def values(rank, n, dtype):
    return np.random.default_rng([rank, n]).normal(size=n).astype(dtype)


def check(comm, n, dtype):
    """Every worker writes its part of the sum to what the node shares; then all is there."""
    vector, shared = comm.vector(n, dtype), comm.node_vector(n, dtype)
    mine = values(comm.rank, n, dtype)
    vector.local[:] = mine
    shared.local[comm.slice_of(n)] = np.nan
    comm.barrier()
    parts = []

    def use(part, addends):
        assert 1 <= len(addends) <= 8
        assert all(addend.shape == (part.stop - part.start,) for addend in addends)
        parts.append(part)
        shared.local[part] = sum(addends)

    for _ in range(3):
        parts.clear()
        comm.reduce_slices(vector, use)
        wanted = sum(values(rank, n, np.float64).astype(dtype).astype(np.float64) for rank in range(comm.size))
        np.testing.assert_allclose(shared.local, wanted, rtol=0, atol=comm.size * 4 * np.finfo(dtype).eps)
        assert np.array_equal(vector.local, mine)
        own = comm.slice_of(n)
        assert sum(part.stop - part.start for part in parts) == own.stop - own.start
        comm.barrier()


@ALL
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direct", [1, 8])
def test_slices_of_a_node_make_the_sum(comm, dtype, direct, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 64)
    monkeypatch.setattr(module, "DIRECT", direct)  # with 1 as with many ranks: block by block
    for n in (0, 1, 17, 1000):
        check(comm, n, dtype)


@ALL
def test_ranks_of_a_node_have_one_vector_between_them(comm):
    shared = comm.node_vector(10, np.float32)
    leader = comm.rank == comm.world.node_ranks[0]
    if leader:
        shared.local[:] = 1 + comm.nodes[comm.rank]
    comm.barrier()
    assert np.all(shared.local == 1 + comm.nodes[comm.rank])
    seen = []
    for peer in range(comm.size):
        comm.read(shared, peer, lambda x: seen.append(float(x[0])))
    assert seen == [1.0 + node for node in comm.nodes]
    comm.barrier()


@pytest.mark.parametrize("nodes", [[0], [0, 0, 0], [0, 1, 2], [0, 0, 1, 1], [0, 0, 0, 1]])
def test_simulated_workers_do_the_same(nodes):
    world = SimulatedWorld(len(nodes), nodes=nodes)
    world.run(lambda comm: [check(comm, n, np.float64) for n in (0, 1, 17, 100)])
