"""Blocks of other nodes: the pipeline of fetches and stores, the order of data and locks, and visits that fail."""

import ctypes
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

from mpitrain.kernels.native import service, wire
from mpitrain.kernels.native.lock_words import OWNER_BITS, OWNER_MASK
from mpitrain.kernels.native.service import protocol


@pytest.fixture
def comm(two_nodes):
    from mpitrain.collectives.mpi import MPICommunicator

    communicator = MPICommunicator(two_nodes)
    yield communicator
    two_nodes.comm.Barrier()
    communicator.free()


@pytest.mark.ranks(2, 3)
def test_a_visit_that_fails_leaves_every_lock_free(comm, largest_shards):
    """This includes the lock of the prefetched block."""
    largest_shards(64)
    center = comm.shared_vector(1000, np.float32)
    n_shards = len(center.parts)
    comm.barrier()

    for fails_at in range(n_shards):
        visited = []

        def fail(part, shard, visited=visited, fails_at=fails_at):
            visited.append(part)
            if len(visited) > fails_at:
                raise ValueError("planned")

        with pytest.raises(ValueError, match="planned"):
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


@pytest.mark.ranks(2, 3)
def test_a_visit_interrupted_between_two_blocks_leaves_the_next_visit_intact(comm, largest_shards):
    """A visit to another block first releases the prefetched one."""
    largest_shards(64)
    center = comm.shared_vector(256 * comm.size, np.float32)
    blocks, n_shards = center._blocks, len(center.parts)
    comm.barrier()
    if comm.rank == 0:
        first, second = center._order[:2]
        blocks.release(blocks.acquire(first, second), updated=False)  # then an interrupt
    center.update(lambda part, c: np.add(c, np.arange(part.start, part.stop), out=c) is None)
    comm.barrier()
    out = np.empty(center.n, np.float32)
    center.read(out)
    assert np.array_equal(out, comm.size * np.arange(center.n))
    comm.barrier()
    assert {blocks.lock_owner(index) for index in range(n_shards)} == {None}


class CountedRequests:
    """The progress thread of this rank, which records its messages: ``fetch`` or ``store``, and the home.

    A message may contain further requests for blocks of that home; ``also`` counts those.
    """

    def __init__(self, progress):
        self._progress, self.calls, self.also = progress, [], 0

    def fetch(self, home, *arguments, **options):
        if options["sent"]:
            self.calls.append(("fetch", home))
            self.also += len(options["also"])
        return self._progress.fetch(home, *arguments, **options)

    def store(self, home, *arguments, also):
        self.calls.append(("store", home))
        self.also += len(also)
        return self._progress.store(home, *arguments, also=also)


@pytest.mark.ranks(2, 3)
def test_a_visit_to_a_short_vector_is_one_fetch_and_one_store(comm, smallest_shards):
    """However many ranks there are, and on the node of its only shard there is none."""
    smallest_shards(1 << 15)
    center = comm.shared_vector(26_122, np.float32)
    remote = center._blocks._remote
    requests = remote._requests.progress = CountedRequests(remote._requests.progress)
    comm.barrier()
    center.update(lambda part, shard: shard.__iadd__(1) is None)
    expected = [] if comm.nodes[comm.rank] == comm.nodes[0] else [("fetch", 0), ("store", 0)]
    assert requests.calls == expected
    comm.barrier()


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("window", [0, 1 << 20], ids=["two blocks", "all blocks"])
def test_a_visit_sends_one_message_to_each_home_and_one_with_each_block(comm, largest_shards, window):
    """The first one asks for as many blocks as the window admits, and each block that returns for the next ones."""
    largest_shards(64)
    center = comm.shared_vector(64 * 5 * comm.size, np.float32)
    remote = center._blocks._remote
    requests = remote._requests.progress = CountedRequests(remote._requests.progress)
    remote.window.record_answer = remote.window.record_visit = lambda *_: None
    remote.window.n_bytes = window
    comm.barrier()
    center.update(lambda part, shard: shard.__iadd__(1) is None)
    elsewhere = [home for home in center.homes if comm.nodes[home] != comm.nodes[comm.rank]]
    fetches = sorted(home for kind, home in requests.calls if kind == "fetch")
    assert sorted(home for kind, home in requests.calls if kind == "store") == elsewhere
    if window or len(set(elsewhere)) == 1:
        assert fetches == sorted(set(elsewhere))
    assert set(fetches) == set(elsewhere)  # where one home ends before another, the other one gets its place at once
    assert len(fetches) + requests.also == len(elsewhere)
    comm.barrier()
    out = np.zeros(center.n, np.float32)
    center.read(out)
    assert np.all(out == comm.size)


