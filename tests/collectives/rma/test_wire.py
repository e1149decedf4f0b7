"""Wire formats between nodes: fetched values, changes and residuals, which together conserve the sum."""

import ml_dtypes
import numpy as np
import pytest
from support.on_gpus import gpus
from support.on_ranks import RankRun

from mpitrain import EASGD, kernels
from mpitrain.errors import UsageError
from mpitrain.kernels import gpu
from mpitrain.kernels.native import wire

SHORT = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "int8": np.dtype(ml_dtypes.bfloat16),
}
ALL = pytest.mark.ranks(1, 2, 3)
SEVERAL = pytest.mark.ranks(2, 3)
formats = pytest.mark.parametrize("name", wire.FORMATS)


@pytest.fixture
def connect(two_nodes):
    """Collective. `connect(name)` returns a communicator between two nodes with a wire format."""
    from mpitrain.collectives.mpi import MPICommunicator

    made = []

    def make(name, **options):
        made.append(MPICommunicator(two_nodes, wire=name, **options))
        return made[-1]

    yield make
    two_nodes.comm.Barrier()
    for comm in reversed(made):
        comm.free()


def residual(comm, center):
    """Return (n,) the residuals of all ranks. Collective."""
    mine = np.zeros(center.n)
    for index, left in center._blocks.residuals.items():
        mine[center.parts[index]] += left
    return comm.world.comm.allreduce(mine)


def read(center, dtype=np.float32):
    out = np.zeros(center.n, dtype)
    center.read(out)
    return out


def is_remote(comm, center):
    """Return (n,) whether an element lives on another node."""
    remote = np.zeros(center.n, bool)
    for home, part in zip(center._blocks.homes, center.parts, strict=True):
        remote[part] = comm.nodes[home] != comm.nodes[comm.rank]
    return remote


@ALL
@formats
@pytest.mark.parametrize("shard", [70, 1 << 19])
def test_center_and_residuals_add_up_to_all_changes(connect, name, shard, largest_shards):
    largest_shards(shard)
    comm, n, n_rounds = connect(name), 3001, 20
    center, total = comm.shared_vector(n, np.float32), np.zeros(n)
    rng = np.random.default_rng(comm.rank)
    comm.barrier()
    for _ in range(n_rounds):
        change = rng.normal(size=n).astype(np.float32)
        total += change
        center.update(lambda part, c, change=change: kernels.scaled_add(c, change[part], 1.0))
    comm.barrier()
    total = comm.world.comm.allreduce(total)
    found, left = read(center), residual(comm, center)
    # A random walk of rounding errors: the visitor rounds when it adds its change, and so does the home.
    roundings = 2 * np.sqrt(n_rounds * comm.size) * np.finfo(np.float32).eps * np.abs(total).max()
    np.testing.assert_allclose(found + left, total, rtol=0, atol=roundings)
    if comm.size > 1:
        assert np.abs(found - total).max() > 5 * roundings  # the residuals matter


@SEVERAL
@formats
def test_remote_shards_are_fetched_in_16_bits_and_local_ones_exactly(connect, name):
    comm, n = connect(name), 1000
    center = comm.shared_vector(n, np.float32)
    values = np.random.default_rng(7).normal(size=n).astype(np.float32)
    if comm.rank == 0:
        center.write(values)
    comm.barrier()
    seen = np.zeros(n, np.float32)
    center.update(lambda part, c: kernels.copy(seen[part], c), pushes=False)
    wanted = np.where(is_remote(comm, center), values.astype(SHORT[name]).astype(np.float32), values)
    np.testing.assert_array_equal(seen, wanted)
    comm.barrier()
    np.testing.assert_array_equal(read(center), values)  # a pull changes nothing, and `read` is exact
    assert not residual(comm, center).any()


