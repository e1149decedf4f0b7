"""Mailboxes: vectors at every worker that others read from, or leave something in.

A mailbox is whole: it is read and changed under one lock, together with its tags. Two slots make a double buffer:
``publish`` writes the older one while others still read the newer one, so that neither waits for the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mpitrain.collectives.rma.blocks import N_TAGS, Blocks
from mpitrain.collectives.world.statistics import Statistics
from mpitrain.kernels.gpu import assign

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

    def update(
        self, rank: int, fn: Callable[[Any, np.ndarray], int | None], slot: int = 0, *, pulls: bool = False
    ) -> None:
        """Change a worker's mailbox in place. Local.

        Args:
            rank: Whose.
            fn: Called with the mailbox's array (n,) and its tags (N_TAGS,), float64, both to be changed in place.
                What it returns is counted as rejected elements. It may visit another mailbox: whoever holds two locks
                takes those of lower ranks first, so that nobody waits in a circle.
            slot: Which of its vectors.
            pulls: Whether ``fn`` takes the mailbox's values along too: two vectors are then exchanged.
        """
        n_bytes = self._visit(rank * self._slots + slot, fn, updated=True)
        self._count(rank, 2 * n_bytes if pulls else n_bytes)

    def receive(self, rank: int, fn: Callable[[Any, np.ndarray], int | None], slot: int = 0) -> None:
        """Call ``fn`` with a worker's mailbox and its tags, both to be left as they are. Local."""
        self._count(rank, self._visit(rank * self._slots + slot, fn, updated=False))

    def read(self, rank: int, fn: Callable[[Any, np.ndarray], object], slot: int = 0) -> None:
        """The same for evaluation and checkpoints: not counted as an exchange. Local."""

        def peek(box: Any, tags: np.ndarray) -> None:
            fn(box, tags)

        self._visit(rank * self._slots + slot, peek, updated=False)

    def peek(self, rank: int, slot: int = 0) -> np.ndarray:
        """The tags (N_TAGS,) of a mailbox, without its lock; overwritten by the next call. Local."""
        self._blocks.peek_tags(rank * self._slots + slot, self._peeked)
        return self._peeked

    def publish(self, values: Any) -> None:
        """Let others read ``values`` (n,) from now on: into the slot that is not the newest. Local."""
        self._n_published += 1

        def write(box: Any, tags: np.ndarray) -> None:
            assign(box, values)
            tags[SEQUENCE_TAG] = self._n_published

        self._visit(self._rank * self._slots + self._n_published % self._slots, write, updated=True)

    def latest(self, rank: int, fn: Callable[[Any], int | None]) -> None:
        """Call ``fn`` with what ``rank`` published last, whole (never half of one and half of another). Local."""
        newest, most = 0, -1.0
        for slot in range(self._slots):
            number = float(self.peek(rank, slot)[SEQUENCE_TAG])
            if number > most:
                newest, most = slot, number
        self._count(rank, self._visit(rank * self._slots + newest, lambda box, _: fn(box), updated=False))

    def _visit(self, index: int, fn: Callable[[Any, np.ndarray], int | None], *, updated: bool) -> int:
        block, n_nonfinite = self._blocks.acquire(index), None
        try:
            n_nonfinite = fn(block.data, block.tags)
        finally:
            self._blocks.release(block, updated=updated)
        if n_nonfinite is not None:
            self._statistics.n_nonfinite += n_nonfinite
        return int(block.data.nbytes)

    def _count(self, rank: int, n_bytes: int) -> None:
        """A visit to another worker's mailbox is an exchange; one to its own is none."""
        if rank != self._rank:
            self._statistics.n_exchanges += 1
            self._statistics.bytes_sent += n_bytes

    def free(self) -> None:
        """Give the memory back. Collective."""
        self._blocks.free()