@pytest.mark.ranks(2, 3)
def test_the_requests_of_a_visit_do_not_wait_for_each_other(comm, largest_shards):
    """All blocks of other nodes are requested before the first one is stored, as far as the window allows."""
    largest_shards(64)
    center = comm.shared_vector(64 * 3 * comm.size, np.float32)
    remote = center._blocks._remote
    requests = remote._requests.progress = CountedRequests(remote._requests.progress)
    comm.barrier()
    center.update(lambda part, shard: shard.__iadd__(1) is None)
    kinds = [kind for kind, _ in requests.calls]
    n_homes, n_remote = kinds.count("fetch"), sum(block is None for block in center._blocks._memory.in_place)
    assert kinds == ["fetch"] * n_homes + ["store"] * n_remote
    assert n_homes + requests.also == n_remote
    comm.barrier()


# ---- the pipeline, against the least favourable transfers ------------------------------------------------------------


def array_at(address, n, dtype=np.float32):
    kind = {np.float32: ctypes.c_float, np.float64: ctypes.c_double, np.int64: ctypes.c_int64}[dtype]
    return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(kind)), (n,))


class LateStores:
    """A progress thread that fetches at the earliest moment allowed, and stores at the latest.

    A fetch writes to its staging buffer at once, and a store reads from its own only when it is awaited.
    """

    def fetch(self, home, addresses, arrays, owner, encoded, retakes, sent, also):
        assert not retakes
        word = array_at(owner[0], 1, np.int64)
        assert not word[0] & OWNER_MASK
        found, word[0] = int(word[0]), word[0] | owner[1]
        data, tags = arrays
        if encoded == wire.PLAIN:
            data[:] = array_at(addresses[0], data.size)
        else:
            wire.FORMATS["bfloat16"].encode(array_at(*encoded[1:]), data)
        tags[:] = array_at(addresses[1], tags.size, np.float64)
        return SimpleNamespace(wait=lambda: found, wait_for_lock=lambda: 0.0, granted=lambda: True, was_taken=False)

    def store(self, home, addresses, arrays, swap, encoded, also):
        data, tags = arrays

        def wait():
            if encoded != wire.PLAIN:
                wire.FORMATS["bfloat16"].add(data, array_at(*encoded[1:]))
            elif data.size:
                array_at(addresses[0], data.size)[:] = data
            if tags.size:
                array_at(addresses[1], tags.size, np.float64)[:] = tags
            word = array_at(swap[0], 1, np.int64)
            assert word[0] == swap[1]
            word[0] = swap[2]

        return SimpleNamespace(wait=wait)


N_BLOCKS, LENGTH, N_ROUNDS = 11, 20, 3


def book_of(array):
    return SimpleNamespace(address=lambda home, server: array.ctypes.data)


