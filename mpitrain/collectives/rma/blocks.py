"""Blocks of memory that many workers change: what the center, the mailboxes and every other shared vector are made of.

A block has a home rank, a lock with a version (``rma.locks``) and a few numbers, its tags, that are guarded by
the same lock. Whoever holds the lock has the block as an array: on the block's own node the shared memory itself, so
that a kernel works on it in place; on other nodes a staging buffer that is fetched on ``acquire`` and committed on
``release``, before the lock is free again. So a read-modify-write is atomic and ordered in both cases, and the pull
that follows a push sees that push.

Between nodes the home's progress thread (``world.progress``) takes the lock and sends the block, and later stores
it and frees the lock: two round trips. Whoever says which block it wants next has it fetched while it changes this one
and while this one is on its way home, so that a link carries data in both directions. No circle of waiting ranks can
close: to give a block back waits for nothing. Without such threads (MPI without MPI_THREAD_MULTIPLE) everything is done
by MPI's one-sided operations.

Those threads can also fetch and commit float32 blocks in a wire format (``native.wire``): the home encodes the block
into a buffer beside it, which belongs to whoever has the lock; the visitor sends back by how much the block has
changed, and the home adds that. So whatever is done to a block, it moves by what was sent, and what the short form has
lost of it, the residual, is kept by the visitor and sent with its next change: blocks and residuals together conserve
the sum, to the rounding of float32. That is right where blocks are changed, and wrong where they are replaced by
something that has nothing to do with what they held, as mailboxes are: what was lost of one message does not belong
into the next one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mpitrain.collectives.world.statistics import Statistics
from mpitrain.kernels.gpu import address_of
from mpitrain.kernels.native import wire
from mpitrain.kernels.native.lock_words import OWNER_BITS

if TYPE_CHECKING:
    from mpitrain.collectives.rma.remote_locks import RemoteLocks
    from mpitrain.collectives.rma.window import Window
    from mpitrain.collectives.world.transfers import Transfer
    from mpitrain.collectives.world.world import World

NOTHING = np.zeros(0, np.uint8)

N_STAGING_BUFFERS = 4
"""For blocks of other nodes: two that come, one that is worked on or leaves, and another one that leaves."""

N_TAGS = 4
"""Numbers that travel with a block: a count, a weight, a clock."""

ALIGNMENT = 64
"""Bytes; each encoded block begins at a multiple."""


@dataclass(slots=True)
class Block:
    """A block whose lock this worker holds.

    Attributes:
        index: Which block.
        data: (length,) its elements, to be changed in place.
        tags: (N_TAGS,) float64, to be changed in place.
        version: How many updates it had seen when the lock was taken.
    """

    index: int
    data: Any
    tags: np.ndarray
    version: int


class Blocks(Protocol):
    """What shared vectors need of the memory below them; of MPI's here, of one process in ``simulated``."""

    @property
    def homes(self) -> Sequence[int]:
        """The rank where each block lives."""

    @property
    def lengths(self) -> Sequence[int]:
        """The number of elements of each block."""

    def acquire(self, index: int, prefetch: int | None = None) -> Block:
        """Lock a block and have it as an array. Local; waits for the present owner.

        Args:
            index: Which block.
            then: The one that this worker acquires next, after it has released this one: it may set out already.
        """

    def release(self, block: Block, *, updated: bool) -> None:
        """Commit an updated block and free its lock. Local."""

    def peek_tags(self, index: int, out: np.ndarray) -> None:
        """Copy a block's tags without its lock: each number is whole, two of them may be of different times. Local."""

    def free(self) -> None:
        """Give the memory back. Collective."""


