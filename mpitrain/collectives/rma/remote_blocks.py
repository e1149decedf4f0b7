"""Blocks of other nodes, which the progress threads of their homes lock, send, receive and unlock.

A visit takes two round trips: the home's progress thread (``world.progress``) acquires the lock and sends the block,
and later stores the block and releases the lock. A visit of several blocks has as many of them under way as the link
needs to be full (``FlightWindow``), whichever homes they have, and takes them in the order in which they arrive. The
first message to a home requests several blocks, and each block that returns carries the requests for further ones::

    block 0   fetch | change | store, fetch block 2
    block 1   fetch          | change | store, fetch block 3
    block 2                           fetch | change | store

Ranks cannot wait for each other in a circle: a block is worked on as soon as it is here, whichever other locks this
rank still waits for, and a store waits for no lock.

If the rank that serves a block dies, its requests fail, and are repeated at the block's next place (``rma.heirs``). A
rank of the same node has the same memory and the same lock word, which says how far the dead rank had come. An heir of
a lost node has other values, and nothing that was on its way to the lost node is repeated there.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from types import TracebackType

import numpy as np

from mpitrain.collectives.rma.awaited_blocks import AwaitedBlocks
from mpitrain.collectives.rma.block_memory import BlockMemory
from mpitrain.collectives.rma.block_requests import BlockRequests, Fetch, RemoteBlock, Store
from mpitrain.collectives.rma.blocks import N_TAGS, Block
from mpitrain.collectives.rma.flight_window import FlightWindow
from mpitrain.collectives.rma.heirs import Place, Places
from mpitrain.collectives.rma.remote_locks import RemoteLocks
from mpitrain.collectives.rma.wire_buffers import WireBuffers
from mpitrain.collectives.world.service import Service
from mpitrain.collectives.world.statistics import Statistics
from mpitrain.collectives.world.transfers import ServerLost, Transfer, first_granted
from mpitrain.errors import RankFailed
from mpitrain.kernels.native.lock_words import OWNER_BITS
from mpitrain.kernels.native.wire import Format

N_STAGING_BUFFERS = 4
"""One for a block that is fetched, one for a block that is worked on, and two for blocks that are stored. A visit with
more blocks under way allocates more."""


class RemoteBlocks:
    """The blocks of other nodes. Collective to create.

    Args:
        memory: The memory of all blocks.
        locks: The locks of the blocks.
        progress: The requests of this rank to other progress threads.
        statistics: The counters of bytes and waiting.
        n_staging_buffers: The number of buffers to allocate at first.
        encoding: The wire format of encoded visits; None without one.
        continues: Whether blocks continue at an heir if their node is lost.
        before_wait: Called before this worker waits for a lock.

    Attributes:
        on_restart: Called with a locked block at this worker's first visit to an heir, and whether the block has no
            values yet, which the call must then set.
        residuals: The rounding error of each block's last encoded change, (length,), which the next change includes.
        window: The number of bytes under way that fills the link.
    """

    def __init__(
        self,
        memory: BlockMemory,
        locks: RemoteLocks,
        progress: Service,
        statistics: Statistics,
        *,
        n_staging_buffers: int,
        encoding: Format | None = None,
        continues: bool = False,
        before_wait: Callable[[], object] | None = None,
    ) -> None:
        self._memory, self._statistics, self._before_wait = memory, statistics, before_wait
        self._wire = None if encoding is None else WireBuffers(memory, encoding, statistics)
        self.residuals: dict[int, np.ndarray] = {} if self._wire is None else self._wire.residuals
        self._places = Places(memory, locks, continues=continues)
        self._requests = BlockRequests(memory, locks, progress, statistics, self._places, self._wire)
        self.window = FlightWindow()
        self.on_restart: Callable[[Block, bool], object] | None = None
        self._heir_of: dict[int, int] = {}  # the heirs at which this worker has visited blocks
        self._itemsize = memory.data.local.dtype.itemsize
        self.staging: list[np.ndarray] = []
        self._staged_tags: list[np.ndarray] = []
        self._encoded_staging: list[tuple[np.ndarray, np.ndarray]] = []
        self._free: deque[int] = deque()
        self._add_staging_buffers(n_staging_buffers)
        self._fetches: list[Fetch] = []
        self._stores: deque[Store] = deque()

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
        began, awaited = time.perf_counter(), AwaitedBlocks(order, self._memory.homes)
        self._start_more(awaited, encoded)
        for _ in order:
            yield Arrival(self, awaited, updated=updated, encoded=encoded)
        n_bytes = sum(self._memory.lengths[index] for index in order) * self._itemsize
        self.window.record_visit(n_bytes, time.perf_counter() - began)

    def next_arrival(self, awaited: AwaitedBlocks, encoded: bool) -> Block:
        """Wait for the next block to arrive, and request further blocks of the visit. Local."""
        self._start_more(awaited, encoded)
        return self._arrived(self._granted())

    def _start_more(self, awaited: AwaitedBlocks, encoded: bool) -> None:
        """Start to fetch blocks while the window is open, with one message to each server."""
        started: dict[int, list[Transfer]] = {}
        for index, server, is_last in self._admitted(awaited):
            also = started.setdefault(server, [])
            also.append(self._start(index, encoded, sent=is_last, also=also if is_last else ()).transfer)

    def _start_beside(self, block: RemoteBlock, awaited: AwaitedBlocks, encoded: bool) -> list[Transfer]:
        """Return fetches of further blocks from the server of a block, to be sent with the store of this block."""
        with suppress(RankFailed):  # raised again by the next request
            return [
                self._start(index, encoded, sent=False).transfer
                for index, _, _ in self._admitted(awaited, self._memory.homes[block.index], block.place.server)
            ]
        return []

    def _admitted(
        self, awaited: AwaitedBlocks, home: int | None = None, server: int | None = None
    ) -> list[tuple[int, int, bool]]:
        """Select blocks from ``awaited`` while the window is open, and provide staging buffers for them.

        Args:
            awaited: The blocks that are not requested yet.
            home, server: The only home to select blocks of, and the server from which they must come.

        Returns:
            The blocks, their servers, and whether a block is the last one of its server.
        """
        requested = [(fetch.block.place.server, fetch.n_bytes) for fetch in self._fetches if not fetch.granted]
        selected: list[tuple[int, int]] = []
        while (index := awaited.first(home)) is not None:
            there, n_bytes = self._places.place(index).server, self._memory.lengths[index] * self._itemsize
            if not self.window.admits(requested, there, n_bytes):
                break
            # A block takes a round trip to come and another one to go.
            if len(self._free) <= len(selected) and len(self.staging) < 2 * (2 + self.window.n_bytes // n_bytes):
                self._add_staging_buffers(1)
            if home is not None and (there != server or len(self._free) + len(self._stores) <= len(selected)):
                break
            requested.append((there, n_bytes))
            awaited.remove(index)
            selected.append((index, there))
        last = {there: index for index, there in selected}
        return [(index, there, last[there] == index) for index, there in selected]

    def release(
        self, block: Block, *, updated: bool, awaited: AwaitedBlocks | None = None, encoded: bool = False
    ) -> None:
        """Start to store an updated block and to unlock it; ``wait`` waits for the end. Local.

        Args:
            block: The block.
            updated: Whether it was changed.
            awaited: Blocks of which some are requested in the same message.
            encoded: Whether these may be encoded.
        """
        assert isinstance(block, RemoteBlock)
        updated = updated or block.restarted
        also = [] if awaited is None else self._start_beside(block, awaited, encoded)
        self._stores.append(Store(block, self._requests.store(block, updated=updated, also=also), updated))

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
            with suppress(RankFailed):  # its lock is lost with its node
                self._complete(fetch)
                self.release(fetch.block, updated=False)
        if self._memory.world.dead:
            self.wait()  # a lost release is repeated before the lock is requested again

    def _wait_for_store(self) -> None:
        """Wait for the oldest store. It still reads from its staging buffer."""
        store = self._stores.popleft()
        transfer: Transfer | None = store.transfer
        while transfer is not None:
            try:
                transfer.wait()
                break
            except ServerLost:
                transfer = self._requests.store_again(store.block, updated=store.updated)
        self._free.append(store.block.buffer)

    def _start(self, index: int, encoded: bool, *, sent: bool = True, also: Sequence[Transfer] = ()) -> Fetch:
        """Start to lock and fetch a block."""
        place = self._places.place(index)
        block = self._staging_block(index, place)
        began = time.perf_counter()
        transfer = self._requests.fetch(block, place, encoded, sent=sent, also=also)
        fetch = Fetch(block, transfer, block.data.nbytes, began)
        self._fetches.append(fetch)
        return fetch

    def _restart(self, fetch: Fetch) -> None:
        """Repeat a fetch whose server has died, at the next place of the block.

        Raises:
            RankFailed: The block is lost.
        """
        self.wait()  # for stores of the same block, which may have to be repeated, too
        try:
            place = self._places.place(fetch.block.index)
        except RankFailed:
            if fetch in self._fetches:
                self._fetches.remove(fetch)
            self._free.append(fetch.block.buffer)
            raise
        fetch.transfer, fetch.granted = self._requests.fetch(fetch.block, place, encoded=False, retakes=True), False

    def _complete(self, fetch: Fetch) -> None:
        """Wait until the block of a fetch is here, and set its version."""
        while True:
            try:
                fetch.block.version = fetch.transfer.wait() >> OWNER_BITS
            except ServerLost:
                self._restart(fetch)
            else:
                return

    def _granted(self) -> Fetch:
        """Wait until this rank has the lock of a block under way, and return the fetch."""
        if self._before_wait is not None:
            self._before_wait()
        while True:
            fetch = self._fetches[first_granted([fetch.transfer for fetch in self._fetches])]
            try:
                waited = fetch.transfer.wait_for_lock()
                break
            except ServerLost:
                self._restart(fetch)
        self._statistics.add_lock_wait(waited)
        fetch.granted = True
        if not fetch.transfer.was_taken:
            self.window.record_answer(time.perf_counter() - fetch.began, fetch.n_bytes)
        return fetch

    def _arrived(self, fetch: Fetch) -> Block:
        """Wait until the block is here."""
        block = fetch.block
        self._complete(fetch)
        self._fetches.remove(fetch)
        if block.place.is_heir:
            self._meet_heir(block)
        if block.encoded is not None and self._wire is not None:
            self._wire.decode(block.encoded[0], block.data)
        return block

    def _meet_heir(self, block: RemoteBlock) -> None:
        """Tell the owner of the blocks if a block continues at an heir that this worker has not visited before."""
        is_empty, block.restarted = block.version == 0, block.version == 0
        if is_empty or self._heir_of.get(block.index) != block.place.server:
            self._heir_of[block.index] = block.place.server
            self.residuals.pop(block.index, None)
            if self.on_restart is not None:
                self.on_restart(block, is_empty)

    def _staging_block(self, index: int, place: Place) -> RemoteBlock:
        while not self._free:
            self._wait_for_store()
        buffer = self._free.popleft()
        data = self.staging[buffer][: self._memory.lengths[index]]
        encoding = None if self._wire is None else self._encoded_staging[buffer]
        return RemoteBlock(index, data, self._staged_tags[buffer], 0, buffer, place, encoding)


class Arrival:
    """A context manager that waits for a block of a visit on entry and releases it on exit."""

    __slots__ = ("_awaited", "_block", "_blocks", "_encoded", "_updated")

    def __init__(self, blocks: RemoteBlocks, awaited: AwaitedBlocks, *, updated: bool, encoded: bool) -> None:
        self._blocks, self._awaited = blocks, awaited
        self._updated, self._encoded = updated, encoded

    def __enter__(self) -> Block:
        self._block = block = self._blocks.next_arrival(self._awaited, self._encoded)
        return block

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            awaited = self._awaited if kind is None else None
            self._blocks.release(self._block, updated=self._updated, awaited=awaited, encoded=self._encoded)
        finally:
            if kind is not None:
                self._blocks.abandon()
                self._blocks.wait()
