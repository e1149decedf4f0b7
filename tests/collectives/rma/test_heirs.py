"""Blocks of other nodes when the rank that serves them dies: repeated requests, takeovers on the node, and heirs."""

import ctypes
import itertools
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest

from mpitrain.errors import RankFailed
from mpitrain.kernels.native.lock_words import OWNER_BITS, OWNER_MASK

N_BLOCKS, LENGTH = 6, 8
NODES = [0, 1, 1, 2]  # this process is rank 0; the blocks are at home on node 1
HOMES = [1, 2, 1, 2, 1, 2]
ME = 1  # owner bits of rank 0


def subsets(n: int) -> Iterator[frozenset[int]]:
    for size in range(n + 1):
        yield from map(frozenset, itertools.combinations(range(n), size))


@pytest.mark.parametrize("n_ranks", [1, 2, 3, 4, 5])
def test_ranks_that_know_of_different_deaths_find_the_same_heir(n_ranks):
    """If one knows of fewer deaths, then its heir is that of the other, or it is dead and gives no answer."""
    from mpitrain.collectives.rma.heirs import heir_of

    for home in range(n_ranks):
        for dead in subsets(n_ranks):
            heir = heir_of(home, n_ranks, dead)
            alive = set(range(n_ranks)) - dead - {home}
            assert heir in alive if alive else heir is None
            for more in subsets(n_ranks):
                if dead <= more and heir not in more:
                    assert heir_of(home, n_ranks, more) == heir


def server_of(nodes: list[int], dead: frozenset[int], rank: int) -> int | None:
    from mpitrain.collectives.world.world import World

    return World.server_of(SimpleNamespace(nodes=nodes, size=len(nodes), dead=dead), rank)


def test_the_memory_of_a_rank_is_served_by_a_living_rank_of_its_node_as_long_as_there_is_one():
    nodes = [0, 0, 1, 1, 1, 2]
    for dead, rank in itertools.product(subsets(len(nodes)), range(len(nodes))):
        server = server_of(nodes, dead, rank)
        alive = [other for other in range(len(nodes)) if nodes[other] == nodes[rank] and other not in dead]
        if rank in alive:
            assert server == rank
        else:
            assert server in alive if alive else server is None


def array_at(address: int, n: int, dtype: type) -> np.ndarray:
    return np.frombuffer((ctypes.c_byte * (n * np.dtype(dtype).itemsize)).from_address(address), dtype)


class Servers:
    """The progress threads of all other ranks, in this process. They do what a request says when it is awaited.

    Args:
        dead: The ranks that have died; changed in place.
    """

    def __init__(self, dead: set[int]) -> None:
        self.dead, self.plan, self.n_requests = dead, {}, 0

    def fetch(self, server, addresses, arrays, owner, encoded, *, retakes=False, sent=True, also=()):
        def serve(part: str) -> int:
            word = array_at(owner[0], 1, np.int64)
            holder = int(word[0]) & OWNER_MASK
            assert holder == 0 or holder - 1 in self.dead or (retakes and holder == owner[1]), "this would hang"
            free = int(word[0]) & ~OWNER_MASK
            word[0] = free | owner[1]
            for address, array in zip(addresses, arrays, strict=True):
                array[:] = array_at(address, array.size, array.dtype)
            return free

        return self._request("fetch", server, serve)

    def store(self, server, addresses, arrays, swap, encoded, *, also=()):
        def serve(part: str) -> int:
            for address, array in zip(addresses, arrays, strict=True):
                n = array.size if part == "whole" else array.size // 2
                if n:
                    array_at(address, n, array.dtype)[:] = array[:n]
            if part == "half":
                return 0
            word = array_at(swap[0], 1, np.int64)
            assert word[0] == swap[1], "the lock is not this rank's"
            word[0] = swap[2]
            return swap[1]

        return self._request("store", server, serve)

    def swap(self, server, address, before, after):
        def serve(part: str) -> int:
            word = array_at(address, 1, np.int64)
            found = int(word[0])
            if found == before:
                word[0] = after
            return found

        return self._request("swap", server, serve).wait()

    def _request(self, kind, server, serve):
        from mpitrain.collectives.world.transfers import ServerLost

        self.n_requests += 1
        done = []

        def wait() -> int:
            if not done:
                if server in self.dead:
                    raise ServerLost
                moment = self.plan.pop((kind, server), None)
                if moment in ("after", "half"):
                    serve("whole" if moment == "after" else "half")
                if moment is not None:
                    self.dead |= moment_deaths(server, self.kills_node)
                    raise ServerLost
                done.append(serve("whole"))
            return done[0]

        return SimpleNamespace(
            wait=wait,
            granted=lambda: True,
            wait_for_lock=lambda: wait() * 0.0,
            was_taken=False,
            polling=None,
            rank=server,
        )

    kills_node = False


