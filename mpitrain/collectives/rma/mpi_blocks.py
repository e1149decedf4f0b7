"""Blocks between MPI ranks: in place on a node, by messages or one-sided operations between nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np

from mpitrain.collectives.rma.block_memory import BlockMemory
from mpitrain.collectives.rma.blocks import Block, Blocks
from mpitrain.collectives.rma.locks import LockTable, LockWord
from mpitrain.collectives.rma.node_visits import NodeBlock, NodeVisit
from mpitrain.collectives.rma.one_sided_blocks import OneSidedBlocks
from mpitrain.collectives.rma.remote_blocks import N_STAGING_BUFFERS, RemoteBlocks
from mpitrain.collectives.rma.remote_locks import RemoteLocks
from mpitrain.collectives.rma.window import Window
from mpitrain.collectives.world.statistics import Statistics
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
        self._node_blocks: list[NodeBlock] | None = None  # if all are on this node, and after ``prepare``
        if world.n_nodes == 1 and None not in self._in_place:
            blocks = self._with_words()
            self._node_visits = (
                [NodeVisit(self, block, word, updated=False) for block, word in blocks],
                [NodeVisit(self, block, word, updated=True) for block, word in blocks],
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

    def locked(
        self, index: int, prefetch: int | None = None, *, updated: bool, encoded: bool = False
    ) -> AbstractContextManager[Block]:
        """Return a context manager that holds the lock of a block. Local; entering it waits for the present owner."""
        if self._node_visits is not None:
            return self._node_visits[updated][index]
        return super().locked(index, prefetch, updated=updated, encoded=encoded)

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

    def write(self, index: int, values: Any | None, tags: np.ndarray) -> None:
        """Replace the elements and the tags of a block under its lock; see ``Blocks``. Local; waits for its owner."""
        if values is None or self._node_blocks is None or not self._node_blocks[index].write(values, tags):
            super().write(index, values, tags)

    def prepare(self, like: Any) -> None:
        """Compile what ``write`` and ``average`` need. Local."""
        super().prepare(like)
        if self._node_visits is not None:
            self._node_blocks = [NodeBlock(block, word) for block, word in self._with_words()]

    def average(self, index: int, x: Any, own: float, weight: float | None = None) -> tuple[float, int]:
        """Replace x by its weighted average with a block, under the block's lock; see ``Blocks``. Local."""
        if self._node_blocks is not None:
            averaged = self._node_blocks[index].average(x, own, weight)
            if averaged is not None:
                return averaged
        return super().average(index, x, own, weight)

    def _with_words(self) -> list[tuple[Block, LockWord]]:
        """Return the blocks in place, each with the word of its lock, which is in the memory of this node. Local."""
        places = zip(self._in_place, self.homes, self._slots, strict=True)
        return [(block, self._locks.word(home, slot)) for block, home, slot in places if block is not None]

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

    def peek_tags(self, index: int) -> np.ndarray:
        """Return a block's tags (N_TAGS,) without a lock. Local; see ``Blocks.peek_tags``."""
        block = self._in_place[index]
        if block is not None and self._locks.orders_memory:
            return block.tags
        return self._memory.peek_tags(index)

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
