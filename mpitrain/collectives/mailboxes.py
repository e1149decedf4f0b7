"""Mailboxes: vectors at every worker that others read from, or leave something in.

A mailbox is whole: it is read and changed under one lock, together with its tags. Two slots make a double buffer:
``publish`` writes the older one while others still read the newer one, so that neither waits for the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mpitrain.collectives.blocks import N_TAGS, Blocks
from mpitrain.collectives.statistics import Statistics

SEQUENCE_TAG = 0
"""The tag that counts what was published; the newer slot has the larger one."""


class Mailboxes:
    """``slots`` vectors of ``n`` elements at each worker. Made by ``Communicator.mailboxes``.

    Args:
        blocks: Block ``rank * slots + slot`` is that slot of that worker.
        rank: This worker.
        slots: Vectors a worker.
        statistics: Where exchanges and rejected elements are counted.
    """

    def __init__(self, blocks: Blocks, rank: int, slots: int, statistics: Statistics) -> None:
        self._blocks, self._rank, self._slots = blocks, rank, slots
        self._statistics = statistics
        self._n_published = 0
        self._peeked = np.zeros(N_TAGS)

    def update(self, rank: int, fn: Callable[[Any, np.ndarray], int | None], slot: int = 0) -> None:
        """Change a worker's mailbox in place. Local.

        Args:
            rank: Whose.
            fn: Called with the mailbox's array (n,) and its tags (N_TAGS,), float64, both to be changed in place.
                What it returns is counted as rejected elements.
            slot: Which of its vectors.
        """
        self._count(rank, self._visit(rank * self._slots + slot, fn, updated=True))

    def publish(self, values: Any) -> None:
        """Let others read ``values`` (n,) from now on: into the slot that is not the newest. Local."""
        self._n_published += 1

        def write(box: Any, tags: np.ndarray) -> None:
            box[...] = values
            tags[SEQUENCE_TAG] = self._n_published

        self._visit(self._rank * self._slots + self._n_published % self._slots, write, updated=True)

    def latest(self, rank: int, fn: Callable[[Any], int | None]) -> None:
        """Call ``fn`` with what ``rank`` published last, whole (never half of one and half of another). Local."""
        newest, most = 0, -1.0
        for slot in range(self._slots):
            self._blocks.peek_tags(rank * self._slots + slot, self._peeked)
            if self._peeked[SEQUENCE_TAG] > most:
                newest, most = slot, float(self._peeked[SEQUENCE_TAG])
        self._count(rank, self._visit(rank * self._slots + newest, lambda box, _: fn(box), updated=False))

    def _visit(self, index: int, fn: Callable[[Any, np.ndarray], int | None], *, updated: bool) -> int:
        block = self._blocks.acquire(index)
        try:
            self._statistics.n_rejected += fn(block.data, block.tags) or 0
        finally:
            self._blocks.release(block, updated=updated)
        return int(block.data.nbytes)

    def _count(self, rank: int, n_bytes: int) -> None:
        """A visit to another worker's mailbox is an exchange; one to its own is none."""
        if rank != self._rank:
            self._statistics.n_exchanges += 1
            self._statistics.bytes_sent += n_bytes

    def free(self) -> None:
        """Give the memory back. Collective."""
        self._blocks.free()
