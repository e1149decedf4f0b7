"""Windows: all ranks see the writes of a rank, on its node and on others, for any length and dtype."""

import os
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from mpitrain import UsageError

ALL = pytest.mark.ranks(1, 2, 3, 5)
DTYPES = [np.uint8, np.float16, ml_dtypes.bfloat16, np.float32, np.float64]
LENGTHS = (17, 0, 1, 100_003, 16)  # of rank 0, 1, ...


def counting(rank, n, dtype):
    """Return small whole numbers, exact in every dtype and different at every rank."""
    return ((np.arange(n) * 7 + rank) % 101).astype(dtype)


@ALL
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_ranks_read_the_writes_of_a_rank(world, window, fetch, dtype):
    shared = window(LENGTHS[world.rank], dtype)
    shared.local[:] = counting(world.rank, LENGTHS[world.rank], dtype)
    shared.sync()
    world.barrier()
    for rank in range(world.size):
        n = LENGTHS[rank]
        assert np.array_equal(fetch(shared, rank, n), counting(rank, n, dtype))
        assert np.array_equal(fetch(shared, rank, n - n // 2, n // 2), counting(rank, n, dtype)[n // 2 :])


@ALL
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rank_has_the_writes_of_others(world, window, store, dtype):
    each = 33
    shared = window(each * world.size, dtype)
    for rank in range(world.size):
        store(shared, rank, counting(world.rank, each, dtype), each * world.rank)
    world.barrier()
    shared.sync()
    assert np.array_equal(shared.local, np.concatenate([counting(rank, each, dtype) for rank in range(world.size)]))


@pytest.mark.ranks(2, 3, 5)
@pytest.mark.parametrize("largest", [1, 7, 64, 99, 100, 101])
def test_large_copies_are_split_into_messages(world, window, fetch, store, monkeypatch, largest):
    from mpitrain.collectives.rma import remote_copies

    for name in ("LARGEST_MESSAGE_BYTES", "LARGEST_REQUEST_BYTES"):
        monkeypatch.setattr(remote_copies, name, largest)
    n = 25
    shared = window(n * world.size + 3, np.float32)
    for rank in range(world.size):
        store(shared, rank, counting(world.rank, n, np.float32), n * world.rank + 3)
    world.barrier()
    for rank in range(world.size):
        assert not fetch(shared, rank, 3).any()
        for writer in range(world.size):
            assert np.array_equal(fetch(shared, rank, n, n * writer + 3), counting(writer, n, np.float32))


@ALL
def test_a_new_window_is_zero_even_in_reused_memory(world):
    from mpitrain.collectives.rma.window import Window

    for n in (1, 5000, 300_000):
        for _ in range(2):
            used = Window(world, n, np.uint8)
            assert not used.local.any()
            world.barrier()
            used.local[:] = 255
            used.free()


@ALL
def test_windows_may_be_empty(world, window, fetch, store):
    shared = window(0, np.float32)
    for rank in range(world.size):
        store(shared, rank, np.zeros(0, np.float32))
        assert fetch(shared, rank, 0).size == 0


@ALL
def test_arrays_are_reachable_on_their_node_only(world, window):
    shared = window(3, np.float32)
    assert shared.of(world.rank) is shared.local
    assert [shared.of(rank) is not None for rank in range(world.size)] == [node == world.node for node in world.nodes]


@ALL
def test_too_little_memory_on_one_node_is_an_error_of_all_ranks(world, window):
    from mpitrain.collectives.rma.window import Window

    with pytest.raises(UsageError, match="MiB of shared memory are needed"):
        Window(world, 2**60 if world.rank == world.size - 1 else 1, np.uint8)
    assert window(1, np.uint8).local[0] == 0


@pytest.mark.ranks(1)
def test_too_little_room_is_said_with_its_numbers(monkeypatch):
    from mpitrain.collectives.world.shared_memory import check_free_memory

    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=64 * 2**8, f_frsize=4096))
    check_free_memory(64 * 2**20)
    with pytest.raises(UsageError, match=r"100 MiB .* /dev/shm has only 64 MiB free: .*--shm-size"):
        check_free_memory(100 * 2**20)


@pytest.mark.ranks(1)
def test_without_a_file_system_for_shared_memory_nothing_is_checked(tmp_path):
    from mpitrain.collectives.world.shared_memory import check_free_memory

    check_free_memory(2**60, str(tmp_path / "none"))


def leave_untouched(window_class, monkeypatch):
    """Leave large windows without pages; small ones, of locks, must be zero."""
    touch = window_class._touch
    monkeypatch.setattr(window_class, "_touch", lambda self, part: self.local.nbytes > 2**30 or touch(self, part))


@pytest.mark.ranks(2)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_elements_beyond_2_gib_are_reachable(world, window, fetch, store, monkeypatch, dtype):
    """Only the last pages are touched, so that the vector takes little memory."""
    from mpitrain.collectives.rma.window import Window

    leave_untouched(Window, monkeypatch)
    n = 2**31 // np.dtype(dtype).itemsize + 2**16
    big = window(n if world.rank == 1 else 1, dtype)
    at = n - 1000
    if world.rank == 0:
        store(big, 1, counting(0, 1000, dtype), at)
    world.barrier()
    if world.rank == 1:
        assert np.array_equal(big.local[at:], counting(0, 1000, dtype))
        big.local[at:] = counting(1, 1000, dtype)
        big.sync()
    world.barrier()
    assert np.array_equal(fetch(big, 1, 1000, at), counting(1, 1000, dtype))


@pytest.mark.ranks(2)
def test_blocks_beyond_2_gib_are_exchanged(world, monkeypatch):
    from mpitrain.collectives.rma.mpi_blocks import MPIBlocks
    from mpitrain.collectives.rma.window import Window
    from mpitrain.collectives.world.statistics import Statistics

    leave_untouched(Window, monkeypatch)
    blocks = MPIBlocks(world, [1, 1], [2**29, 1000], np.float32, Statistics())
    for _ in range(10):
        block = blocks.acquire(1)
        block.data += 1
        blocks.release(block, updated=True)
    world.barrier()
    block = blocks.acquire(1)
    total, version = block.data.copy(), block.version
    blocks.release(block, updated=False)
    world.barrier()
    blocks.free()
    assert np.all(total == 20)
    assert version == 20
