"""Blocks: the memory of shared vectors and mailboxes, in pieces that many workers change under locks.

A block has a home rank, a lock with a version (``rma.locks``), and a few numbers, its tags, which the same lock guards.
The owner of the lock has the block as an array. On the block's own node this array is the shared memory itself, which
kernels update in place. On other nodes it is a staging buffer, fetched on ``acquire`` and stored on ``release`` before
the lock is free again. A read-modify-write is therefore atomic and ordered everywhere, and a pull after a push sees
that push.

``MPIBlocks`` (``rma.mpi_blocks``), ``DeviceBlocks`` (``rma.device_blocks``) and ``SimulatedBlocks``
(``simulation.memory``) implement the interface.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import zip_longest
from types import TracebackType
from typing import Any

import numpy as np

from mpitrain.kernels import weighted_average
from mpitrain.kernels.gpu import assign

N_TAGS = 4
"""Numbers that travel with a block: a count, a weight, a clock."""

WEIGHT_TAG = 1
"""The tag that is the weight of a block in averages."""


@dataclass(slots=True)
class Block:
    """A locked block of a shared vector or of mailboxes.

    Attributes:
        index: The number of the block.
        data: (length,) the elements, which may be changed in place.
        tags: (N_TAGS,) float64, which may be changed in place.
        version: The number of updates of the block before its lock was acquired.
    """

    index: int
    data: Any
    tags: np.ndarray
    version: int


class Blocks(ABC):
    """The interface of the memory of shared vectors and mailboxes: blocks with locks.

    Attributes:
        homes: The home rank of each block.
        lengths: The number of elements of each block.
    """

    homes: Sequence[int]
    lengths: Sequence[int]

    def locked(
        self, index: int, prefetch: int | None = None, *, updated: bool, encoded: bool = False
    ) -> AbstractContextManager[Block]:
        """Return a context manager that holds the lock of a block. Local; entering it waits for the present owner.

        Args:
            index: The number of the block.
            prefetch: The block that will be acquired next, after the release of this one. It may be fetched ahead of
                time. If the body raises, the prefetched block is released as well.
            updated: Whether the body changes the block.
            encoded: As in ``acquire``.
        """
        return LockedBlock(self, index, prefetch, updated, encoded)

    def visit(
        self, order: Sequence[int], *, updated: bool, encoded: bool = False
    ) -> Iterator[AbstractContextManager[Block]]:
        """Yield a context manager for each block of ``order``. Local.

        Enter each one before you request the next one. Entering waits for the lock. If the body raises, every lock of
        the visit is released, and the visit is over.

        Args:
            order: The numbers of the blocks, each once. Between nodes, blocks may come in the order in which their
                locks are granted.
            updated: Whether the bodies change the blocks.
            encoded: As in ``acquire``.
        """
        for index, following in zip_longest(order, order[1:]):
            yield LockedBlock(self, index, following, updated, encoded)

    @abstractmethod
    def acquire(self, index: int, prefetch: int | None = None, *, encoded: bool = False) -> Block:
        """Lock a block and return it as an array. Local; waits for the present owner.

        Args:
            index: The number of the block.
            prefetch: The block that this worker acquires next, after the release of this one. If possible, it is
                fetched ahead of time.
            encoded: Whether the block and its change may be sent in the wire format between nodes.
        """

    @abstractmethod
    def release(self, block: Block, *, updated: bool) -> None:
        """Store a block if it was updated, and unlock it. Local."""

    def write(self, index: int, values: Any | None, tags: np.ndarray) -> None:
        """Replace the elements and the tags of a block under its lock, as an update. Local; waits for its owner.

        Args:
            index: The number of the block.
            values: (length,) the elements; None to leave them as they are.
            tags: (N_TAGS,) float64.
        """
        with self.locked(index, updated=True) as block:
            if values is not None:
                assign(block.data, values)
            block.tags[:] = tags

    def prepare(self, like: Any) -> None:
        """Compile what ``write`` and ``average`` need for vectors such as ``like`` (length,). Local."""
        weighted_average.prepare(like)

    def average(self, index: int, x: Any, own: float, weight: float | None = None) -> tuple[float, int]:
        """Replace x by its weighted average with a block, under the block's lock. Local; waits for its owner.

        Args:
            index: The number of the block.
            x: (length,) the vector.
            own: The weight of x.
            weight: The weight of the block; by default its tag ``WEIGHT_TAG``.

        Returns:
            The weight of the block, and the number of non-finite elements that were left out.
        """
        with self.locked(index, updated=False) as block:
            weight = float(block.tags[WEIGHT_TAG]) if weight is None else weight
            return weight, weighted_average(x, block.data, weight / (own + weight))

    def watch_restarts(self, on_restart: Callable[[Block, bool], object]) -> None:  # noqa: B027 - optional
        """Set a function to call where a block continues with other values, because its node is lost. Local.

        Args:
            on_restart: Called with the locked block, before this worker visits it there for the first time, and whether
                the block has no values yet. If so, the function must set them.
        """

    @abstractmethod
    def peek_tags(self, index: int) -> np.ndarray:
        """Return a block's tags (N_TAGS,) without a lock. Local; the tags may come from different updates.

        The array may be the memory of the block itself, which others change, or a copy that the next call overwrites.
        """

    @abstractmethod
    def free(self) -> None:
        """Free the memory. Collective."""


class LockedBlock:
    """A context manager that acquires a block on entry and releases it on exit. Created by ``Blocks.locked``."""

    __slots__ = ("_block", "_blocks", "_encoded", "_index", "_prefetch", "_updated")

    def __init__(self, blocks: Blocks, index: int, prefetch: int | None, updated: bool, encoded: bool) -> None:
        self._blocks = blocks
        self._index = index
        self._prefetch = prefetch
        self._updated = updated
        self._encoded = encoded

    def __enter__(self) -> Block:
        self._block = block = self._blocks.acquire(self._index, self._prefetch, encoded=self._encoded)
        return block

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._blocks.release(self._block, updated=self._updated)
        finally:
            if kind is not None and self._prefetch is not None:  # it may have been locked already
                self._blocks.release(self._blocks.acquire(self._prefetch), updated=False)
