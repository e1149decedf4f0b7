"""Blocks of other nodes, which the progress threads of their homes lock, send, receive and unlock.

A visit takes two round trips: the home's progress thread (``world.progress``) acquires the lock and sends the block,
and later stores the block and releases the lock. A visit of several blocks has as many of them under way as the link
needs to be full (``FlightWindow``), whichever homes they have, and takes them in the order in which they arrive::

    block 0   fetch | change | store
    block 1   fetch          | change | store
    block 2           fetch           | change | store

Ranks cannot wait for each other in a circle: a block is worked on as soon as it is here, whichever other locks this
rank still waits for, and a store waits for no lock.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType

import numpy as np

from mpitrain.collectives.rma.block_memory import BlockMemory
from mpitrain.collectives.rma.blocks import N_TAGS, Block
from mpitrain.collectives.rma.flight_window import FlightWindow
from mpitrain.collectives.rma.remote_locks import RemoteLocks
from mpitrain.collectives.rma.wire_buffers import WireBuffers
from mpitrain.collectives.world.progress import ProgressThread
from mpitrain.collectives.world.statistics import Statistics
from mpitrain.collectives.world.transfers import Transfer, first_granted
from mpitrain.kernels.gpu import address_of
from mpitrain.kernels.native.lock_words import OWNER_BITS
from mpitrain.kernels.native.wire import PLAIN, Encoded, Format

N_STAGING_BUFFERS = 4
"""One for a block that is fetched, one for a block that is worked on, and two for blocks that are stored. A visit with
more blocks under way allocates more."""

NOTHING = np.zeros(0, np.uint8)


@dataclass(slots=True)
class RemoteBlock(Block):
    """A block in a staging buffer.

    Attributes:
        buffer: The number of the staging buffer.
        encoded: The encoded block as it was fetched, and a buffer for its encoded change; None without encoding.
    """

    buffer: int = 0
    encoded: tuple[np.ndarray, np.ndarray] | None = None


@dataclass(slots=True, eq=False)
class Fetch:
    """The request that locks and fetches a block.

    Attributes:
        block: The block, in a staging buffer.
        transfer: The transfer that carries the request and its answer.
        n_bytes: The number of bytes to receive.
        began: The time of the request, in seconds.
        granted: Whether this rank has the lock.
    """

    block: RemoteBlock
    transfer: Transfer
    n_bytes: int
    began: float
    granted: bool = False


class RemoteBlocks:
    """The blocks of other nodes. Collective to create.

    Args:
        memory: The memory of all blocks.
        locks: The locks of the blocks.
        progress: The progress thread of this rank.
        statistics: The counters of bytes and waiting.
        n_staging_buffers: The number of buffers to allocate at first.
        encoding: The wire format of encoded visits; None without one.
        before_wait: Called before this worker waits for a lock.

    Attributes:
        residuals: The rounding error of each block's last encoded change, (length,), which the next change includes.
        window: The number of bytes under way that fills the link.
    """

    def __init__(
        self,
        memory: BlockMemory,
        locks: RemoteLocks,
        progress: ProgressThread,
        statistics: Statistics,
        *,
        n_staging_buffers: int,
        encoding: Format | None = None,
        before_wait: Callable[[], object] | None = None,
    ) -> None:
        self._memory, self._locks, self._progress, self._statistics = memory, locks, progress, statistics
        self._before_wait = before_wait
        self._wire = None if encoding is None else WireBuffers(memory, encoding, statistics)
        self.residuals: dict[int, np.ndarray] = {} if self._wire is None else self._wire.residuals
        self.window = FlightWindow()
        local = memory.data.local
        self._itemsize = local.dtype.itemsize
        bases = address_of(local), address_of(memory.tags.local)
        self._bases: list[tuple[int, int]] = memory.world.allgather(bases)
        self.staging: list[np.ndarray] = []
        self._staged_tags: list[np.ndarray] = []
        self._encoded_staging: list[tuple[np.ndarray, np.ndarray]] = []
        self._free: deque[int] = deque()
        self._add_staging_buffers(n_staging_buffers)
        self._fetches: list[Fetch] = []
        self._stores: deque[tuple[Transfer, int]] = deque()

    def _add_staging_buffers(self, n: int) -> None:
        first = len(self.staging)
        self.staging += self._memory.staging_buffers(n)
        self._staged_tags += [np.zeros(N_TAGS) for _ in range(n)]
        if self._wire is not None:
            self._encoded_staging += [self._wire.staging() for _ in range(n)]
        self._free.extend(range(first, first + n))

    def acquire(self, index: int, prefetch: int | None, encoded: bool) -> Block:
        """Lock and fetch a block. When the lock is granted, start to prefetch another block. Local."""
        self.prefetch(index, encoded)
        fetch = self._granted()
        if prefetch is not None:
            self._start(prefetch, encoded)
        return self._arrived(fetch)

    def prefetch(self, index: int, encoded: bool) -> None:
        """Start to lock and fetch the block that is acquired next. Local."""
        self._abandon_all_but(index)
        if not self._fetches:
            self._start(index, encoded)

    def visit(self, order: Sequence[int], *, updated: bool, encoded: bool) -> Iterator[AbstractContextManager[Block]]:
        """Yield a context manager for each block, in the order of their arrival. Local.

        After the visit, blocks may still be under way to their homes; ``wait`` waits for them.
        """
        self.abandon()
        began, awaited = time.perf_counter(), deque(order)
        self._start_more(awaited, encoded)
        for _ in order:
            yield Arrival(self, awaited, updated=updated, encoded=encoded)
        n_bytes = sum(self._memory.lengths[index] for index in order) * self._itemsize
        self.window.record_visit(n_bytes, time.perf_counter() - began)

    def next_arrival(self, awaited: deque[int], encoded: bool) -> Block:
        """Wait for the next block to arrive, and request further blocks of the visit. Local."""
        self._start_more(awaited, encoded)
        fetch = self._granted()  # its data follow: the link has room for another block
        self._start_more(awaited, encoded)
        return self._arrived(fetch)

    def _start_more(self, awaited: deque[int], encoded: bool) -> None:
        """Start to fetch blocks while the window is open."""
        requested = [fetch.n_bytes for fetch in self._fetches if not fetch.granted]
        while awaited:
            n_bytes = self._memory.lengths[awaited[0]] * self._itemsize
            if not self.window.admits(requested, n_bytes):
                break
            requested.append(n_bytes)
            # A block takes a round trip to come and another one to go.
            if not self._free and len(self.staging) < 2 * (2 + self.window.n_bytes // n_bytes):
                self._add_staging_buffers(1)
            self._start(awaited.popleft(), encoded)

    def release(self, block: Block, *, updated: bool) -> None:
        """Start to store an updated block and to unlock it; ``wait`` waits for the end. Local."""
        assert isinstance(block, RemoteBlock)
        index, arrays = block.index, (NOTHING, NOTHING)
        addresses, description = self._addresses(index, encoded=updated and block.encoded is not None)
        if updated and self._wire is not None and block.encoded is not None:
            arrays = self._wire.encode_change(index, block.data, *block.encoded), block.tags
        elif updated:
            arrays = block.data, block.tags
        self._statistics.wire_bytes += arrays[0].nbytes
        home = self._memory.homes[index]
        swap = self._locks.release_swap(home, self._memory.slots[index], block.version, updated=updated)
        self._stores.append((self._progress.store(home, addresses, arrays, swap, description), block.buffer))

    def wait(self) -> None:
        """Wait until the released blocks are stored and unlocked. Local."""
        while self._stores:
            self._wait_for_store()

    def abandon(self) -> None:
        """Release the blocks that an interrupted visit has requested. Local."""
        self._abandon_all_but(None)

    def _abandon_all_but(self, index: int | None) -> None:
        """Release the blocks under way, except for one, as they are granted: others may wait for them. Local."""
        unwanted = [fetch for fetch in self._fetches if fetch.block.index != index]
        self._fetches = [fetch for fetch in self._fetches if fetch.block.index == index]
        while unwanted:
            fetch = unwanted.pop(first_granted([fetch.transfer for fetch in unwanted]))
            fetch.block.version = fetch.transfer.wait() >> OWNER_BITS
            self.release(fetch.block, updated=False)

    def _wait_for_store(self) -> None:
        """Wait for the oldest store. It still reads from its staging buffer."""
        transfer, buffer = self._stores.popleft()
        transfer.wait()
        self._free.append(buffer)

    def _start(self, index: int, encoded: bool) -> None:
        """Start to lock and fetch a block."""
        block = self._staging_block(index)
        data = block.data
        if encoded and self._wire is not None:
            fetched, change = self._encoded_staging[block.buffer]
            data = self._wire.fetched(fetched, block.data.size)
            block.encoded = data, change
        addresses, description = self._addresses(index, encoded=block.encoded is not None)
        self._statistics.wire_bytes += data.nbytes
        home = self._memory.homes[index]
        owner = self._locks.acquire_swap(home, self._memory.slots[index])
        began = time.perf_counter()
        transfer = self._progress.fetch(home, addresses, (data, block.tags), owner, description)
        self._fetches.append(Fetch(block, transfer, block.data.nbytes, began))

    def _granted(self) -> Fetch:
        """Wait until this rank has the lock of a block under way, and return the fetch."""
        if self._before_wait is not None:
            self._before_wait()
        fetch = self._fetches[first_granted([fetch.transfer for fetch in self._fetches])]
        waited = fetch.transfer.wait_for_lock()
        self._statistics.add_lock_wait(waited)
        fetch.granted = True
        if not fetch.transfer.was_taken:
            self.window.record_answer(time.perf_counter() - fetch.began, fetch.n_bytes)
        return fetch

    def _arrived(self, fetch: Fetch) -> Block:
        """Wait until the block is here."""
        block = fetch.block
        block.version = fetch.transfer.wait() >> OWNER_BITS
        self._fetches.remove(fetch)
        if block.encoded is not None and self._wire is not None:
            self._wire.decode(block.encoded[0], block.data)
        return block

    def _staging_block(self, index: int) -> RemoteBlock:
        while not self._free:
            self._wait_for_store()
        buffer = self._free.popleft()
        data = self.staging[buffer][: self._memory.lengths[index]]
        return RemoteBlock(index, data, self._staged_tags[buffer], version=0, buffer=buffer)

    def _addresses(self, index: int, *, encoded: bool) -> tuple[tuple[int, int], Encoded]:
        """Return the addresses of a block, or of its encoding, and of its tags at its home; and the encoding."""
        memory = self._memory
        data, tags = self._bases[memory.homes[index]]
        data += memory.starts[index] * self._itemsize
        tags += memory.slots[index] * N_TAGS * 8
        if not encoded or self._wire is None:
            return (data, tags), PLAIN
        return (self._wire.address(index), tags), self._wire.encoded(index, data)


class Arrival:
    """A context manager that waits for a block of a visit on entry and releases it on exit."""

    __slots__ = ("_awaited", "_block", "_blocks", "_encoded", "_updated")

    def __init__(self, blocks: RemoteBlocks, awaited: deque[int], *, updated: bool, encoded: bool) -> None:
        self._blocks, self._awaited = blocks, awaited
        self._updated, self._encoded = updated, encoded

    def __enter__(self) -> Block:
        self._block = block = self._blocks.next_arrival(self._awaited, self._encoded)
        return block

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._blocks.release(self._block, updated=self._updated)
        finally:
            if kind is not None:
                self._blocks.abandon()
                self._blocks.wait()