def rounds_of_visits(encoding):
    """Add 1 to all blocks several times, in a pipeline; return their elements (blocks, length) and lock words."""
    from mpitrain.collectives.rma.blocks import N_TAGS
    from mpitrain.collectives.rma.remote_blocks import N_STAGING_BUFFERS, RemoteBlocks
    from mpitrain.collectives.world.statistics import Statistics

    elements = np.repeat(np.arange(N_BLOCKS, dtype=np.float32) * 16, LENGTH)
    tags, words = np.zeros(N_BLOCKS * N_TAGS), np.zeros(N_BLOCKS, np.int64)
    indices = list(range(N_BLOCKS))
    memory = SimpleNamespace(
        world=SimpleNamespace(
            rank=0, size=1, dead=frozenset(), survives_failures=False, allgather=lambda value: [value]
        ),
        homes=[0] * N_BLOCKS,
        lengths=[LENGTH] * N_BLOCKS,
        starts=[LENGTH * index for index in indices],
        slots=indices,
        data=SimpleNamespace(local=elements, dtype=elements.dtype, book=book_of(elements)),
        tags=SimpleNamespace(local=tags, book=book_of(tags)),
        staging_buffers=lambda n: [np.zeros(LENGTH, np.float32) for _ in range(n)],
        longest_remote=LENGTH,
    )
    locks = SimpleNamespace(
        mine=1,
        address=lambda home, slot, server: words.ctypes.data + 8 * slot,
        release_swap=lambda version, updated: (version << OWNER_BITS | 1, (version + updated) << OWNER_BITS),
    )
    options = {"n_staging_buffers": N_STAGING_BUFFERS, "encoding": encoding}
    blocks = RemoteBlocks(memory, locks, LateStores(), Statistics(), **options)
    blocks.window.n_bytes = 0  # two blocks under way
    for _ in range(N_ROUNDS):
        for locked in blocks.visit(indices, updated=True, encoded=True):
            with locked as block:
                block.data += 1
                block.tags[0] += block.index
        blocks.wait()
    assert np.array_equal(tags[::N_TAGS], N_ROUNDS * np.arange(N_BLOCKS))
    return elements.reshape(N_BLOCKS, LENGTH), words


@pytest.mark.ranks(1)
@pytest.mark.parametrize("encoding", [None, wire.FORMATS["bfloat16"]], ids=["float32", "bfloat16"])
def test_a_pipeline_longer_than_its_staging_buffers_mixes_no_blocks(encoding):
    elements, words = rounds_of_visits(encoding)
    assert np.array_equal(elements, np.repeat(np.arange(N_BLOCKS)[:, None] * 16 + N_ROUNDS, LENGTH, axis=1))
    assert np.array_equal(words, np.full(N_BLOCKS, N_ROUNDS << OWNER_BITS))


@pytest.mark.ranks(1)
def test_late_stores_show_a_staging_buffer_that_is_reused_too_early(monkeypatch):
    """The previous test can fail: it does if a buffer is free before its store is complete."""
    from mpitrain.collectives.rma.remote_blocks import RemoteBlocks

    release = RemoteBlocks.release

    def release_and_free(self, block, **options):
        release(self, block, **options)
        self._free.append(block.buffer)

    monkeypatch.setattr(RemoteBlocks, "release", release_and_free)
    with pytest.raises(AssertionError):
        test_a_pipeline_longer_than_its_staging_buffers_mixes_no_blocks(None)


class DelayedStore(threading.Thread):
    """A store that another thread starts when it is awaited, or some time later."""

    def __init__(self, start: Callable[[], object], seconds: float):
        super().__init__()
        self._start_store, self._seconds, self._is_awaited = start, seconds, threading.Event()
        self.start()

    def run(self):
        self._is_awaited.wait(self._seconds)
        self._transfer = self._start_store()

    def wait(self):
        self._is_awaited.set()
        self.join()
        return self._transfer.wait()


class DelayedStores:
    """The progress thread of this rank, with delayed stores."""

    def __init__(self, progress, seed):
        self._progress, self._rng = progress, np.random.default_rng(seed)
        self.fetch, self.n_stores = progress.fetch, 0

    def store(self, *arguments, also):  # these fetches are sent when they are awaited
        self.n_stores += 1
        return DelayedStore(lambda: self._progress.store(*arguments), self._rng.uniform(0, 0.1))


