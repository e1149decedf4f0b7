"""Owner-aware locks: one owner at a time, versions that count, and what becomes of the lock of a dead rank."""

import time

import numpy as np
import pytest

ALL = pytest.mark.ranks(1, 2, 3, 4, 5)


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
def test_a_sum_made_in_two_halves_under_the_lock_loses_nothing(world, locks, window, fetch, store, updated):
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
def test_the_version_is_what_the_lock_has_seen(world, locks):
    """It is read in the critical section: no two updates see the same one, and none is left out."""
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
def test_everybody_can_tell_the_owner(world, locks):
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
def test_a_free_lock_was_not_waited_for(world, locks):
    if world.rank == 0:
        assert locks.acquire(world.size - 1, 0) == (0, 0.0)
        locks.release(world.size - 1, 0, 0, updated=True)
    world.barrier()
    if world.rank == world.size - 1:
        _, waited = locks.acquire(world.size - 1, 0)  # the version is not the one it expects, but nobody holds it
        assert waited == 0.0


@ALL
def test_the_cpu_swaps_words_that_all_ranks_share_and_mpi_all_others(world, locks):
    from mpitrain.collectives.rma.locks import MPIWords, NodeWords

    assert type(locks._words) is (NodeWords if world.n_nodes == 1 else MPIWords)


@ALL
def test_what_is_written_under_the_lock_is_seen_by_its_next_owner(one_node):
    """Without any other synchronisation, where all ranks are on one node."""
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


@pytest.mark.ranks(2, 3, 4, 5)
def test_waiting_for_an_owner_is_counted(world, locks):
    home, index = last_word(world)
    if world.rank == 0:
        locks.acquire(home, index)
    world.barrier()
    if world.rank == 0:
        for other in range(1, world.size):
            world.comm.recv(source=other)
        time.sleep(0.2)
        locks.release(home, index, 0, updated=True)
    else:
        version, waited = locks.acquire(home, index, before_wait=lambda: world.comm.send(None, 0))
        locks.release(home, index, version, updated=True)
        assert waited > 0.1


@pytest.mark.ranks(2, 3, 4, 5)
def test_a_dead_rank_s_lock_is_taken_over_by_one_swap(world, locks, monkeypatch):
    home, index = last_word(world)
    if world.rank == 0:
        version, _ = locks.acquire(home, index)
    world.barrier()
    if world.rank == 1:
        done, swap = [], locks._words.swap

        def watched(home, index, expected, new):
            found = swap(home, index, expected, new)
            if found == expected:
                done.append((expected, new))
            return found

        monkeypatch.setattr(locks._words, "swap", watched)
        monkeypatch.setattr(type(world), "dead", {0})
        assert locks.acquire(home, index)[0] == 0
        assert done == [(1, 2)]  # from rank 0's to its own: at no time was it anybody else's
        assert locks.owner(home, index) == 1
        locks.release(home, index, 0, updated=True)
    world.barrier()
    if world.rank == 0:
        with pytest.raises(RuntimeError, match="taken for dead"):
            locks.release(home, index, version, updated=True)


@pytest.mark.ranks(2, 3, 4, 5)
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