def moment_deaths(server: int, kills_node: bool) -> set[int]:
    return {rank for rank, node in enumerate(NODES) if node == NODES[server]} if kills_node else {server}


class Blocks:
    """Blocks of another node, as rank 0 sees them, and their memory."""

    def __init__(self, *, continues: bool = True) -> None:
        from mpitrain.collectives.rma.remote_blocks import RemoteBlocks
        from mpitrain.collectives.world.statistics import Statistics
        from mpitrain.collectives.world.world import World

        self.dead: set[int] = set()
        world = SimpleNamespace(
            size=len(NODES),
            nodes=NODES,
            dead=self.dead,
            survives_failures=True,
            allgather=lambda value: [value] * len(NODES),  # this process has the memory of all ranks
        )
        world.server_of = lambda rank: World.server_of(world, rank)
        self.elements = np.zeros(N_BLOCKS * LENGTH, np.float32)
        self.tags, self.words = np.zeros(N_BLOCKS * 4), np.zeros(N_BLOCKS, np.int64)
        memory = SimpleNamespace(
            world=world,
            homes=HOMES,
            lengths=[LENGTH] * N_BLOCKS,
            starts=[LENGTH * index for index in range(N_BLOCKS)],
            slots=list(range(N_BLOCKS)),
            data=SimpleNamespace(local=self.elements, dtype=self.elements.dtype, book=book_of(self.elements)),
            tags=SimpleNamespace(local=self.tags, book=book_of(self.tags)),
            staging_buffers=lambda n: [np.zeros(LENGTH, np.float32) for _ in range(n)],
            longest_remote=LENGTH,
        )
        locks = SimpleNamespace(
            mine=ME,
            address=lambda home, slot, server: self.words.ctypes.data + 8 * slot,
            release_swap=lambda version, updated: (version << OWNER_BITS | ME, (version + updated) << OWNER_BITS),
        )
        self.servers = Servers(self.dead)
        self.blocks = RemoteBlocks(memory, locks, self.servers, Statistics(), n_staging_buffers=4, continues=continues)
        self.restarts: list[tuple[int, bool]] = []
        self.blocks.on_restart = self.restart

    def restart(self, block, is_empty):
        self.restarts.append((block.index, is_empty))
        if is_empty:
            block.data[:] = 100

    def add_one(self) -> None:
        for locked in self.blocks.visit(range(N_BLOCKS), updated=True, encoded=False):
            with locked as block:
                block.data += 1
                block.tags[0] += 1
        self.blocks.wait()

    def read(self) -> np.ndarray:
        found = np.zeros((N_BLOCKS, LENGTH), np.float32)
        for locked in self.blocks.visit(range(N_BLOCKS), updated=False, encoded=False):
            with locked as block:
                found[block.index] = block.data
        self.blocks.wait()
        return found


def book_of(array: np.ndarray) -> SimpleNamespace:
    return SimpleNamespace(address=lambda home, server: array.ctypes.data)


MOMENTS = [("fetch", "before"), ("fetch", "after"), ("store", "before"), ("store", "half"), ("store", "after")]