@SEVERAL
@formats
@pytest.mark.parametrize(("pushes", "pulls"), [(True, True), (False, True)])
def test_wire_bytes_are_counted(connect, name, pushes, pulls):
    comm, n = connect(name), 64_000
    center = comm.shared_vector(n, np.float32)
    comm.barrier()
    center.update(lambda part, c: None, pushes=pushes, pulls=pulls)
    n_remote = int(is_remote(comm, center).sum())
    of_int8 = n_remote + sum(
        4 * -(-(part.stop - part.start) // 256) for part in center.parts if is_remote(comm, center)[part].any()
    )
    sent = of_int8 if name == "int8" else 2 * n_remote
    assert comm.statistics.wire_bytes == 2 * n_remote + pushes * sent
    comm.barrier()
    before = comm.statistics.wire_bytes
    read(center)
    assert comm.statistics.wire_bytes - before == 4 * n_remote


@SEVERAL
@formats
def test_nonfinite_changes_do_not_reach_the_center(connect, name):
    comm, n = connect(name), 1000
    center = comm.shared_vector(n, np.float32)
    comm.barrier()
    n_bad = 0

    def spoil(part, c):
        c += 1
        c[0] = np.nan if comm.rank % 2 else np.inf

    remote = is_remote(comm, center)
    for part in center.parts:
        n_bad += int(remote[part].any())

    def visit(part, c):
        return spoil(part, c) if remote[part].any() else None

    center.update(visit)
    comm.barrier()
    assert np.isfinite(read(center)).all()
    assert comm.statistics.n_nonfinite == n_bad > 0
    comm.barrier()


@SEVERAL
@formats
def test_mailboxes_and_other_dtypes_are_exact(connect, name):
    comm, n = connect(name), 500
    values = np.random.default_rng(comm.rank).normal(size=n)
    boxes = comm.mailboxes(n, np.float32)
    to = (comm.rank + 1) % comm.size
    comm.barrier()
    for _ in range(3):
        boxes.update(to, lambda box, tags: np.copyto(box, values.astype(np.float32)))
    comm.barrier()
    by = np.random.default_rng((comm.rank - 1) % comm.size).normal(size=n)
    boxes.read(comm.rank, lambda box, tags: np.testing.assert_array_equal(box, by.astype(np.float32)))
    center = comm.shared_vector(n, np.float64)
    center.update(lambda part, c: kernels.scaled_add(c, values[part], 1.0))
    comm.barrier()
    np.testing.assert_allclose(read(center, np.float64), comm.world.comm.allreduce(values), rtol=0, atol=1e-14)
    assert not residual(comm, center).any()
    comm.barrier()


@SEVERAL
@formats
def test_several_rows_travel_together(connect, name):
    comm, n = connect(name), 300
    center = comm.shared_vector(n, np.float32, rows=2)
    comm.barrier()

    def add(part, rows):
        rows[0] += 1
        rows[1] -= 2

    for _ in range(4):
        center.update(add)
    comm.barrier()
    for row, each in enumerate((1.0, -2.0)):
        out = np.zeros(n, np.float32)
        center.read(out, row)
        left = comm.world.comm.allreduce(_left_of_row(center, row))
        np.testing.assert_allclose(out + left, 4 * comm.size * each, rtol=1e-5)
    comm.barrier()


def _left_of_row(center, row):
    mine = np.zeros(center.n)
    for index, left in center._blocks.residuals.items():
        mine[center.parts[index]] += left.reshape(2, -1)[row]
    return mine


@SEVERAL
def test_a_failed_visit_leaves_the_next_one_intact(connect, largest_shards):
    """The prefetched block was encoded, too."""
    largest_shards(64)
    comm, n = connect("bfloat16"), 1000
    center = comm.shared_vector(n, np.float32)
    comm.barrier()

    def fail(part, c):
        raise ValueError("planned")

    with pytest.raises(ValueError, match="planned"):
        center.update(fail)
    comm.barrier()
    assert not read(center).any()
    comm.barrier()
    center.update(lambda part, c: c.__iadd__(1) is None)
    comm.barrier()
    np.testing.assert_array_equal(read(center), comm.size)
    comm.barrier()


@SEVERAL
@formats
def test_changes_from_a_rank_that_was_taken_for_dead_are_not_added(connect, name):
    from mpitrain.kernels.native.lock_words import OWNER_MASK

    comm = connect(name)
    center = comm.shared_vector(1000, np.float32)
    blocks = center._blocks
    visitor = comm.size - 1
    index = next(k for k, home in enumerate(blocks.homes) if comm.nodes[home] != comm.nodes[visitor])
    home, slot, words = blocks.homes[index], blocks._slots[index], blocks._locks._words
    if comm.rank == visitor:
        block = blocks.acquire(index, encoded=True)
        block.data[:] = 7
    comm.barrier()
    if comm.rank == home:
        found = words.swap(home, slot, 0, 0)
        assert words.swap(home, slot, found, (found & ~OWNER_MASK) | (home + 1)) == found
    comm.barrier()
    if comm.rank == visitor:
        with pytest.raises(RuntimeError, match=f"taken over by rank {home}"):
            blocks.release(block, updated=True)
    comm.barrier()
    if comm.rank == home:
        assert words.swap(home, slot, (found & ~OWNER_MASK) | (home + 1), found & ~OWNER_MASK) >= 0
    comm.barrier()
    assert not read(center).any()
    comm.barrier()


@SEVERAL
def test_residuals_are_dropped_when_the_center_is_replaced(connect):
    comm = connect("int8")
    comm.split(comm.nodes[comm.rank]).shared_vector(10, np.float32)  # on one node, without encoding
    centers = [comm.shared_vector(1000, np.float32) for _ in range(2)]
    ramp = np.linspace(0, 1, 1000, dtype=np.float32)
    for center in centers:
        center.update(lambda part, c: kernels.scaled_add(c, ramp[part], 1.0))
    comm.barrier()
    assert all(residual(comm, center).any() for center in centers)
    comm.drop_residuals()
    assert not any(residual(comm, center).any() for center in centers)
    comm.barrier()


# ---- all-reduce -----------------------------------------------------------------------------------------------------


@ALL
@formats
@pytest.mark.parametrize("n", [0, 1, 16, 100, 40_003])
def test_a_ring_sums_to_the_precision_of_the_format_with_equal_bits(one_node, name, n):
    from mpitrain.collectives import ring
    from mpitrain.collectives.topology.partition import split

    comm, form = one_node.comm, wire.FORMATS[name]
    everyones = [np.random.default_rng([rank, n]).normal(size=n).astype(np.float32) for rank in range(comm.size)]
    incoming = np.zeros(max(part.stop - part.start for part in split(n, comm.size)), np.float32)
    results = []
    for _ in range(3):
        total = everyones[comm.rank].copy()
        ring.allreduce_encoded(comm, total, incoming, form)
        results.append(total.tobytes())
    assert len(set(comm.allreduce(results))) == 1
    exact = np.sum(everyones, axis=0, dtype=np.float64)
    largest = np.sum(np.abs(everyones), axis=0)
    # Each of the p rounding errors is at most half a unit of the partial sum.
    bound = comm.size * largest * float(ml_dtypes.finfo(SHORT[name]).eps) / 2 + 1e-6
    assert (np.abs(total - exact) <= bound).all()
    if comm.size > 1:
        np.testing.assert_array_equal(total, total.astype(SHORT[name]).astype(np.float32))


@SEVERAL
@formats
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_ranks_have_the_same_bits_after_an_all_reduce(connect, two_nodes, name, dtype, monkeypatch):
    from mpitrain.collectives.topology import allreduce_cost

    monkeypatch.setattr(allreduce_cost, "choose", lambda *_: "ring")
    comm, n = connect(name), 5003
    dtype = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    vector = comm.vector(n, dtype)
    mine = np.random.default_rng(comm.rank).normal(size=n).astype(np.float32)
    vector.local[:] = mine.astype(dtype)
    mean = comm.world.comm.allreduce(vector.local.astype(np.float64)) / comm.size
    comm.allreduce(vector, mean=True)
    everyones = comm.world.comm.allgather(vector.local.tobytes())
    assert len(set(everyones)) == 1
    np.testing.assert_allclose(vector.local.astype(np.float64), mean, rtol=0, atol=0.05)
    of_slice = (slice_of := comm.slice_of(n)).stop - slice_of.start
    on_rail = two_nodes.local_rank < two_nodes.n_rails
    assert comm.statistics.wire_bytes == (2 * of_slice if on_rail else 0)  # half of what float32 takes


@SEVERAL
def test_a_small_all_reduce_and_one_of_float64_are_exact(connect):
    comm = connect("bfloat16")
    for dtype, n in ((np.float32, 100), (np.float64, 70_000)):
        vector = comm.vector(n, dtype)
        vector.local[:] = 1 + 2.0**-20
        comm.allreduce(vector, mean=True)
        np.testing.assert_array_equal(vector.local, np.full(n, 1 + 2.0**-20, dtype))


@SEVERAL
def test_infinite_gradients_stay_infinite(connect, monkeypatch):
    from mpitrain.collectives.topology import allreduce_cost

    monkeypatch.setattr(allreduce_cost, "choose", lambda *_: "ring")
    for name in wire.FORMATS:
        comm = connect(name)
        vector = comm.vector(1000, np.float32)
        vector.local[:] = 1
        if comm.rank == 0:
            vector.local[[3, 700]] = np.inf, np.nan
        comm.allreduce(vector)
        assert np.isposinf(vector.local[3])
        assert np.isnan(vector.local[700])
        assert np.isfinite(np.delete(vector.local, [3, 700])).all()


# ---- methods --------------------------------------------------------------------------------------------------------

QUADRATIC_N, OUTLIER, ETA, ALPHA, STEPS = 512, 400.0, 0.05, 0.05, 150


def center_of_easgd(comm, *, feedback=True):
    """Return EASGD's center after workers have descended in turn, on one node towards 0 and on the other towards 1.

    The targets of every 16th element are -400 and 400, so that changes of the others are less than half a step of int8.
    Collective.
    """
    on_second = comm.nodes[comm.rank]
    target = np.full(QUADRATIC_N, float(on_second), np.float32)
    target[::16] = OUTLIER * (2 * on_second - 1)
    method = EASGD(period=1, moving_rate=ALPHA)
    run = RankRun(method, comm, np.zeros(QUADRATIC_N, np.float32))
    blocks = run.worker._center.vector._blocks
    for _ in range(STEPS):
        for turn in range(comm.size):
            if comm.rank == turn:
                run.run(1, ETA, lambda rank, x: x - target)
                if not feedback:
                    blocks.drop_residuals()
            comm.barrier()
    out = np.zeros(QUADRATIC_N, np.float32)
    run.worker.consensus(out)
    comm.barrier()
    return np.delete(out, np.s_[::16])


@pytest.mark.ranks(2)
@pytest.mark.time_limit(120)
def test_easgd_converges_as_in_float32_and_not_without_error_feedback(connect):
    exact = center_of_easgd(connect("float32"))
    errors = {name: np.abs(center_of_easgd(connect(name)) - exact).max() for name in wire.FORMATS}
    blind = np.abs(center_of_easgd(connect("int8"), feedback=False) - exact).max()
    assert errors["bfloat16"] < 2**-8
    assert errors["float16"] < 2**-11
    assert errors["int8"] < 0.05
    assert blind > 0.2


@pytest.mark.ranks(3)
@pytest.mark.time_limit(120)
@formats
@pytest.mark.parametrize("transport", ["ipc", "staged"])
def test_gpus_exchange_encoded_blocks_through_the_host(name, transport, monkeypatch):
    from mpitrain.collectives.mpi import MPICommunicator
    from mpitrain.collectives.rma import peer_memory
    from mpitrain.collectives.topology import allreduce_cost

    monkeypatch.setattr(peer_memory, "LARGEST_STAGED_SHARD", 300)
    monkeypatch.setattr(allreduce_cost, "choose", lambda *_: "ring")
    n, n_rounds = 2000, 5
    with gpus(2, transport) as host_comm:
        comm = MPICommunicator(host_comm.world, wire=name)
        center, x = comm.shared_vector(n, np.float32), comm.vector(n, np.float32)
        mine = np.random.default_rng(comm.rank).normal(size=n).astype(np.float32)
        gpu.assign(x.local, mine)
        comm.barrier()
        for _ in range(n_rounds):
            center.update(lambda part, c: kernels.scaled_add(c, x.local[part], 1.0))
        comm.barrier()
        out, left, mine64 = np.zeros(n, np.float32), np.zeros(n), mine.astype(np.float64)
        center.read(out)
        for index, of_block in center._blocks.residuals.items():
            left[center.parts[index]] += of_block
        total = comm.world.comm.allreduce(mine64)
        np.testing.assert_allclose(out + comm.world.comm.allreduce(left), n_rounds * total, rtol=0, atol=1e-4)
        assert np.abs(out - n_rounds * total).max() > 1e-4
        comm.allreduce(x)
        np.testing.assert_allclose(gpu.to_host(x.local), total, rtol=0, atol=0.1)
        assert len(set(comm.world.comm.allgather(gpu.to_host(x.local).tobytes()))) == 1
        comm.barrier()
        comm.free()


# ---- errors ---------------------------------------------------------------------------------------------------------


@ALL
def test_wire_formats_need_progress_threads(windows, two_nodes, one_node):
    from mpitrain.collectives.mpi import MPICommunicator

    if windows.n_nodes > 1:
        with pytest.raises(UsageError, match="MPITRAIN_BETWEEN_NODES=windows"):
            MPICommunicator(windows, wire="bfloat16")
    with pytest.raises(UsageError, match="fp4"):
        MPICommunicator(one_node, wire="fp4")
    MPICommunicator(one_node, wire="int8").free()  # one node needs none


@SEVERAL
def test_a_part_of_the_ranks_sums_and_updates_in_a_wire_format(connect):
    whole = connect("bfloat16")
    part = whole.split(int(whole.rank > 0))
    n = 100_001
    vector, center = part.vector(n, np.float32), part.shared_vector(n, np.float32)
    values = [np.random.default_rng(k).normal(size=n).astype(np.float32) for k in range(part.size)]
    vector.local[...] = values[part.rank]
    center.write(np.zeros(n, np.float32))
    part.barrier()
    before = part.statistics.wire_bytes
    part.allreduce(vector)
    sent = part.statistics.wire_bytes - before
    assert sent < 3 * n  # 2 bytes per element, and 4 without a format
    assert (sent > 0) == (part.world.n_nodes > 1)
    np.testing.assert_allclose(vector.local, sum(values), rtol=0, atol=0.1)
    assert len(set(part.world.comm.allgather(vector.local.tobytes()))) == 1
    center.update(lambda part_, c: np.add(c, values[part.rank][part_], out=c) is None)
    part.barrier()
    found = np.zeros(n, np.float32)
    center.read(found)
    np.testing.assert_allclose(found, sum(values), rtol=0, atol=0.1)
    part.barrier()


@SEVERAL
def test_wire_formats_do_not_work_if_mpi_moves_device_memory():
    from mpitrain.collectives.mpi import MPICommunicator

    with gpus(2, "cuda-aware") as comm:
        with pytest.raises(UsageError, match="transport staged or ipc"):
            MPICommunicator(comm.world, wire="float16")
        MPICommunicator(comm.world, on_host=True, wire="float16").free()
