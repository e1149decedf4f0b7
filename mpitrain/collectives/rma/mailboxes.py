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

    def prepare(self, like: Any) -> None:
        """Compile what ``post`` and ``average`` need for vectors such as ``like`` (n,), before the first exchange."""
        self._blocks.prepare(like)

    def average(self, rank: int, x: Any, own: float, weight: float | None = None, slot: int = 0) -> float:
        """Replace x by its weighted average with a worker's mailbox, (own*x + weight*z)/(own + weight). Local.

        Args:
            rank: The worker.
            x: (n,) this worker's vector. Its elements do not change where those of the mailbox are not finite.
            own: The weight of x.
            weight: The weight of the mailbox; by default its tag ``WEIGHT_TAG``.
            slot: The index of the mailbox's vector.

        Returns:
            The weight of the mailbox; 0 if it is lost.
        """
        try:
            weight, n_nonfinite = self._blocks.average(rank * self._slots + slot, x, own, weight)
        except RankFailed:
            return 0.0
        self._statistics.n_nonfinite += n_nonfinite
        self._count(rank, x.nbytes)
        return weight

    def receive(self, rank: int, fn: Callable[[Any, np.ndarray], int | None], slot: int = 0) -> None:
        """Call ``fn`` with a worker's mailbox and its tags; ``fn`` must not change them. Local."""
        self._count(rank, self._visit(rank * self._slots + slot, fn, updated=False))

    def read(self, rank: int, fn: Callable[[Any, np.ndarray], object], slot: int = 0) -> None:
        """Call ``fn`` like ``receive``, for evaluation and checkpoints. Local; not counted as an exchange."""
        with suppress(RankFailed), self._blocks.locked(rank * self._slots + slot, updated=False) as block:
            fn(block.data, block.tags)

    def peek(self, rank: int, slot: int = 0) -> np.ndarray:
        """Return the tags (N_TAGS,) of a mailbox without locking it. Local.

        The array may be that of the mailbox itself, which others change, or a copy that the next call overwrites.
        """
        return self._blocks.peek_tags(rank * self._slots + slot)

    def post(self, values: Any | None, tags: np.ndarray, slot: int = 0) -> None:
        """Replace the vector and the tags of a mailbox of this worker. Local.

        Args:
            values: (n,) the vector; None to leave it as it is.
            tags: (N_TAGS,) float64.
            slot: The index of the vector.
        """
        self._blocks.write(self._rank * self._slots + slot, values, tags)

    def publish(self, values: Any) -> None:
        """Publish ``values`` (n,) by writing them to the older of two slots. Local."""
        self._n_published += 1
        tags = np.zeros(N_TAGS)
        tags[SEQUENCE_TAG] = self._n_published
        self.post(values, tags, self._n_published % self._slots)

    def latest(self, rank: int, fn: Callable[[Any], int | None]) -> None:
        """Call ``fn`` with the newest vector that ``rank`` has published, never a mix of two vectors. Local."""
        newest, most = 0, -1.0
        for slot in range(self._slots):
            number = -1.0
            with suppress(RankFailed):
                number = float(self.peek(rank, slot)[SEQUENCE_TAG])
            if number > most:
                newest, most = slot, number
        self._count(rank, self._visit(rank * self._slots + newest, lambda box, _: fn(box), updated=False))

    def _visit(self, index: int, fn: Callable[[Any, np.ndarray], int | None], *, updated: bool) -> int:
        """Call ``fn`` under a mailbox's lock and return the size of the mailbox."""
        try:
            with self._blocks.locked(index, updated=updated) as block:
                data = block.data
                n_nonfinite = fn(data, block.tags)
            if n_nonfinite is not None:
                self._statistics.n_nonfinite += n_nonfinite
        except RankFailed:
            return 0
        return int(data.nbytes)

    def _count(self, rank: int, n_bytes: int) -> None:
        """Count an exchange if the mailbox is another worker's."""
        if rank != self._rank:
            self._statistics.n_exchanges += 1
            self._statistics.bytes_sent += n_bytes

    def free(self) -> None:
        """Free the memory. Collective."""
        self._blocks.free()
