"""Blocks between MPI ranks: in place on a node, by messages or one-sided operations between nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np

from mpitrain.collectives.rma.block_memory import BlockMemory
from mpitrain.collectives.rma.blocks import Block, Blocks
from mpitrain.collectives.rma.locks import LockTable, LockWord
from mpitrain.collectives.rma.one_sided_blocks import OneSidedBlocks
from mpitrain.collectives.rma.remote_blocks import N_STAGING_BUFFERS, RemoteBlocks
from mpitrain.collectives.rma.remote_locks import RemoteLocks
from mpitrain.collectives.rma.window import Window
from mpitrain.collectives.world.statistics import Statistics
from mpitrain.kernels.native.lock_words import OWNER_BITS, OWNER_MASK
from mpitrain.kernels.native.wire import Format

if TYPE_CHECKING:
    from mpitrain.collectives.world.world import World


class MPIBlocks(Blocks):
    """Blocks between the ranks of a world. Collective to create and to free.

    Args:
        world: The ranks.
        homes: The home rank of each block.
        lengths: The number of elements of each block.
        dtype: The type of the elements.
        statistics: The counters of bytes and waiting.
        make_window: The class that allocates the elements. Blocks in a ``DeviceWindow`` are accessed by one-sided
            operations.
        n_staging_buffers: The number of remote blocks that this worker can hold at a time.
        encoding: The wire format of encoded visits to remote float32 blocks; None without one.
        continues: Whether a block continues at another rank if its node is lost. Otherwise ``RankFailed`` is raised.
        before_wait: Called before this worker waits for a lock. A caller that releases blocks late must release them
            here to avoid a deadlock.
    """

    def __init__(
        self,
        world: World,
        homes: Sequence[int],
        lengths: Sequence[int],
        dtype: Any,
        statistics: Statistics,
        *,
        make_window: Callable[..., Any] = Window,
        n_staging_buffers: int = N_STAGING_BUFFERS,
        encoding: Format | None = None,
        continues: bool = False,
        before_wait: Callable[[], object] | None = None,
    ) -> None:
        self.homes, self.lengths = tuple(homes), tuple(lengths)
        self._statistics, self._before_wait = statistics, before_wait
        self._memory = BlockMemory(world, homes, lengths, dtype, make_window)
        self._in_place, self._slots = self._memory.in_place, self._memory.slots
        self._locks: LockTable
        self._remote: RemoteBlocks | OneSidedBlocks
        options: Any = {"n_staging_buffers": n_staging_buffers, "before_wait": before_wait}
        if world.service is not None and isinstance(self._memory.data.local, np.ndarray):
            self._locks = locks = RemoteLocks(world, self._memory.n_slots, world.service)
            options |= {"encoding": encoding if np.dtype(dtype) == np.float32 else None, "continues": continues}
            self._remote = RemoteBlocks(self._memory, locks, world.service, statistics, **options)
        else:
            self._locks = LockTable(world, self._memory.n_slots)
            self._remote = OneSidedBlocks(self._memory, self._locks, statistics, **options)
        self._has_next = False
        # By `updated`: a context manager for each block, if all are on this node.
        self._node_visits: tuple[list[NodeVisit], list[NodeVisit]] | None = None
        if world.n_nodes == 1 and None not in self._in_place:
            words = [self._locks.word(home, slot) for home, slot in zip(self.homes, self._slots, strict=True)]
            self._node_visits = (
                [NodeVisit(self, index, word, updated=False) for index, word in enumerate(words)],
                [NodeVisit(self, index, word, updated=True) for index, word in enumerate(words)],
            )

    def acquire(self, index: int, prefetch: int | None = None, *, encoded: bool = False) -> Block:
        """Lock a block and return it as an array. Local; waits for the present owner."""
        block = self._in_place[index]
        self._has_next = prefetch is not None
        if prefetch is not None and self._in_place[prefetch] is not None:
            prefetch = None
        if block is None:
            return self._remote.acquire(index, prefetch, encoded)
        locks = self._locks
        block.version, waited = locks.acquire(self.homes[index], self._slots[index], self._before_wait)
        if waited:
            self._statistics.add_lock_wait(waited)
        if not locks.orders_memory:
            self._memory.data.sync()
        if prefetch is not None:
            self._remote.prefetch(prefetch, encoded)
        return block

    def visit(
        self, order: Sequence[int], *, updated: bool, encoded: bool = False
    ) -> Iterator[AbstractContextManager[Block]]:
        """Return context managers for the blocks: first remote ones in the order of their arrival, then local ones."""
        if self._node_visits is not None:
            return map(self._node_visits[updated].__getitem__, order)
        return self._visit_nodes(order, updated=updated, encoded=encoded)

    def _visit_nodes(
        self, order: Sequence[int], *, updated: bool, encoded: bool
    ) -> Iterator[AbstractContextManager[Block]]:
        """Yield the context managers of ``visit`` with several nodes.

        This worker holds no lock of another node while it waits for a lock of its own node, so there is no deadlock.
        """
        remote = self._remote
        if not isinstance(remote, RemoteBlocks):
            yield from super().visit(order, updated=updated, encoded=encoded)
            return
        elsewhere = [index for index in order if self._in_place[index] is None]
        if elsewhere:
            yield from remote.visit(elsewhere, updated=updated, encoded=encoded)
            order = [index for index in order if self._in_place[index] is not None]
        yield from super().visit(order, updated=updated, encoded=encoded)
        if not order:
            remote.wait()

    def release(self, block: Block, *, updated: bool) -> None:
        """Store a block if it was updated, and unlock it. Local.

        The last block of a visit is acquired without ``prefetch``. Its release waits until all blocks are stored and
        unlocked.
        """
        index = block.index
        if self._in_place[index] is None:
            self._remote.release(block, updated=updated)
        else:
            locks = self._locks
            if not locks.orders_memory:
                self._memory.data.sync()
            locks.release(self.homes[index], self._slots[index], block.version, updated=updated)
        if not self._has_next:
            self._remote.wait()

    def watch_restarts(self, on_restart: Callable[[Block, bool], object]) -> None:
        """Call ``on_restart`` where a block continues at another rank; see ``Blocks``. Local."""
        if isinstance(self._remote, RemoteBlocks):
            self._remote.on_restart = on_restart

    @property
    def residuals(self) -> dict[int, np.ndarray]:
        """The rounding error of each block's last encoded change, (length,), which the next change includes."""
        return self._remote.residuals

    def drop_residuals(self) -> None:
        """Discard the residuals, which are of no use once all blocks get new values. Local."""
        self.residuals.clear()

    def peek_tags(self, index: int, out: np.ndarray) -> None:
        """Copy a block's tags to ``out`` without a lock. Local; the tags may come from different updates."""
        self._memory.peek_tags(index, out)

    def arrays(self) -> list[Any]:
        """Return all arrays of which ``acquire`` may return a part. Local."""
        return [*self._memory.arrays(), *self._remote.staging]

    def lock_owner(self, index: int) -> int | None:
        """Return the rank that holds a block's lock; None if it is free. Local."""
        return self._locks.owner(self.homes[index], self._slots[index])

    def free(self) -> None:
        """Free the memory. Collective."""
        self._locks.free()
        self._memory.free()


class NodeVisit:
    """A context manager that holds the lock of a block on the only node. A block is in place, and its lock is a word.

    It does what ``LockedBlock`` does, in a few calls: a visit to a small block takes some microseconds.

    Args:
        blocks: All blocks.
        index: The number of the block.
        word: The word of its lock.
        updated: Whether the body changes the block.
    """

    __slots__ = ("_block", "_blocks", "_index", "_updated", "_word")

    def __init__(self, blocks: MPIBlocks, index: int, word: LockWord, *, updated: bool) -> None:
        block = blocks._in_place[index]
        assert block is not None
        self._blocks, self._index, self._block, self._word, self._updated = blocks, index, block, word, updated

    def __enter__(self) -> Block:
        word = self._word
        found = word.acquire(word.words, word.place, word.mine, 0)
        if found & OWNER_MASK:
            return self._blocks.acquire(self._index)  # waits for the owner
        self._block.version = found >> OWNER_BITS
        return self._block

    def __exit__(self, *_: object) -> None:
        word, version = self._word, self._block.version
        held = version << OWNER_BITS | word.mine
        if word.swap(word.words, word.place, held, (version + self._updated) << OWNER_BITS) != held:
            self._blocks.release(self._block, updated=self._updated)  # raises
