"""Vectors in device memory between real ranks, by each transport: all-reduce, reads, visits, and their order."""

import numpy as np
import pytest
from support.on_gpus import TRANSPORTS, gpus

from mpitrain import kernels
from mpitrain.collectives.world.statistics import distance_bin
from mpitrain.kernels import gpu

pytestmark = [pytest.mark.ranks(3), pytest.mark.time_limit(120)]

N = 1000


@pytest.fixture(params=[(nodes, transport) for nodes in (1, 2) for transport in TRANSPORTS], ids=str)
def comm(request):
    """Collective. A communicator of ranks with GPUs."""
    with gpus(*request.param) as communicator:
        yield communicator


def values(rank, n=N, dtype=np.float32):
    """Return small whole numbers, whose sums are exact in any order."""
    return ((np.arange(n) * (rank + 1)) % 31).astype(dtype)


@pytest.mark.parametrize(
    ("dtype", "mean"), [("float32", False), ("float64", True), ("float16", True), ("bfloat16", False)]
)
def test_all_reduce_is_the_sum(comm, dtype, mean):
    import ml_dtypes

    dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    vector = comm.vector(N, dtype)
    gpu.assign(vector.local, values(comm.rank, dtype=dtype))
    comm.allreduce(vector, mean=mean)
    total = sum(values(rank, dtype=np.float64) for rank in range(comm.size))
    wanted = total / comm.size if mean else total
    found = gpu.to_host(vector.local).astype(np.float64)
    np.testing.assert_allclose(found, wanted, rtol={2: 2**-7}.get(dtype.itemsize, 1e-6))


def test_an_all_reduce_starts_from_the_result_of_the_previous_one(comm):
    vector = comm.vector(N, np.float64)
    gpu.assign(vector.local, values(comm.rank, dtype=np.float64))
    comm.allreduce(vector)
    kernels.scale(vector.local, 0.5)
    comm.allreduce(vector)
    wanted = sum(values(rank, dtype=np.float64) for rank in range(comm.size)) / 2 * comm.size
    np.testing.assert_array_equal(gpu.to_host(vector.local), wanted)


def test_all_reduce_in_chunks(comm, monkeypatch):
    from mpitrain.collectives import allreduce

    monkeypatch.setattr(allreduce, "CHUNK_BYTES", 400)
    vector = comm.vector(N, np.float64)
    gpu.assign(vector.local, values(comm.rank, dtype=np.float64))
    comm.allreduce(vector)
    np.testing.assert_array_equal(
        gpu.to_host(vector.local), sum(values(rank, dtype=np.float64) for rank in range(comm.size))
    )


def test_an_all_reduce_in_the_background_is_the_sum(comm):
    vector = comm.vector(N, np.float32)
    gpu.assign(vector.local, values(comm.rank))
    pending = comm.start_allreduce(vector, mean=True)
    pending.wait()
    wanted = sum(values(rank) for rank in range(comm.size)) / np.float32(comm.size)
    np.testing.assert_allclose(gpu.to_host(vector.local), wanted, rtol=1e-6)


def test_a_peer_is_read_as_it_was_at_the_barrier(comm):
    vector = comm.vector(N, np.float32)
    kernels.scale(vector.local, 0.0)
    gpu.assign(vector.local, values(comm.rank))
    comm.barrier()
    out = np.zeros_like(vector.local)
    for peer in range(comm.size):
        comm.read(vector, peer, lambda x: kernels.scaled_add(out, x, 1.0))
    np.testing.assert_array_equal(gpu.to_host(out), sum(values(rank) for rank in range(comm.size)))


def test_broadcast_and_reduce(comm):
    array = comm.vector(N, np.float32).local
    gpu.assign(array, values(comm.rank))
    comm.broadcast(array, root=comm.size - 1)
    np.testing.assert_array_equal(gpu.to_host(array), values(comm.size - 1))
    comm.reduce(array)
    if comm.rank == 0:
        np.testing.assert_array_equal(gpu.to_host(array), comm.size * values(comm.size - 1))


def test_numbers_are_in_host_memory(comm):
    numbers = comm.numbers(2)
    numbers.local[:] = comm.rank, 7
    numbers.sync()
    comm.barrier()
    seen = []
    for peer in range(comm.size):
        comm.read(numbers, peer, lambda x: seen.append(tuple(x)))
    assert seen == [(peer, 7) for peer in range(comm.size)]


