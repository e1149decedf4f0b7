"""Blocks of other nodes, which the progress threads of their homes lock, send, receive and unlock.

A visit takes two round trips: the home's progress thread (``world.progress``) acquires the lock and sends the block,
and later stores the block and releases the lock. A worker that says which block it wants next has it prefetched while
it changes the present one and while the present one travels home, so that a link carries data in both directions::

    block 0   fetch | change | store
    block 1           fetch  | change | store
    block 2                    fetch  | change | store

Ranks cannot wait for each other in a circle, because a store waits for no lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mpitrain.collectives.rma.block_memory import BlockMemory
from mpitrain.collectives.rma.blocks import N_TAGS, Block
from mpitrain.collectives.rma.locks import count_wait
from mpitrain.collectives.rma.remote_locks import RemoteLocks
from mpitrain.collectives.rma.wire_buffers import WireBuffers
from mpitrain.collectives.world.progress import ProgressThread
from mpitrain.collectives.world.statistics import Statistics
from mpitrain.collectives.world.transfers import Transfer
from mpitrain.kernels.gpu import address_of
from mpitrain.kernels.native.lock_words import OWNER_BITS
from mpitrain.kernels.native.wire import PLAIN, Encoded, Format

N_STAGING_BUFFERS = 4
"""One for a block that is fetched, one for a block that is worked on, and two for blocks that are stored."""

NOTHING = np.zeros(0, np.uint8)


@dataclass(slots=True)
class RemoteBlock(Block):
    """A block in a staging buffer.

    Attributes:
        encoded: The block as it was fetched, and a buffer for its encoded change; None if it travels unencoded.
    """

    encoded: tuple[np.ndarray, np.ndarray] | None = None


class RemoteBlocks:
    """The blocks of other nodes. Collective to create.

    Args:
        memory: The memory of all blocks.
        locks: Their locks.
        progress: The progress thread of this rank.
        statistics: Where bytes and waiting are counted.
        n_staging_buffers: Blocks of other nodes that this worker has at a time: one fetched, one worked on, and the
            others on their way home.
        encoding: The wire format of encoded visits; None without one.
        before_wait: Called before this worker waits for a lock.

    Attributes:
        residuals: By block, (length,) the change that this worker has not sent yet.
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
        local = memory.data.local
        self._itemsize = local.dtype.itemsize
        bases = address_of(local), address_of(memory.tags.local)
        self._bases: list[tuple[int, int]] = memory.world.allgather(bases)
        # Used in turn: the blocks that are fetched, worked on and stored.
        self.staging = memory.staging_buffers(n_staging_buffers)
        self._staged_tags = np.zeros((n_staging_buffers, N_TAGS))
        self._encoded_staging = [] if self._wire is None else [self._wire.staging() for _ in range(n_staging_buffers)]
        self._current = 0
        self._prefetched: tuple[RemoteBlock, Transfer] | None = None
        self._stores: deque[Transfer] = deque()

    def acquire(self, index: int, prefetch: int | None, encoded: bool) -> Block:
        """Lock and fetch a block; once the lock is granted, prefetch another one. Local."""
        block, transfer = self._claim(index) or self._fetch(index, encoded)
        if self._before_wait is not None:
            self._before_wait()
        count_wait(self._statistics, transfer.wait_for_lock())
        if prefetch is not None:
            self.prefetch(prefetch, encoded)
        block.version = transfer.wait() >> OWNER_BITS
        if block.encoded is not None and self._wire is not None:
            self._wire.decode(block.encoded[0], block.data)
        return block

    def prefetch(self, index: int, encoded: bool) -> None:
        """Start to lock and fetch the block that is acquired next. Local."""
        self._prefetched = self._claim(index) or self._fetch(index, encoded)

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
        self._stores.append(self._progress.store(home, addresses, arrays, swap, description))

    def wait(self, all_but: int = 0) -> None:
        """Wait until the released blocks, except for the last ones, are stored and unlocked. Local."""
        while len(self._stores) > all_but:
            self._stores.popleft().wait()

    def _claim(self, index: int) -> tuple[RemoteBlock, Transfer] | None:
        """Return the prefetched block if it is this one. Release any other: the visit that wanted it was broken off."""
        prefetched, self._prefetched = self._prefetched, None
        if prefetched is not None and prefetched[0].index != index:
            block, transfer = prefetched
            block.version = transfer.wait() >> OWNER_BITS
            self.release(block, updated=False)
            return None
        return prefetched

    def _fetch(self, index: int, encoded: bool) -> tuple[RemoteBlock, Transfer]:
        """Start to lock and fetch a block."""
        # The oldest store may still read from the next staging buffer.
        self.wait(all_but=len(self.staging) - 2)
        block = self._staging_block(index)
        data = block.data
        if encoded and self._wire is not None:
            fetched, change = self._encoded_staging[self._current]
            data = self._wire.fetched(fetched, block.data.size)
            block.encoded = data, change
        addresses, description = self._addresses(index, encoded=block.encoded is not None)
        self._statistics.wire_bytes += data.nbytes
        home = self._memory.homes[index]
        owner = self._locks.acquire_swap(home, self._memory.slots[index])
        return block, self._progress.fetch(home, addresses, (data, block.tags), owner, description)

    def _staging_block(self, index: int) -> RemoteBlock:
        self._current = (self._current + 1) % len(self.staging)
        data = self.staging[self._current][: self._memory.lengths[index]]
        return RemoteBlock(index, data, self._staged_tags[self._current], version=0)

    def _addresses(self, index: int, *, encoded: bool) -> tuple[tuple[int, int], Encoded]:
        """Return the addresses of a block, or of its encoding, and of its tags at its home; and the encoding."""
        memory = self._memory
        data, tags = self._bases[memory.homes[index]]
        data += memory.starts[index] * self._itemsize
        tags += memory.slots[index] * N_TAGS * 8
        if not encoded or self._wire is None:
            return (data, tags), PLAIN
        return (self._wire.address(index), tags), self._wire.encoded(index, data)
