"""The shared vector: no update is lost, no shard is seen half changed, and exchanges conserve the sum."""

import numpy as np
import pytest

from mpitrain import kernels

ALL = pytest.mark.ranks(1, 2, 3)


@pytest.fixture(scope="module", params=["one_node", "two_nodes", "windows"])
def world(request):
    """Collective. One node, and two nodes with messages or one-sided operations between them."""
    return request.getfixturevalue(request.param)


@ALL
@pytest.mark.parametrize(
    ("n", "largest_shard", "n_updates"),
    [(1000, 64, 40), (70_001, 2**19, 30), (1_200_000, 2**19, 4)],
)
def test_no_update_is_lost_and_no_read_is_torn(comm, largest_shards, n, largest_shard, n_updates):
    largest_shards(largest_shard)
    center = comm.shared_vector(n, np.float32)
    out, before = np.full(n, -1.0, np.float32), np.zeros(len(center.parts))

    def add_one(part, shard):
        assert shard.size == part.stop - part.start
        assert np.all(shard == shard[0])
        shard += 1

    def read():
        center.read(out)
        now = np.array([out[part.start] for part in center.parts])
        assert all(np.all(out[part] == out[part.start]) for part in center.parts)
        return now

    comm.barrier()
    for _ in range(n_updates):
        center.update(add_one)
        now = read()
        assert np.all(now > before)  # this rank's own update, at least
        before = now
    comm.barrier()
    assert np.all(read() == n_updates * comm.size)
    assert comm.statistics.n_exchanges == n_updates
    assert comm.statistics.staleness.sum() == n_updates - 1  # the first has none
    assert comm.statistics.bytes_sent == n_updates * 2 * n * 4


@ALL
def test_staleness_counts_the_updates_of_others_since_the_own_visit(comm):
    """It is p - 1 in a round robin. The first visit of a rank has no staleness."""
    n_rounds = 5
    center = comm.shared_vector(100, np.float32)
    for _ in range(n_rounds):
        for turn in range(comm.size):
            if turn == comm.rank:
                center.update(lambda part, shard: None)
            comm.barrier()
    expected = np.bincount([comm.size - 1] * (n_rounds - 1), minlength=33)
    assert np.array_equal(comm.statistics.staleness, expected)


@ALL
@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 1000, 65_537])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_all_ranks_read_what_one_writes(comm, n, dtype):
    shared = comm.shared_vector(n, dtype)
    for writer in range(comm.size):
        values = np.arange(n).astype(dtype) + writer
        if comm.rank == writer:
            shared.write(values)
        comm.barrier()
        out = np.zeros(n, dtype)
        shared.read(out)
        assert np.array_equal(out, values)
        comm.barrier()


@ALL
def test_nonfinite_elements_are_counted(comm):
    center = comm.shared_vector(1000, np.float32)
    x = np.full(1000, np.nan, np.float32)
    center.update(lambda part, shard: kernels.elastic_exchange(x[part], shard, 0.5, 0.5))
    comm.barrier()
    out = np.ones(1000, np.float32)
    center.read(out)
    assert not out.any()
    assert comm.statistics.n_nonfinite == 1000


@ALL
def test_an_elastic_exchange_conserves_the_sum(comm):
    """sum_i x_i + c does not change, element by element, however the exchanges of the ranks interleave."""
    n = 5000
    rng = np.random.default_rng(comm.rank)
    x = rng.normal(size=n)
    center = comm.shared_vector(n, np.float64)
    start = comm.world.comm.allreduce(x)
    for _ in range(30):
        alpha = rng.uniform(0, 1)
        center.update(lambda part, c, alpha=alpha: kernels.elastic_exchange(x[part], c, alpha, alpha))
    total = comm.world.comm.allreduce(x)
    c = np.empty(n)
    center.read(c)
    assert np.abs(c).max() > 0.01
    np.testing.assert_allclose(total + c, start, rtol=0, atol=30 * comm.size * 8 * np.finfo(np.float64).eps)


@pytest.mark.ranks(2, 3, 5)
def test_only_shards_of_other_nodes_are_on_the_wire(comm):
    """Each of them is fetched and stored once."""
    n = 1000
    center = comm.shared_vector(n, np.float32)
    center.update(lambda part, shard: None)
    there = [
        part for part, home in zip(center.parts, center._blocks.homes) if comm.world.nodes[home] != comm.world.node
    ]
    assert comm.statistics.wire_bytes == sum(2 * 4 * (part.stop - part.start) for part in there)
    assert bool(there) == (comm.world.n_nodes > 1)


