"""Locks that know their owner: one owner at a time, versions that count, and locks of dead ranks."""

import time

import numpy as np
import pytest

ALL = pytest.mark.ranks(1, 2, 3, 5)


@pytest.fixture
def locks(world):
    """Collective. Rank r is the home of r + 1 words."""
    from mpitrain.collectives.rma.locks import LockTable

    table = LockTable(world, [rank + 1 for rank in range(world.size)])
    yield table
    world.comm.Barrier()
    table.free()


def last_word(world):
    return world.size - 1, world.size - 1


@ALL
@pytest.mark.parametrize("updated", [True, False])
def test_no_read_modify_write_under_the_lock_is_lost(world, locks, window, fetch, store, updated):
    n = 200
    counter = window(1, np.int64)
    home, index = last_word(world)
    for _ in range(n):
        version, _ = locks.acquire(home, index)
        store(counter, home, fetch(counter, home, 1) + 1)
        locks.release(home, index, version, updated=updated)
    world.barrier()
    assert fetch(counter, home, 1) == n * world.size
    version, _ = locks.acquire(home, index)
    locks.release(home, index, version, updated=False)
    assert version == updated * n * world.size


@ALL
def test_the_version_counts_the_updates(world, locks):
    """It is read in the critical section: each update sees another version, and none is skipped."""
    n = 50
    home, index = last_word(world)
    mine = []
    for _ in range(n):
        version, _ = locks.acquire(home, index)
        mine.append(version)
        locks.release(home, index, version, updated=True)
    assert mine == sorted(mine)
    assert sorted(v for versions in world.comm.allgather(mine) for v in versions) == list(range(n * world.size))


@ALL
def test_words_are_independent(world, locks):
    for home in range(world.size):
        for index in range(home + 1):
            if world.rank == (home + index) % world.size:
                for _ in range(home + index + 1):
                    version, _ = locks.acquire(home, index)
                    locks.release(home, index, version, updated=True)
    world.barrier()
    for home in range(world.size):
        for index in range(home + 1):
            version, _ = locks.acquire(home, index)
            locks.release(home, index, version, updated=False)
            assert version == home + index + 1


@ALL
def test_all_ranks_see_the_owner(world, locks):
    home, index = last_word(world)
    for owner in range(world.size):
        if world.rank == owner:
            version, _ = locks.acquire(home, index)
        world.barrier()
        assert locks.owner(home, index) == owner
        assert locks.owner(0, 0) == (owner if world.size == 1 else None)
        world.barrier()
        if world.rank == owner:
            locks.release(home, index, version, updated=True)
        world.barrier()
        assert locks.owner(home, index) is None
        world.barrier()


@ALL
def test_acquiring_a_free_lock_takes_no_wait(world, locks):
    if world.rank == 0:
        assert locks.acquire(world.size - 1, 0) == (0, 0.0)
        locks.release(world.size - 1, 0, 0, updated=True)
    world.barrier()
    if world.rank == world.size - 1:
        _, waited = locks.acquire(world.size - 1, 0)  # not at the version last seen, but free
        assert waited == 0.0


@ALL
def test_the_cpu_swaps_the_words_of_one_node_and_mpi_those_of_several(world, locks):
    from mpitrain.collectives.rma.locks import MPIWords, NodeWords

    assert type(locks._words) is (NodeWords if world.n_nodes == 1 else MPIWords)


@ALL
def test_writes_under_the_lock_are_visible_to_its_next_owner(one_node):
    """Without any other synchronisation, if all ranks are on one node."""
    from mpitrain.collectives.rma.locks import LockTable
    from mpitrain.collectives.rma.window import Window

    n = 300
    locks, window = LockTable(one_node, [2] * one_node.size), Window(one_node, 1000, np.int64)
    home = one_node.size - 1
    memory = window.of(home)
    assert locks.orders_memory
    for _ in range(n):
        version, _ = locks.acquire(home, 1)
        assert np.all(memory == version)
        memory += 1
        locks.release(home, 1, version, updated=True)
    one_node.barrier()
    assert np.all(memory == n * one_node.size)
    one_node.barrier()
    window.free()
    locks.free()


@pytest.mark.ranks(2, 3, 5)
def test_waiting_for_an_owner_is_counted(world, locks):
    home, index = last_word(world)
    if world.rank == 0:
        locks.acquire(home, index)
    world.barrier()
    if world.rank == 0:
        for other in range(1, world.size):
            world.comm.recv(source=other)
        time.sleep(0.05)
        locks.release(home, index, 0, updated=True)
    else:
        began = time.perf_counter()
        version, waited = locks.acquire(home, index, before_wait=lambda: world.comm.send(None, 0))
        elapsed = time.perf_counter() - began
        locks.release(home, index, version, updated=True)
        assert 0 < waited < elapsed  # 0 if the lock was free


@pytest.mark.ranks(2, 3, 5)
def test_a_dead_rank_s_lock_is_taken_over_by_one_swap(world, locks, monkeypatch):
    home, index = last_word(world)
    if world.rank == 0:
        version, _ = locks.acquire(home, index)
    world.barrier()
    if world.rank == 1:
        done, swap = [], locks._words.swap

        def recorded(home, index, expected, new):
            found = swap(home, index, expected, new)
            if found == expected:
                done.append((expected, new))
            return found

        monkeypatch.setattr(locks._words, "swap", recorded)
        monkeypatch.setattr(type(world), "dead", {0})
        assert locks.acquire(home, index)[0] == 0
        assert done == [(1, 2)]  # from rank 0 to rank 1, without another owner in between
        assert locks.owner(home, index) == 1
        locks.release(home, index, 0, updated=True)
    world.barrier()
    if world.rank == 0:
        with pytest.raises(RuntimeError, match="considered dead"):
            locks.release(home, index, version, updated=True)


@pytest.mark.ranks(2, 3, 5)
def test_survivors_share_the_lock_of_a_dead_rank(world, locks, monkeypatch):
    n = 30
    home, index = last_word(world)
    if world.rank == 0:
        locks.acquire(home, index)
    world.barrier()
    if world.rank > 0:
        monkeypatch.setattr(type(world), "dead", {0})
        for _ in range(n):
            version, _ = locks.acquire(home, index)
            locks.release(home, index, version, updated=True)
    world.barrier()
    assert locks.acquire(home, index)[0] == n * (world.size - 1) if world.rank == 0 else True
