"""Mailboxes: vectors at every worker, which other workers read, or in which they leave messages.

A mailbox is lost with the node of its worker. Visits to it then have no effect: no function is called.

A mailbox is read and changed as a whole, under one lock, together with its tags. Two slots make a double buffer:
``publish`` writes the older one while others read the newer one, so that neither waits for the other.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from mpitrain.collectives.rma.blocks import N_TAGS, Blocks
from mpitrain.collectives.world.statistics import Statistics
from mpitrain.errors import RankFailed
from mpitrain.kernels.gpu import assign

SEQUENCE_TAG = 0
"""The tag that numbers the published vectors; the newer slot has the larger number."""


class Mailboxes:
    """Mailboxes: ``slots`` vectors of ``n`` elements at each worker. Created by ``Communicator.mailboxes``.

    Args:
        blocks: The blocks. Block ``rank * slots + slot`` is slot ``slot`` of worker ``rank``.
        rank: The rank of this worker.
        slots: The number of vectors per worker.
        statistics: The counters of exchanges and non-finite elements.
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
            fn: Called with the array (n,) and the tags (N_TAGS,) float64 of the mailbox, to change both in place. It
                returns the number of non-finite elements that it has found. It may visit another mailbox; to avoid a
                deadlock, the mailbox of the lower rank must be visited first.
            slot: The index of the vector.
            pulls: Whether ``fn`` also copies the values of the mailbox. The visit then counts as an exchange of two
                vectors.
        """
        n_bytes = self._visit(rank * self._slots + slot, fn, updated=True)
        self._count(rank, 2 * n_bytes if pulls else n_bytes)

    def receive(self, rank: int, fn: Callable[[Any, np.ndarray], int | None], slot: int = 0) -> None:
        """Call ``fn`` with a worker's mailbox and its tags; ``fn`` must not change them. Local."""
        self._count(rank, self._visit(rank * self._slots + slot, fn, updated=False))

    def read(self, rank: int, fn: Callable[[Any, np.ndarray], object], slot: int = 0) -> None:
        """Call ``fn`` like ``receive``, for evaluation and checkpoints. Local; not counted as an exchange."""
        with suppress(RankFailed), self._blocks.locked(rank * self._slots + slot, updated=False) as block:
            fn(block.data, block.tags)

    def peek(self, rank: int, slot: int = 0) -> np.ndarray:
        """Return the tags (N_TAGS,) of a mailbox without locking it. Local; the next call overwrites the result."""
        self._blocks.peek_tags(rank * self._slots + slot, self._peeked)
        return self._peeked

    def publish(self, values: Any) -> None:
        """Publish ``values`` (n,) by writing them to the older of two slots. Local."""
        self._n_published += 1
        slot = self._n_published % self._slots
        with self._blocks.locked(self._rank * self._slots + slot, updated=True) as block:
            assign(block.data, values)
            block.tags[SEQUENCE_TAG] = self._n_published

    def latest(self, rank: int, fn: Callable[[Any], int | None]) -> None:
        """Call ``fn`` with the newest vector that ``rank`` has published, never a mix of two vectors. Local."""
        newest, most = 0, -1.0
        for slot in range(self._slots):
            with suppress(RankFailed):
                self.peek(rank, slot)
            number = float(self._peeked[SEQUENCE_TAG])
            if number > most:
                newest, most = slot, number
        self._count(rank, self._visit(rank * self._slots + newest, lambda box, _: fn(box), updated=False))

    def _visit(self, index: int, fn: Callable[[Any, np.ndarray], int | None], *, updated: bool) -> int:
        """Call ``fn`` under a mailbox's lock and return the size of the mailbox."""
        n_bytes = 0
        with suppress(RankFailed), self._blocks.locked(index, updated=updated) as block:
            n_nonfinite, n_bytes = fn(block.data, block.tags), int(block.data.nbytes)
            if n_nonfinite is not None:
                self._statistics.n_nonfinite += n_nonfinite
        return n_bytes

    def _count(self, rank: int, n_bytes: int) -> None:
        """Count an exchange if the mailbox is another worker's."""
        if rank != self._rank:
            self._statistics.n_exchanges += 1
            self._statistics.bytes_sent += n_bytes

    def free(self) -> None:
        """Free the memory. Collective."""
        self._blocks.free()