@pytest.mark.ranks(2, 3)
def test_delayed_stores_neither_mix_blocks_nor_hang(comm, largest_shards):
    """All ranks visit more shards than they have staging buffers, while their stores are late at random.

    Half of them have two blocks under way, the others many, which arrive in any order.
    """
    from mpitrain.collectives.rma.remote_blocks import N_STAGING_BUFFERS

    largest_shards(64)
    center, n_rounds = comm.shared_vector(64 * 2 * N_STAGING_BUFFERS * comm.size, np.float32), 3
    remote = center._blocks._remote
    remote.window.record_visit = lambda n_bytes, seconds: None
    remote.window.n_bytes *= comm.rank % 2
    delayed = remote._requests.progress = DelayedStores(remote._requests.progress, comm.rank)
    if comm.rank == 0:
        center.write(np.repeat([part.start for part in center.parts], 64))
    comm.barrier()

    def add_one(part, shard):
        assert np.all(shard == shard[0])
        assert 0 <= shard[0] - part.start < n_rounds * comm.size
        shard += 1

    delayed.n_stores = 0
    for _ in range(n_rounds):
        center.update(add_one)
    assert delayed.n_stores >= n_rounds * 2 * N_STAGING_BUFFERS
    comm.barrier()
    out = np.zeros(center.n, np.float32)
    center.read(out)
    assert np.array_equal(out, np.repeat([part.start + n_rounds * comm.size for part in center.parts], 64))


# ---- the order of data and locks -------------------------------------------------------------------------------------


@pytest.mark.ranks(1, 2)
def test_the_server_releases_a_lock_only_once_the_block_is_stored():
    """Also if the pieces of the block and its tags arrive one by one, each some time after the request."""
    from mpi4py import MPI

    from mpitrain.collectives.world.progress import ProgressThread
    from mpitrain.collectives.world.transfers import pieces

    thread, tag = ProgressThread(MPI.COMM_SELF), 7
    comm, n = thread._comm, protocol.PIECE_BYTES // 4 + 100
    block, tags = np.zeros(n, np.float32), np.zeros(4)
    held, after = 5 << OWNER_BITS | 1, 6 << OWNER_BITS
    word, header = np.array([held]), np.zeros(protocol.HEADER_WORDS, np.int64)
    places = block.ctypes.data, block.nbytes, tags.ctypes.data, tags.nbytes, word.ctypes.data
    request = np.array([protocol.STORE, 0, *places, held, after, tag, *wire.PLAIN], np.int64)
    new_block, new_tags = np.arange(n, dtype=np.float32), np.arange(4.0)
    answer = comm.Irecv([header.view(np.uint8), MPI.BYTE], 0, tag)
    comm.Send([request.view(np.uint8), MPI.BYTE], 0, protocol.TAG_REQUEST)
    for piece in pieces(new_block, new_tags):
        time.sleep(0.05)
        assert word[0] == held
        comm.Send(piece, 0, protocol.STORED + tag)
    answer.Wait()
    assert (header[0], word[0]) == (held, after)
    assert np.array_equal(block, new_block)
    assert np.array_equal(tags, new_tags)
    thread.stop()


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("n", [1, protocol.MOST_REQUESTS - 1])
def test_a_message_with_several_requests_gets_the_answer_of_each(n):
    """A block returns, and n others are requested in the same message; one of them is locked for some time."""
    from mpi4py import MPI

    from mpitrain.collectives.world.progress import ProgressThread

    thread = ProgressThread(MPI.COMM_SELF)
    blocks, tags = np.arange(100.0 * (n + 1)).reshape(n + 1, 100), np.arange(4.0 * (n + 1)).reshape(n + 1, 4)
    held, taken, mine = 5 << OWNER_BITS | 1, 7 << OWNER_BITS | 1, 1
    words = np.array([held] + [k << OWNER_BITS for k in range(1, n)] + [taken])
    address = [(blocks[k].ctypes.data, tags[k].ctypes.data) for k in range(n + 1)]
    word = [words.ctypes.data + 8 * k for k in range(n + 1)]
    found = [(np.zeros(100), np.zeros(4)) for _ in range(n)]
    fetches = [thread.fetch(0, address[k], found[k - 1], (word[k], mine), sent=False) for k in range(1, n + 1)]
    returned = np.full(100, -1.0), np.full(4, -1.0)
    store = thread.store(0, address[0], returned, (word[0], held, 6 << OWNER_BITS), also=fetches)
    assert store.wait() == held
    for k in range(1, n):
        assert fetches[k - 1].wait() == k << OWNER_BITS
    assert not fetches[-1].granted()
    words[n] = 8 << OWNER_BITS
    assert fetches[-1].wait() == 8 << OWNER_BITS
    assert np.all(blocks[0] == -1)
    assert np.all(tags[0] == -1)
    for k, (block, its_tags) in enumerate(found, start=1):
        assert np.array_equal(block, blocks[k])
        assert np.array_equal(its_tags, tags[k])
    thread.stop()


