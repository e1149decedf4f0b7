"""Parts of the ranks, one-sided waiting, and all-reduce in the background."""

import numpy as np
import pytest

ALL = pytest.mark.ranks(1, 2, 3, 4, 5)
SEVERAL = pytest.mark.ranks(3, 4, 5)


@ALL
def test_parts_are_worlds_of_their_own(comm):
    part = comm.split(comm.rank % 2)
    members = list(range(comm.rank % 2, comm.size, 2))
    assert (part.rank, part.size) == (members.index(comm.rank), len(members))
    assert part.statistics is comm.statistics
    # The nodes of the whole, renumbered.
    nodes = [comm.nodes[rank] for rank in members]
    assert part.nodes == [sorted(set(nodes)).index(node) for node in nodes]
    assert part.world.device == comm.world.device

    total = part.vector(1000, np.float32)
    total.local[...] = comm.rank
    part.allreduce(total)
    assert np.all(total.local == sum(members))
    center = part.shared_vector(1000, np.float32)
    center.update(lambda _, c: np.add(c, 1, out=c) is None)
    part.barrier()
    out = np.zeros(1000, np.float32)
    center.read(out)
    assert np.all(out == len(members))
    # The parts run independently of each other, and the whole stays usable.
    for _ in range(3 * (comm.rank % 2)):
        part.barrier()
    assert comm.gather([part.rank])[:, 0].tolist() == [rank // 2 for rank in range(comm.size)]


@ALL
def test_a_part_of_a_part(comm):
    inner = comm.split(comm.rank // 2).split(0)
    assert inner.gather([comm.rank])[:, 0].tolist() == [
        rank for rank in range(comm.size) if rank // 2 == comm.rank // 2
    ]


@ALL
def test_a_rank_waits_for_a_one_sided_write(comm):
    """A message goes around a ring: each rank waits for its mailbox, then fills that of the next rank."""
    boxes = comm.mailboxes(4, np.float64)

    def arrived():
        return boxes.peek(comm.rank)[0] > 0

    def post(box, tags):
        box[...] = comm.rank
        tags[0] = 1

    if comm.rank > 0:
        comm.wait_until(arrived)
    boxes.update((comm.rank + 1) % comm.size, post)
    comm.wait_until(arrived)
    found = []
    boxes.update(comm.rank, lambda box, _: found.extend(box.tolist()))
    assert found == [(comm.rank - 1) % comm.size] * 4
    comm.barrier()


@ALL
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("n", [0, 1, 70_001])
def test_an_all_reduce_in_the_background(comm, n, dtype):
    vector = comm.vector(n, dtype)
    values = np.random.default_rng(0).integers(-4, 4, (comm.size, n)).astype(dtype)
    vector.local[...] = values[comm.rank]
    pending = comm.start_allreduce(vector)
    other = comm.gather([comm.rank])  # another collective in the meantime
    pending.wait()
    assert other.size == comm.size
    assert np.array_equal(vector.local, values.sum(0))
    vector.local[...] = comm.rank
    comm.start_allreduce(vector, mean=True).wait()
    np.testing.assert_allclose(vector.local, (comm.size - 1) / 2, rtol=1e-3)
    assert comm.statistics.n_exchanges == 2
    assert comm.statistics.bytes_sent == 2 * (2 * (comm.size - 1) * n * np.dtype(dtype).itemsize // comm.size)


@ALL
def test_free_waits_for_a_pending_all_reduce(world):
    from mpitrain.collectives.mpi import MPICommunicator

    for _ in range(3):
        comm = MPICommunicator(world)
        vector, events = comm.vector(1_000_000, np.float32), []
        vector.local[...] = 1 + comm.rank
        pending = comm.start_allreduce(vector)
        wait, free = pending.wait, vector.free

        def wait_and_note(wait=wait, vector=vector, events=events):
            wait()
            events.append(np.unique(vector.local).tolist())

        def note_and_free(free=free, events=events):
            events.append("freed")
            free()

        pending.wait, vector.free = wait_and_note, note_and_free
        comm.free()
        assert events == [[sum(range(1, 1 + world.size))], "freed"]
        wait()


@pytest.fixture
def rest(two_nodes, monkeypatch):
    """Return a communicator of all ranks but the first, and one of the whole; an MPI window between nodes is an error.

    The first rank gets a communicator of itself. Collective.
    """
    from mpi4py import MPI

    from mpitrain.collectives.mpi import MPICommunicator

    def refuse(*_, **__):
        raise AssertionError("a window between nodes")

    class OnNodes(MPI.Win):
        Create, Allocate = refuse, refuse

    monkeypatch.setattr(MPI, "Win", OnNodes)
    whole = MPICommunicator(two_nodes)
    part = whole.split(int(whole.rank > 0))
    yield part, whole
    two_nodes.comm.Barrier()
    whole.free()


@SEVERAL
def test_a_part_of_several_nodes_uses_the_progress_threads_of_the_run(rest):
    part, whole = rest
    if part.size > 1:
        assert part.world.members == list(range(1, whole.size))
        assert (part.world.n_nodes > 1) == (part.world.service is not None)
    n = 5000
    center = part.shared_vector(n, np.float32)
    for _ in range(10):
        center.update(lambda _, c: np.add(c, 1, out=c) is None)
    boxes, seen = part.mailboxes(4, np.float64), []
    for peer in range(part.size):
        boxes.update(peer, lambda box, tags: np.add(box, 1 + part.rank, out=box) is None)
    part.barrier()
    out = np.zeros(n, np.float32)
    center.read(out)
    assert np.all(out == 10 * part.size)  # no update is lost
    for peer in range(part.size):
        boxes.read(peer, lambda box, _: seen.append(box.copy()))
    assert np.all(np.array(seen) == sum(range(1, part.size + 1)))
    part.barrier()


@SEVERAL
def test_lock_words_of_a_part_name_ranks_of_the_run_and_its_waits_ranks_of_the_part(rest):
    """A thread that serves a lock compares its owner with the dead ranks of the run."""
    part, _ = rest
    blocks = part._blocks([part.size - 1], [10], np.float32)
    word = blocks._locks._words.swap
    for owner in range(part.size):
        if part.rank == owner:
            block = blocks.acquire(0)
        part.barrier()
        assert blocks.lock_owner(0) == owner
        assert word(part.size - 1, 0, 0, 0) & 0xFFFFFF == part.world.members[owner] + 1
        part.barrier()
        if part.rank == owner:
            blocks.release(block, updated=True)
        part.barrier()
    assert blocks.lock_owner(0) is None


@SEVERAL
def test_a_part_adopts_vectors_of_the_whole_with_which_it_computes_and_which_it_reads(rest):
    part, whole = rest
    x = whole.vector(1000, np.float64)
    x.local[...] = whole.rank
    adopted, found = part.adopt(x), []
    assert adopted.local is x.local
    part.barrier()
    for peer in range(part.size):
        part.read(adopted, peer, lambda values: found.append(float(values[0])))
    assert found == list(part.world.members)
    part.barrier()
    part.allreduce(adopted, mean=True)
    np.testing.assert_allclose(x.local, np.mean(part.world.members), rtol=1e-12)
    whole.barrier()
