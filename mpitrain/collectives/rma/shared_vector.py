"""One vector for all workers (the center), sharded over them so that no rank is a server.

Each shard is a parameter server of its own: a read-modify-write of it is atomic and ordered. The whole vector is not
(two workers may visit different shards at once, in different orders), which is what every sharded server does, and
what the methods allow: they are elementwise. Every worker begins at a different shard, so that two seldom meet.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from mpitrain.collectives.rma.blocks import N_TAGS, Block, Blocks
from mpitrain.collectives.topology.partition import visiting_order
from mpitrain.collectives.world.statistics import Statistics
from mpitrain.kernels import gpu
from mpitrain.kernels.gpu import assign

LARGEST_SHARD = 1 << 19
"""Elements. Large enough that its lock costs nothing beside its bytes, small enough that nobody waits for long."""


SAMPLE = 1024
"""Elements from which the distance that a vector has moved is estimated: measuring all would cost another pass."""


class SharedVector:
    """A vector of ``n`` elements that all workers update. Made by ``Communicator.shared_vector``.

    A vector of several rows holds what is changed together, under the same locks: a center and its velocity, say. It is
    then an array (rows, n), and a shard is (rows, length).

    Args:
        blocks: One block a shard, in the order of the vector.
        rank: This worker.
        size: How many there are.
        statistics: Where exchanges, staleness and rejected elements are counted.
        rows: Vectors that lie side by side in each shard.
        first: The worker whose shards this one visits first; itself if it is not given. It should be as far ahead of
            this one for all workers, so that no two begin with the same.
        acquire: Has a shard for ``update``, maybe in fewer bytes; ``blocks.acquire`` if it is not given. All other
            visits are exact.

    Attributes:
        staleness: Inside ``fn`` of ``update``: how many updates of this shard by others lie between this worker's last
            pull of it and now; 0 before the first pull.
        tags: Inside ``fn`` of ``update``: (N_TAGS,) numbers that belong to the shard, to be changed in place.
    """

    def __init__(
        self,
        blocks: Blocks,
        rank: int,
        size: int,
        statistics: Statistics,
        rows: int = 1,
        *,
        first: int | None = None,
        acquire: Callable[[int, int | None], Block] | None = None,
    ) -> None:
        self._blocks = blocks
        self._acquire = acquire or blocks.acquire
        self._statistics = statistics
        self._rows = rows
        lengths = [length // rows for length in blocks.lengths]
        ends = np.cumsum(lengths)
        self.parts = [slice(int(end) - n, int(end)) for end, n in zip(ends, lengths, strict=True)]
        self.n = sum(lengths)
        self.staleness = 0
        self.tags = np.zeros(N_TAGS)
        self._order = visiting_order(len(self.parts), rank if first is None else first, size)
        self._steps = list(zip(self._order, [*self._order[1:], None]))  # and the next
        # The version of each shard after this worker's last pull of it; None before the first.
        self._seen: list[int | None] = [None] * len(self.parts)
        self._sample = _Sample(self.n)

    def update(self, fn: Callable[[slice, Any], int | None], *, pushes: bool = True, pulls: bool = True) -> None:
        """Visit the vector in place, shard by shard, each under its lock. Local.

        Args:
            fn: Called with where a shard lies in the vector and the shard's array. What it returns is counted as
                rejected elements.
            pushes: Whether ``fn`` changes the shard. The staleness of a visit that does is recorded.
            pulls: Whether ``fn`` takes the shard's values along: staleness counts from the last such visit.
        """
        self._statistics.n_exchanges += 1
        first_staleness: int | None = None
        for k, (index, prefetch) in enumerate(self._steps):
            block = self._acquire(index, prefetch)
            try:
                seen, self.tags = self._seen[index], block.tags
                self.staleness = 0 if seen is None else block.version - seen
                if k == 0 and pushes and seen is not None:
                    first_staleness = self.staleness
                    self._sample.find(block.data)
                n_nonfinite = fn(self.parts[index], self._array(block))
                if k == 0 and pulls:
                    self._sample.leave(block.data)
            except BaseException:
                self._give_up(block, prefetch, updated=pushes)
                raise
            self._blocks.release(block, updated=pushes)
            # The rest needs no lock, for which others may wait.
            if n_nonfinite is not None:
                self._statistics.n_nonfinite += n_nonfinite
            self._statistics.bytes_sent += (pushes + pulls) * block.data.nbytes
            if pulls:
                self._seen[index] = block.version + pushes
            elif seen is not None:
                self._seen[index] = seen + pushes  # its own updates are not those of others
        # What a GPU has found is known when all shards have been given back.
        if first_staleness is not None:
            self._statistics.record_staleness(first_staleness, self._sample.distance())
        if pulls:
            self._sample.advance()

    def read(self, out: Any, row: int = 0) -> None:
        """Copy a row to ``out`` (n,), each shard as it was at one moment. Local; not counted as an exchange."""

        def copy(index: int, shard: Any, _: Block) -> None:
            assign(out[self.parts[index]], shard if self._rows == 1 else shard[row])

        self._visit(copy, updated=False)

    def write(self, values: Any, row: int | None = None) -> None:
        """Replace a row, or all of them, by ``values`` (n,), shard by shard. Local; a barrier makes it everybody's."""

        def fill(index: int, shard: Any, _: Block) -> None:
            assign(shard if self._rows == 1 or row is None else shard[row], values[self.parts[index]])

        self._visit(fill, updated=True)

    def lags(self) -> np.ndarray:
        """(shards,) how many updates of others each shard has seen since this worker's last pull; -1 before it. Local.

        For checkpoints: ``set_lags`` puts them back.
        """
        lags = np.full(len(self.parts), -1.0)

        def note(index: int, _: Any, block: Block) -> None:
            seen = self._seen[index]
            if seen is not None:
                lags[index] = block.version - seen

        self._visit(note, updated=False)
        return lags

    def set_lags(self, lags: Any) -> None:
        """As if each shard's last pull had been ``lags`` (shards,) updates ago: 0 is now; of as many ranks. Local."""
        lags = self._for_these_shards(np.atleast_1d(lags))

        def note(index: int, _: Any, block: Block) -> None:
            self._seen[index] = None if lags[index] < 0 else block.version - int(lags[index])

        self._visit(note, updated=False)

    def read_tags(self) -> np.ndarray:
        """(shards, N_TAGS) the numbers of all shards. Local."""
        tags = np.zeros((len(self.parts), N_TAGS))

        def copy(index: int, _: Any, block: Block) -> None:
            tags[index] = block.tags

        self._visit(copy, updated=False)
        return tags

    def write_tags(self, tags: Any) -> None:
        """Replace the numbers of all shards by ``tags`` (shards, N_TAGS). Local; a barrier makes it everybody's.

        Args:
            tags: Of this vector, or of one of as many ranks that were spread over the nodes in another way.
        """
        tags = self._for_these_shards(np.asarray(tags))

        def fill(index: int, _: Any, block: Block) -> None:
            block.tags[:] = tags[index]

        self._visit(fill, updated=True)

    def _for_these_shards(self, values: np.ndarray) -> np.ndarray:
        """What was said of shards that may have been larger or smaller, with as many at each rank as at another."""
        n = len(self.parts)
        return values[np.arange(n) * len(values) // n] if n else values

    def _visit(self, fn: Callable[[int, Any, Block], None], *, updated: bool) -> None:
        for index, prefetch in self._steps:
            block = self._blocks.acquire(index, prefetch)
            try:
                fn(index, self._array(block), block)
            except BaseException:
                self._give_up(block, prefetch, updated=updated)
                raise
            self._blocks.release(block, updated=updated)

    def _give_up(self, block: Block, prefetch: int | None, *, updated: bool) -> None:
        """End a visit early: the next block may have set out already."""
        try:
            self._blocks.release(block, updated=updated)
        finally:
            if prefetch is not None:
                self._blocks.release(self._blocks.acquire(prefetch), updated=False)

    def _array(self, block: Block) -> Any:
        return block.data if self._rows == 1 else block.data.reshape(self._rows, -1)

    def free(self) -> None:
        """Give the memory back. Collective."""
        self._blocks.free()


class _Sample:
    """A few elements of the first shard that a worker visits: as it found them, and as it left them last time.

    Args:
        n: Elements of the whole vector.
    """

    def __init__(self, n: int) -> None:
        self._n = n
        self._size = -1  # there is no room yet
        self._found = self._left = self._reference = self._moved = np.zeros(0)
        self._on_gpu = False

    def find(self, shard: Any) -> None:
        """Note them as they are now. What lies on a GPU is only there when the shard has been given back."""
        if self._size < 0:
            self._allocate(shard)
        self._copy(self._found, shard)

    def leave(self, shard: Any) -> None:
        """The same when the worker has changed them."""
        if self._size < 0:
            self._allocate(shard)
        self._copy(self._left, shard)

    def advance(self) -> None:
        """What was left is what the next visit is compared with."""
        self._left, self._reference = self._reference, self._left

    def distance(self) -> float:
        """The Euclidean distance that the whole vector had moved meanwhile; exact if the sample is all of it."""
        moved = np.subtract(self._found, self._reference, out=self._moved)
        return math.sqrt(self._n / max(self._size, 1) * moved.dot(moved))

    def _allocate(self, shard: Any) -> None:
        self._size, self._on_gpu = min(shard.size, SAMPLE), gpu.is_device(shard)
        self._moved = np.zeros(self._size)
        if self._on_gpu:
            staging_buffers = [gpu.current().page_locked(self._size, shard.dtype) for _ in range(3)]
        else:
            staging_buffers = [np.zeros(self._size) for _ in range(3)]
        self._found, self._left, self._reference = staging_buffers

    def _copy(self, to: np.ndarray, shard: Any) -> None:
        if self._on_gpu:
            gpu.current().copy(to, shard[: self._size])
        else:
            to[...] = shard[: self._size]
