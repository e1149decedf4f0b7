"""Mailboxes: vectors at every worker, which others read or leave messages in.

A mailbox is read and changed as a whole, under one lock, together with its tags. Two slots make a double buffer:
``publish`` writes the older one while others read the newer one, so that neither waits for the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mpitrain.collectives.rma.blocks import N_TAGS, Blocks
from mpitrain.collectives.world.statistics import Statistics
from mpitrain.kernels.gpu import assign

SEQUENCE_TAG = 0
"""The tag that numbers the published vectors; the newer slot has the larger number."""


class Mailboxes:
    """``slots`` vectors of ``n`` elements at each worker. Made by ``Communicator.mailboxes``.

    Args:
        blocks: Block ``rank * slots + slot`` is this slot of this worker.
        rank: This worker.
        slots: Vectors per worker.
        statistics: Where exchanges and non-finite elements are counted.
    """

    def __init__(self, blocks: Blocks, rank: int, slots: int, statistics: Statistics) -> None:
        self._blocks, self._rank, self._slots = blocks, rank, slots
        self._statistics = statistics
        self._n_published = 0
        self._peeked = np.zeros(N_TAGS)

    def update(
        self, rank: int, fn: Callable[[Any, np.ndarray], int | None], slot: int = 0, *, pulls: bool = False
    ) -> None:
        """Change a worker's mailbox in place. Local.

        Args:
            rank: The worker.
            fn: Called with the mailbox's array (n,) and its tags (N_TAGS,), float64, both to be changed in place. Its
                result is counted as non-finite elements. It may visit another mailbox. A worker that holds two locks
                acquires that of the lower rank first, so that workers do not wait for each other in a circle.
            slot: Which of the worker's vectors.
            pulls: Whether ``fn`` also copies the mailbox's values: the visit then exchanges two vectors.
        """
        n_bytes = self._visit(rank * self._slots + slot, fn, updated=True)
        self._count(rank, 2 * n_bytes if pulls else n_bytes)

    def receive(self, rank: int, fn: Callable[[Any, np.ndarray], int | None], slot: int = 0) -> None:
        """Call ``fn`` with a worker's mailbox and its tags, which it must not change. Local."""
        self._count(rank, self._visit(rank * self._slots + slot, fn, updated=False))

    def read(self, rank: int, fn: Callable[[Any, np.ndarray], object], slot: int = 0) -> None:
        """Call ``fn`` as ``receive`` does, for evaluation and checkpoints. Local; not counted as an exchange."""
        with self._blocks.locked(rank * self._slots + slot, updated=False) as block:
            fn(block.data, block.tags)

    def peek(self, rank: int, slot: int = 0) -> np.ndarray:
        """Return the tags (N_TAGS,) of a mailbox, read without its lock. Local; overwritten by the next call."""
        self._blocks.peek_tags(rank * self._slots + slot, self._peeked)
        return self._peeked

    def publish(self, values: Any) -> None:
        """Let others read ``values`` (n,) from now on: write them to the older slot. Local."""
        self._n_published += 1
        slot = self._n_published % self._slots
        with self._blocks.locked(self._rank * self._slots + slot, updated=True) as block:
            assign(block.data, values)
            block.tags[SEQUENCE_TAG] = self._n_published

    def latest(self, rank: int, fn: Callable[[Any], int | None]) -> None:
        """Call ``fn`` with the newest vector that ``rank`` has published, never a mix of two vectors. Local."""
        newest, most = 0, -1.0
        for slot in range(self._slots):
            number = float(self.peek(rank, slot)[SEQUENCE_TAG])
            if number > most:
                newest, most = slot, number
        self._count(rank, self._visit(rank * self._slots + newest, lambda box, _: fn(box), updated=False))

    def _visit(self, index: int, fn: Callable[[Any, np.ndarray], int | None], *, updated: bool) -> int:
        """Call ``fn`` under a mailbox's lock and return the size of the mailbox."""
        with self._blocks.locked(index, updated=updated) as block:
            n_nonfinite = fn(block.data, block.tags)
        if n_nonfinite is not None:
            self._statistics.n_nonfinite += n_nonfinite
        return int(block.data.nbytes)

    def _count(self, rank: int, n_bytes: int) -> None:
        """Count an exchange if the mailbox is another worker's."""
        if rank != self._rank:
            self._statistics.n_exchanges += 1
            self._statistics.bytes_sent += n_bytes

    def free(self) -> None:
        """Free the memory. Collective."""
        self._blocks.free()
