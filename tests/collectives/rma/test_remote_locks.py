"""Blocks between nodes, moved by the progress threads: what is begun early ends well, and nothing is cut wrongly."""

import numpy as np
import pytest

from mpitrain.kernels.native import service


@pytest.fixture
def comm(two_nodes):
    from mpitrain.collectives.mpi import MPICommunicator

    communicator = MPICommunicator(two_nodes)
    yield communicator
    two_nodes.comm.Barrier()
    communicator.free()


@pytest.mark.ranks(2, 3)
def test_a_visit_that_fails_leaves_every_lock_free(comm, largest_shards):
    """Also that of the block which had set out already."""
    largest_shards(64)
    center = comm.shared_vector(1000, np.float32)
    n_shards = len(center.parts)
    comm.barrier()

    for fails_at in range(n_shards):
        visited = []

        def fail(part, shard, visited=visited, fails_at=fails_at):
            visited.append(part)
            if len(visited) > fails_at:
                raise ValueError("as it should")

        with pytest.raises(ValueError, match="as it should"):
            center.update(fail)
    comm.barrier()
    assert {center._blocks.lock_owner(index) for index in range(n_shards)} == {None}
    comm.barrier()
    center.update(lambda part, shard: shard.__iadd__(1) is None)
    comm.barrier()
    out = np.zeros(1000, np.float32)
    center.read(out)
    assert np.all(out == comm.size)


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("more", [-1, 0, 1])
@pytest.mark.parametrize("n_pieces", [1, service.N_PIECES])
def test_blocks_of_any_number_of_pieces_arrive_whole(comm, more, n_pieces):
    n = n_pieces * service.PIECE_BYTES // 4 + more
    boxes = comm.mailboxes(n, np.float32)
    target = (comm.rank + 1) % comm.size
    values = np.arange(n, dtype=np.float32)

    def write(box, tags):
        box[:] = values + comm.rank
        tags[:] = comm.rank

    comm.barrier()
    boxes.update(target, write)
    comm.barrier()
    seen = {}
    for owner in range(comm.size):
        writer = (owner - 1) % comm.size
        boxes.read(
            owner,
            lambda box, tags, owner=owner, writer=writer: seen.update(
                {owner: np.array_equal(box, values + writer) and np.all(tags == writer)}
            ),
        )
    assert all(seen.values())
    assert len(seen) == comm.size


@pytest.mark.ranks(2, 3, 4)
def test_a_visit_broken_off_between_two_blocks_does_not_spoil_the_next(comm, largest_shards):
    """The next block had set out: whoever comes for another one gives it back first."""
    largest_shards(64)
    center = comm.shared_vector(256 * comm.size, np.float32)
    blocks, n_shards = center._blocks, len(center.parts)
    comm.barrier()
    if comm.rank == 0:
        first, second = center._steps[0]
        blocks.release(blocks.acquire(first, second), updated=False)  # and an interrupt
    center.update(lambda part, c: np.add(c, np.arange(part.start, part.stop), out=c) is None)
    comm.barrier()
    out = np.empty(center.n, np.float32)
    center.read(out)
    assert np.array_equal(out, comm.size * np.arange(center.n))
    comm.barrier()
    assert {blocks.lock_owner(index) for index in range(n_shards)} == {None}