@ALL
def test_rows_are_changed_together(comm, largest_shards):
    """No rank sees one of them changed and the other not, as for a center and its velocity."""
    largest_shards(64)
    n, n_updates = 500, 20
    shared = comm.shared_vector(n, np.float64, rows=3)
    if comm.rank == 0:
        shared.write(np.arange(n))
        shared.write(np.zeros(n), row=2)
    comm.barrier()

    def change(part, rows):
        assert rows.shape == (3, part.stop - part.start)
        assert np.array_equal(rows[1] - rows[0], rows[2])
        rows[1] += 1
        rows[2] += 1

    for _ in range(n_updates):
        shared.update(change)
    comm.barrier()
    out = np.zeros(n)
    for row, expected in enumerate([np.arange(n), np.arange(n) + comm.size * n_updates, comm.size * n_updates]):
        shared.read(out, row)
        assert np.array_equal(out, np.broadcast_to(expected, n))
    assert comm.statistics.bytes_sent == n_updates * 2 * 3 * n * 8


@ALL
def test_staleness_counts_from_the_last_pull(comm):
    """Pulls reset it and pushes do not; a worker's own pushes do not count."""
    center = comm.shared_vector(100, np.float32)
    seen = []

    def in_turn(**kind):
        for turn in range(comm.size):
            if turn == comm.rank:
                center.update(lambda part, shard: seen.append(center.staleness), **kind)
            comm.barrier()
        found = {*seen}
        seen.clear()
        assert len(found) == 1  # all shards agree
        return found.pop()

    others = comm.size - 1
    assert in_turn() == 0  # the first pull of all
    assert in_turn() == others
    assert in_turn(pulls=False) == others
    assert in_turn(pulls=False) == others + comm.rank + (others - comm.rank)  # those of two rounds
    assert in_turn(pushes=False) == 2 * others + (others - comm.rank)
    assert in_turn(pushes=False) == 0
    n_pushes = 4
    assert comm.statistics.staleness.sum() == n_pushes - 1
    n_bytes = 100 * 4
    assert comm.statistics.bytes_sent == n_bytes * (2 * 2 + 2 + 2)


@ALL
def test_lags_and_tags_can_be_saved_and_restored(comm):
    center = comm.shared_vector(100, np.float64)
    assert np.all(center.lags() == -1)
    center.set_lags(0)
    assert np.all(center.lags() == 0)

    def count(part, shard):
        center.tags[1] += comm.rank + 1

    comm.barrier()
    center.update(count)
    comm.barrier()
    lags, tags = center.lags(), center.read_tags()
    assert np.all((lags >= 0) & (lags < comm.size))
    assert np.all(tags[:, 1] == sum(range(1, comm.size + 1)))
    comm.barrier()

    copy = comm.shared_vector(100, np.float64)
    if comm.rank == 0:
        copy.write_tags(tags)
    comm.barrier()
    copy.set_lags(lags)
    assert np.array_equal(copy.lags(), lags)
    assert np.array_equal(copy.read_tags(), tags)
    staleness = []
    copy.update(lambda part, shard: staleness.append(copy.staleness), pushes=False)
    assert sorted(staleness) == sorted(lags)


@pytest.mark.ranks(1, 3)
def test_lags_and_tags_fit_a_vector_with_shards_of_another_size(comm, largest_shards):
    """A run may be resumed with as many ranks on another number of nodes, where shards have another size."""

    def vector_of(largest):
        largest_shards(largest)
        return comm.shared_vector(1024 * comm.size, np.float64)

    small, large = vector_of(128), vector_of(512)
    assert (len(small.parts), len(large.parts)) == (8 * comm.size, 2 * comm.size)
    numbers = np.arange(2.0 * comm.size)
    tags = np.zeros((2 * comm.size, 4))
    tags[:, 2] = numbers
    if comm.rank == 0:
        small.write_tags(tags)
        large.write_tags(np.repeat(tags, 4, axis=0))
    comm.barrier()
    assert np.array_equal(small.read_tags()[:, 2], np.repeat(numbers, 4))
    assert np.array_equal(large.read_tags()[:, 2], numbers)
    comm.barrier()
    small.set_lags(numbers)
    assert np.array_equal(small.lags(), np.repeat(numbers, 4))
    comm.barrier()