class MPIBlocks:
    """Blocks between the ranks of a world. Collective to create and to free.

    Args:
        world: The ranks.
        homes: The home rank of each block.
        lengths: The number of elements of each block.
        dtype: Of the elements.
        statistics: Where bytes and waiting are counted.
        window: Makes the memory where they live; a window on GPUs is visited by one-sided operations between nodes.
        n_staging_buffers: Blocks of other nodes that this worker has at once.
        encoding: The wire format of visits that ask for it; None, and for other elements than float32: there is none.
            It takes 2 bytes for each element at home, and 4 for each on other nodes that this worker changes.

    Attributes:
        before_wait: Called before this worker waits for a lock. Whoever gives blocks back later than it could must do
            so then, or two workers might wait for each other.
    """

    def __init__(
        self,
        world: World,
        homes: Sequence[int],
        lengths: Sequence[int],
        dtype: Any,
        statistics: Statistics,
        *,
        window: Callable[..., Window] | None = None,
        n_staging_buffers: int = N_STAGING_BUFFERS,
        encoding: wire.Format | None = None,
    ) -> None:
        # Not above: they start MPI, which a simulation or a list of the methods does without.
        from mpitrain.collectives.rma.locks import LockTable
        from mpitrain.collectives.rma.remote_locks import RemoteLocks
        from mpitrain.collectives.rma.window import Window

        self.homes, self.lengths = tuple(homes), tuple(lengths)
        self.before_wait: Callable[[], object] | None = None
        self._statistics = statistics
        self._itemsize = np.dtype(dtype).itemsize
        # Where a block lies in its home's window, where it is encoded, and which of the home's locks is its own.
        self._starts: list[int] = []
        self._buffer_starts: list[int] = []
        self._slots: list[int] = []
        used, buffered, counts = ([0] * world.size for _ in range(3))
        for home, length in zip(self.homes, self.lengths, strict=True):
            self._starts.append(used[home])
            self._buffer_starts.append(buffered[home])
            self._slots.append(counts[home])
            used[home] += length
            buffered[home] += _encoded_bytes(encoding, length)
            counts[home] += 1
        self._data = (window or Window)(world, used[world.rank], dtype)
        self._tags = Window(world, counts[world.rank] * N_TAGS, np.float64)
        service = world.service if isinstance(self._data.local, np.ndarray) else None
        self._remote = RemoteLocks(world, counts, service) if service is not None else None
        self._locks: LockTable = self._remote or LockTable(world, counts)
        encodes = self._remote is not None and np.dtype(dtype) == np.float32
        self._encoding = encoding if encodes else None
        self._buffers = np.zeros(buffered[world.rank] if self._encoding else 0, np.uint8)
        bases = (address_of(self._data.local), address_of(self._tags.local), self._buffers.ctypes.data)
        self._bases: list[tuple[int, int, int]] = world.comm.allgather(bases)
        is_remote = [n for home, n in zip(self.homes, self.lengths, strict=True) if self._data.of(home) is None]
        if self._encoding is not None:
            wire.prepare(self._encoding)
        in_short = _encoded_bytes(self._encoding, max(is_remote, default=0))
        self._short = [(np.zeros(in_short, np.uint8), np.zeros(in_short, np.uint8)) for _ in range(n_staging_buffers)]
        self._encoded: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # visited blocks: as fetched, what is sent back
        self._residuals: dict[int, np.ndarray] = {}
        # Used in turn: those that come, one that is worked on, those that are on their way home.
        self._staging = [
            np.zeros_like(self._data.local, shape=(max(is_remote, default=0),)) for _ in range(n_staging_buffers)
        ]
        self._staged_tags = np.zeros((n_staging_buffers, N_TAGS))
        self._buffer = 0
        self._coming: tuple[Block, Transfer] | None = None
        self._leaving: deque[Transfer] = deque()
        self._more = False
        # A block of this node has one record, which belongs to whoever holds its lock.
        self._in_place = [self._record(index) for index in range(len(self.homes))]

    def acquire(self, index: int, prefetch: int | None = None, *, encoded: bool = False) -> Block:
        """Lock a block and have it as an array; another one may set out. Local; waits for the present owner.

        Args:
            index: Which block.
            then: As in ``Blocks``.
            encoded: It may come in the wire format, and its change go back so, if it is one of another node.
        """
        home, slot, block = self.homes[index], self._slots[index], self._in_place[index]
        self._more = prefetch is not None
        remote = self._remote
        if prefetch is not None and (remote is None or self._in_place[prefetch] is not None):
            prefetch = None  # nothing to set out
        if block is None and remote is not None:
            return self._arrived(remote, index, prefetch, encoded)
        version, waited = self._locks.acquire(home, slot, self.before_wait)
        self._count_wait(waited)
        if block is None:
            block = self._get(index)
        elif not self._locks.orders_memory:
            self._data.sync()
        block.version = version
        if prefetch is not None and remote is not None:
            self._coming = self._set_out(remote, prefetch, encoded)
        return block

    def release(self, block: Block, *, updated: bool) -> None:
        """Commit an updated block and free its lock. Local."""
        index = block.index
        home, slot = self.homes[index], self._slots[index]
        is_remote = self._in_place[index] is None
        if is_remote and self._remote is not None:
            arrays, addresses, description = (NOTHING, NOTHING), self._addresses(index), wire.PLAIN
            encoded = self._encoded.pop(index, None)
            if updated and encoded is not None:
                addresses, description = self._encoded_at(index)
                arrays = self._change(block, *encoded), block.tags
            elif updated:
                arrays = block.data, block.tags
            self._statistics.wire_bytes += arrays[0].nbytes
            leaving = self._remote.store(home, slot, addresses, arrays, block.version, updated, description)
            self._leaving.append(leaving)
        else:
            if is_remote and updated:
                self._put(block)
            elif not self._locks.orders_memory:
                self._data.sync()
            self._locks.release(home, slot, block.version, updated=updated)
        if not self._more:
            self._commit()

    def _set_out(self, remote: RemoteLocks, index: int, encoded: bool) -> tuple[Block, Transfer]:
        """Begin to lock and to fetch a block of another node."""
        self._commit(all_but=len(self._staging) - 2)  # those before it leave their rooms to it
        block = self._staging_block(index)
        data, addresses, description = block.data, self._addresses(index), wire.PLAIN
        if encoded and self._encoding is not None:
            fetched, sent = self._short[self._buffer]
            data = fetched[: self._encoding.fetched_bytes(block.data.size)]
            self._encoded[index] = data, sent[: self._encoding.sent_bytes(block.data.size)]
            addresses, description = self._encoded_at(index)
        self._statistics.wire_bytes += data.nbytes
        arrays = data, block.tags
        return block, remote.fetch(self.homes[index], self._slots[index], addresses, arrays, description)

    def _arrived(self, remote: RemoteLocks, index: int, prefetch: int | None, encoded: bool) -> Block:
        """A block of another node, locked and fetched; another one follows closely."""
        coming, self._coming = self._coming, None
        if coming is not None and coming[0].index != index:
            unvisited, transfer = coming  # the visit that it set out for was broken off
            unvisited.version = transfer.wait() >> OWNER_BITS
            self.release(unvisited, updated=False)
            coming = None
        block, transfer = coming or self._set_out(remote, index, encoded)
        if self.before_wait is not None:
            self.before_wait()
        self._count_wait(transfer.wait_for_lock())
        if prefetch is not None:
            self._coming = self._set_out(remote, prefetch, encoded)
        block.version = transfer.wait() >> OWNER_BITS
        if index in self._encoded and self._encoding is not None:
            self._encoding.decode(self._encoded[index][0], block.data)
        return block

    def _change(self, block: Block, fetched: np.ndarray, sent: np.ndarray) -> np.ndarray:
        """By how much a block has changed since it was fetched, encoded; what that loses waits for the next time."""
        assert self._encoding is not None
        if block.index not in self._residuals:
            self._residuals[block.index] = np.zeros_like(block.data)
        self._statistics.n_nonfinite += self._encoding.push(block.data, fetched, self._residuals[block.index], sent)
        return sent

    def drop_residuals(self) -> None:
        """Forget what encoded changes have lost so far: the blocks get other values. Local."""
        self._residuals.clear()

    def _commit(self, all_but: int = 0) -> None:
        """Wait until the blocks that were given back, but for the last ones, are at home and their locks free."""
        while len(self._leaving) > all_but:
            self._leaving.popleft().wait()

    def _get(self, index: int) -> Block:
        """A block of another node by one-sided operations."""
        home, block = self.homes[index], self._staging_block(index)
        self._statistics.wire_bytes += block.data.nbytes
        self._data.get(home, block.data, self._starts[index])
        tags = self._tags_in_place(index)
        if tags is None:
            self._tags.get(home, block.tags, self._slots[index] * N_TAGS)
            self._tags.flush(home)
        else:
            block.tags[:] = tags
        self._data.flush(home)
        return block

    def _put(self, block: Block) -> None:
        """The same in the other direction."""
        index = block.index
        home = self.homes[index]
        self._statistics.wire_bytes += block.data.nbytes
        self._data.put(home, block.data, self._starts[index])
        tags = self._tags_in_place(index)
        if tags is None:
            self._tags.put(home, block.tags, self._slots[index] * N_TAGS)
            self._tags.flush(home)
        else:
            tags[:] = block.tags
        self._data.flush(home)

    def _tags_in_place(self, index: int) -> np.ndarray | None:
        """Of a block whose home is on this node, also where its data are in the memory of a GPU."""
        tags, slot = self._tags.of(self.homes[index]), self._slots[index]
        return None if tags is None else tags[slot * N_TAGS : (slot + 1) * N_TAGS]

    def _staging_block(self, index: int) -> Block:
        """Where a block of another node is fetched to."""
        self._buffer = (self._buffer + 1) % len(self._staging)
        data = self._staging[self._buffer][: self.lengths[index]]
        return Block(index, data, self._staged_tags[self._buffer], version=0)

    def _count_wait(self, seconds: float) -> None:
        if seconds:
            self._statistics.wait_seconds += seconds
            self._statistics.lock_wait_seconds += seconds

    def peek_tags(self, index: int, out: np.ndarray) -> None:
        """Copy a block's tags without its lock: each number is whole, two of them may be of different times. Local."""
        tags = self._tags_in_place(index)
        if tags is not None:
            self._tags.sync()
            out[:] = tags
        else:
            self._tags.get(self.homes[index], out, self._slots[index] * N_TAGS)
            self._tags.flush(self.homes[index])

    def memory(self) -> list[Any]:
        """What ``acquire`` may return parts of: the arrays of this node's ranks, and the rooms for others. Local."""
        ranks = {home for home in self.homes if self._data.of(home) is not None}
        return [*[self._data.of(rank) for rank in sorted(ranks)], *self._staging]

    def lock_owner(self, index: int) -> int | None:
        """The rank that holds a block's lock now. Local."""
        return self._locks.owner(self.homes[index], self._slots[index])

    def free(self) -> None:
        """Give the memory back. Collective."""
        self._locks.free()
        self._tags.free()
        self._data.free()

    def _addresses(self, index: int) -> tuple[int, int]:
        """Of a block and its tags, in the process that is its home."""
        data, tags, _ = self._bases[self.homes[index]]
        return data + self._starts[index] * self._itemsize, tags + self._slots[index] * N_TAGS * 8

    def _encoded_at(self, index: int) -> tuple[tuple[int, int], wire.Encoded]:
        """The addresses of a block's buffer and tags there, and what the buffer is made of."""
        assert self._encoding is not None
        data, tags = self._addresses(index)
        buffer = self._bases[self.homes[index]][2] + self._buffer_starts[index]
        return (buffer, tags), (self._encoding.code, data, self.lengths[index])

    def _record(self, index: int) -> Block | None:
        """A block of this node as whoever holds its lock has it, None for one of another node."""
        start, length = self._starts[index], self.lengths[index]
        memory, tags = self._data.of(self.homes[index]), self._tags_in_place(index)
        if memory is None or tags is None:
            return None
        return Block(index, memory[start : start + length], tags, version=0)


def _encoded_bytes(encoding: wire.Format | None, n: int) -> int:
    """Bytes for a block of ``n`` elements on its way there or back."""
    if encoding is None:
        return 0
    return -(-max(encoding.fetched_bytes(n), encoding.sent_bytes(n)) // ALIGNMENT) * ALIGNMENT