@pytest.mark.parametrize(("kind", "moment"), MOMENTS, ids=lambda value: value)
def test_every_block_is_changed_exactly_once_whenever_its_server_dies(kind, moment):
    """The other rank of the node goes on with the same memory: nothing is lost, nothing is done twice."""
    all_blocks = Blocks()
    all_blocks.add_one()
    all_blocks.servers.plan[kind, 1] = moment
    all_blocks.add_one()
    assert all_blocks.dead == {1}
    all_blocks.add_one()
    assert np.array_equal(all_blocks.elements, np.full(N_BLOCKS * LENGTH, 3, np.float32))
    assert np.array_equal(all_blocks.tags[::4], np.full(N_BLOCKS, 3))
    assert np.array_equal(all_blocks.words, np.full(N_BLOCKS, 3 << OWNER_BITS))
    assert all_blocks.restarts == []


@pytest.mark.parametrize(("kind", "moment"), MOMENTS, ids=lambda value: value)
def test_blocks_of_a_lost_node_continue_from_the_values_of_the_first_visitor(kind, moment):
    all_blocks = Blocks()
    all_blocks.add_one()
    all_blocks.servers.plan[kind, 1], all_blocks.servers.kills_node = moment, True
    all_blocks.add_one()
    assert all_blocks.dead == {1, 2}
    found = all_blocks.read()
    # A block whose change was lost with the node has no values before this reader sets them.
    changed = {index: found[index, 0] == 101 for index in range(N_BLOCKS)}
    assert all((found[index] == (101 if changed[index] else 100)).all() for index in range(N_BLOCKS))
    assert sorted(all_blocks.restarts) == [(index, True) for index in range(N_BLOCKS)]
    assert any(changed.values()) == (kind == "fetch")  # where all blocks had been fetched, all changes are lost
    assert np.array_equal(all_blocks.read(), found)
    assert len(all_blocks.restarts) == N_BLOCKS  # once


def test_a_block_continues_again_if_its_heir_dies():
    all_blocks = Blocks()
    all_blocks.dead |= {1, 2}
    all_blocks.add_one()
    heirs = {all_blocks.blocks._places.place(index).server for index in range(N_BLOCKS)}
    assert heirs == {3}  # the first one after ranks 1 and 2
    all_blocks.dead.add(3)
    assert {all_blocks.blocks._places.place(index).server for index in range(N_BLOCKS)} == {0}


def test_a_mailbox_of_a_lost_node_is_reported_as_lost():
    all_blocks = Blocks(continues=False)
    all_blocks.servers.plan["fetch", 1], all_blocks.servers.kills_node = "after", True
    for _ in range(2):  # while the node dies, and afterwards
        with pytest.raises(RankFailed, match="rank 1 died with its node"):
            all_blocks.blocks.acquire(0, None, encoded=False)
    assert len(all_blocks.blocks._free) == 4  # no staging buffer is lost


@pytest.mark.parametrize("dead", [set(), {1}, {1, 2}], ids=["no death", "a rank", "a node"])
def test_a_visit_is_one_fetch_and_one_store_of_each_block_whoever_has_died_before(dead):
    """A loss costs no bytes but those of the visits: neither before it, nor in the first visit after it."""
    all_blocks = Blocks()
    all_blocks.add_one()
    all_blocks.dead |= dead
    all_blocks.servers.n_requests = 0
    all_blocks.add_one()
    assert all_blocks.servers.n_requests == 2 * N_BLOCKS


def test_a_store_that_is_lost_with_its_node_is_not_repeated_at_the_heir():
    """Even if this rank already has the lock of the block there, with the same version."""
    all_blocks = Blocks()
    block = all_blocks.blocks.acquire(0, None, encoded=False)
    all_blocks.dead |= {1, 2}
    heir = all_blocks.blocks._places.place(0)
    array_at(heir.word, 1, np.int64)[0] = ME
    assert all_blocks.blocks._requests.store_again(block, updated=True) is None
