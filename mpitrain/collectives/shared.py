"""One vector for all workers (the center), sharded over them so that no rank is a server.

Each shard is a parameter server of its own: a read-modify-write of it is atomic and ordered. The whole vector is not
(two workers may visit different shards at once, in different orders), which is what every sharded server does, and
what the methods allow: they are elementwise. Every worker begins at a different shard, so that two seldom meet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mpitrain.collectives.blocks import Blocks
from mpitrain.collectives.partition import visiting_order
from mpitrain.collectives.statistics import Statistics

LARGEST_SHARD = 1 << 19
"""Elements. Large enough that its lock costs nothing beside its bytes, small enough that nobody waits for long."""


class SharedVector:
    """A vector of ``n`` elements that all workers update. Made by ``Communicator.shared_vector``.

    Args:
        blocks: One block a shard, in the order of the vector.
        rank: This worker.
        size: How many there are.
        statistics: Where exchanges, staleness and rejected elements are counted.
    """

    def __init__(self, blocks: Blocks, rank: int, size: int, statistics: Statistics) -> None:
        self._blocks = blocks
        self._statistics = statistics
        ends = np.cumsum(blocks.lengths)
        self.parts = [slice(int(end) - n, int(end)) for end, n in zip(ends, blocks.lengths, strict=True)]
        self.n = sum(blocks.lengths)
        self._rank = rank
        self._order = visiting_order(len(self.parts), rank, size)
        # The version of each shard after this worker's own last update; None before the first.
        self._seen: list[int | None] = [None] * len(self.parts)

    def update(self, fn: Callable[[slice, Any], int | None]) -> None:
        """Change the vector in place, shard by shard, each under its lock. Local.

        Args:
            fn: Called with where a shard lies in the vector and the shard's array. What it returns is counted as
                rejected elements.
        """
        self._statistics.n_exchanges += 1
        for k, index in enumerate(self._order):
            block = self._blocks.acquire(index)
            try:
                self._statistics.n_rejected += fn(self.parts[index], block.data) or 0
            finally:
                self._blocks.release(block, updated=True)
            self._statistics.bytes_sent += 2 * block.data.nbytes  # pulled and pushed
            seen = self._seen[index]
            if k == 0 and seen is not None:
                self._statistics.record_staleness(block.version - seen)
            self._seen[index] = block.version + 1

    def read(self, out: Any) -> None:
        """Copy the vector to ``out`` (n,), each shard as it was at one moment. Local; not counted as an exchange."""
        for index in self._order:
            block = self._blocks.acquire(index)
            try:
                out[self.parts[index]] = block.data
            finally:
                self._blocks.release(block, updated=False)

    def write(self, values: Any) -> None:
        """Replace the vector by ``values`` (n,), shard by shard. Local; a barrier makes it everybody's."""
        for index in self._order:
            block = self._blocks.acquire(index)
            try:
                block.data[...] = values[self.parts[index]]
            finally:
                self._blocks.release(block, updated=True)

    def free(self) -> None:
        """Give the memory back. Collective."""
        self._blocks.free()