@pytest.mark.parametrize("rows", [1, 2])
def test_no_update_of_a_shared_vector_is_lost(comm, rows, monkeypatch):
    from mpitrain.collectives.rma import peer_memory

    for name in ("LARGEST_DEVICE_SHARD", "LARGEST_STAGED_SHARD"):
        monkeypatch.setattr(peer_memory, name, 64)
    vector = comm.shared_vector(N, np.float32, rows)
    one = np.zeros_like(comm.vector(N, np.float32).local)
    gpu.assign(one, np.ones(N, np.float32))

    def add(part, shard):
        for row in [shard] if rows == 1 else [shard[0], shard[1]]:
            kernels.scaled_add(row, one[part], 1.0)

    for _ in range(5):
        vector.update(add)
    comm.barrier()
    out = np.zeros(N, np.float32)
    for row in range(rows):
        vector.read(out, row)
        np.testing.assert_array_equal(out, 5 * comm.size)
    assert vector.read_tags().shape[1] == 4


def test_an_exchange_conserves_the_sum_and_counts_nonfinite_elements(comm):
    center, x = comm.shared_vector(N, np.float64), comm.vector(N, np.float64).local
    start = values(comm.rank, dtype=np.float64)
    start[3] = np.nan if comm.rank == 0 else 1.0
    gpu.assign(x, start)
    comm.barrier()
    for _ in range(3):
        center.update(lambda part, c: kernels.elastic_exchange(x[part], c, 0.25, 0.25))
    comm.barrier()
    c = np.zeros(N)
    center.read(c)
    mine = gpu.to_host(x)
    finite = np.isfinite(mine)
    total = comm.world.comm.allreduce(np.where(finite, mine, 0.0)) + c
    wanted = sum(values(rank, dtype=np.float64) for rank in range(comm.size))
    sound = np.arange(N) != 3
    np.testing.assert_allclose(total[sound], wanted[sound], atol=1e-9)
    assert np.isfinite(c).all()
    assert comm.statistics.n_nonfinite == (3 if comm.rank == 0 else 0)
    assert comm.statistics.n_exchanges == 3


def test_staleness_and_distance_are_those_of_the_host(comm):
    center = comm.shared_vector(N, np.float32)
    center.update(lambda part, c: None, pushes=False)
    comm.barrier()
    for rank in range(comm.size):  # in turn: rank r finds r updates, after which all elements are r
        if comm.rank == rank:
            center.update(lambda part, c: c.fill(comm.rank + 1.0))
        comm.barrier()
    assert comm.statistics.staleness.sum() == 1
    assert comm.statistics.staleness[comm.rank] == 1
    assert comm.statistics.staleness_distance[distance_bin(comm.rank * N**0.5)] == 1


def test_mailboxes_keep_vector_and_tags_together(comm):
    boxes, x = comm.mailboxes(N, np.float32, slots=2), comm.vector(N, np.float32).local
    gpu.assign(x, values(comm.rank))
    boxes.publish(x)
    comm.barrier()
    to = (comm.rank + 1) % comm.size
    found = []
    boxes.latest(to, lambda box: found.append(gpu.to_host(box)))
    np.testing.assert_array_equal(found[0], values(to))

    def leave(box, tags):
        box[...] = x
        tags[1] = comm.rank

    boxes.update(to, leave)
    comm.barrier()

    def check(box, tags):
        sender = (comm.rank - 1) % comm.size
        assert tags[1] == sender
        np.testing.assert_array_equal(gpu.to_host(box), values(sender))

    boxes.receive(comm.rank, check)
    comm.barrier()


def test_a_background_operation_follows_earlier_work_of_the_stream(comm):
    """The background has a stream of its own: without an order it would exchange old values."""
    center, x = comm.shared_vector(N, np.float32), comm.vector(N, np.float32).local
    gpu.assign(x, np.ones(N, np.float32))
    kernels.scale(x, 3.0)
    started = comm.start(lambda: center.update(lambda part, c: kernels.scaled_add(c, x[part], 1.0)))
    started.wait()
    comm.barrier()
    out = np.zeros(N, np.float32)
    center.read(out)
    np.testing.assert_array_equal(out, 3.0 * comm.size)


def test_split_communicators_have_device_vectors_too(comm):
    part = comm.split(comm.rank % 2)
    vector = part.vector(N, np.float32)
    gpu.assign(vector.local, np.ones(N, np.float32))
    part.allreduce(vector)
    np.testing.assert_array_equal(gpu.to_host(vector.local), part.size)
    center = part.shared_vector(N, np.float32)
    center.update(lambda where, c: kernels.scaled_add(c, vector.local[where], 1.0))
    part.barrier()
    out = np.zeros(N, np.float32)
    center.read(out)
    np.testing.assert_array_equal(out, part.size**2)