@pytest.mark.ranks(1, 2)
def test_a_request_that_no_message_contains_is_sent_when_it_is_awaited():
    from mpi4py import MPI

    from mpitrain.collectives.world.progress import ProgressThread
    from mpitrain.collectives.world.transfers import first_granted

    thread = ProgressThread(MPI.COMM_SELF)
    blocks, tags, words = np.arange(30.0).reshape(3, 10), np.zeros((3, 4)), np.zeros(3, np.int64)
    found = [(np.zeros(10), np.zeros(4)) for _ in range(3)]
    fetches = [
        thread.fetch(
            0, (blocks[k].ctypes.data, tags[k].ctypes.data), found[k], (words.ctypes.data + 8 * k, 1), sent=False
        )
        for k in range(3)
    ]
    fetches.pop(first_granted(fetches)).wait()
    for fetch in fetches:
        fetch.wait()
    assert np.array_equal([block for block, _ in found], blocks)
    assert np.array_equal(words, [1, 1, 1])
    thread.stop()


def test_a_message_has_room_for_a_block_and_the_most_requests_of_a_home():
    from mpitrain.collectives.world.progress import MOST_AWAITED
    from mpitrain.collectives.world.transfers import message_of

    request = np.zeros(protocol.REQUEST_WORDS, np.int64)
    assert message_of(*[request] * (1 + MOST_AWAITED)).size == (1 + MOST_AWAITED) * protocol.REQUEST_WORDS
    with pytest.raises(ValueError, match="at most 17 requests, not 18"):
        message_of(*[request] * 18)


@pytest.mark.ranks(2, 3)
def test_a_one_sided_block_is_stored_before_its_lock_is_released(windows, monkeypatch):
    from mpitrain.collectives.rma.mpi_blocks import MPIBlocks
    from mpitrain.collectives.world.statistics import Statistics

    blocks, events = MPIBlocks(windows, [0], [100], np.float32, Statistics()), []
    parts = {"data": blocks._memory.data, "tags": blocks._memory.tags, "lock": blocks._locks._words}
    for part, name in (("data", "put"), ("data", "flush"), ("tags", "put"), ("tags", "flush"), ("lock", "swap")):
        original = getattr(parts[part], name)
        monkeypatch.setattr(
            parts[part], name, lambda *args, f=original, event=(part, name): (events.append(event), f(*args))[1]
        )
    block = blocks.acquire(0)
    events.clear()
    block.data += 1
    blocks.release(block, updated=True)
    if windows.nodes[windows.rank] != windows.nodes[0]:
        assert events[-1] == ("lock", "swap")
        for part in ("data", "tags"):
            assert events.index((part, "put")) < events.index((part, "flush"))
    monkeypatch.undo()
    windows.barrier()
    block = blocks.acquire(0)
    assert np.all(block.data == windows.size)
    blocks.release(block, updated=False)
    windows.barrier()
    blocks.free()
