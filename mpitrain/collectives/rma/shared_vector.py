"""One vector for all workers (the center), sharded over them, so that no rank is a server.

Each shard is a parameter server of its own: a read-modify-write of a shard is atomic and ordered. One of the whole
vector is not, since two workers may visit different shards at once, in different orders. This holds for every sharded
server, and it is no problem for the methods, because they work elementwise. Each worker begins with a different shard,
so that two of them seldom meet.
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
"""Elements. Large enough for the cost of the lock to vanish, small enough to keep waits short."""

SMALLEST_SHARD = 1 << 14
"""Elements of a share of a rank in memory that its node shares, at least. A visit to a shard costs some microseconds,
which is the time that a pass over this many elements takes.
"""

SAMPLE = 1024
"""Elements from which the movement of a vector is estimated; measuring all of them would cost another pass."""


class SharedVector:
    """A vector of ``n`` elements that all workers update, in shards. Created by ``Communicator.shared_vector``.

    It may have several rows that are updated together under the same locks, for example a center and its velocity. It
    is then an array (rows, n), and a shard is (rows, length).

    Args:
        blocks: The blocks, one per shard, in the order of the vector.
        rank: The rank of this worker.
        size: The number of workers.
        statistics: The counters of exchanges, staleness and non-finite elements.
        rows: The number of rows.
        first: The worker whose shards this worker visits first; by default itself. ``(first - rank) % size`` should be
            the same for all workers, so that no two workers begin with the same shard.

    Attributes:
        parts: (shards,) the slice of each shard.
        homes: (shards,) the rank whose memory contains each shard.
        staleness: Inside ``fn`` of ``update``, the number of updates of this shard by others since this worker's last
            pull. It is 0 before the first pull.
        tags: Inside ``fn`` of ``update``, the numbers (N_TAGS,) that belong to the shard. ``fn`` may change them in
            place.
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
    ) -> None:
        self._blocks = blocks
        self._statistics = statistics
        self._rows = rows
        lengths = [length // rows for length in blocks.lengths]
        ends = np.cumsum(lengths)
        self.parts = [slice(int(end) - n, int(end)) for end, n in zip(ends, lengths, strict=True)]
        self.homes = blocks.homes
        self.n = sum(lengths)
        self.staleness = 0
        self.tags = np.zeros(N_TAGS)
        self._order = visiting_order(len(self.parts), rank if first is None else first, size)
        self._sampled = self._order[0] if self._order else -1  # the shard that movement and staleness are recorded of
        # The version of each shard after this worker's last pull, None before the first one.
        self._seen: list[int | None] = [None] * len(self.parts)
        self._movement = _Movement(self.n)
        self._has_pushed = False  # since the last pull
        self._first_values: Callable[[slice, Any], object] | None = None
        blocks.watch_restarts(self._restart)

    def restart_from(self, first_values: Callable[[slice, Any], object]) -> None:
        """Set the values from which a shard continues if its node is lost; by default zeros. Local.

        Args:
            first_values: Called with the slice and the array of such a shard, which it fills. Only the first worker
                that visits the shard afterwards calls it.
        """
        self._first_values = first_values

    def _restart(self, block: Block, is_empty: bool) -> None:
        """Continue with a shard whose versions and values have begun anew."""
        self._seen[block.index] = None
        if is_empty and self._first_values is not None:
            self._first_values(self.parts[block.index], self._rows_of(block.data))

    def update(self, fn: Callable[[slice, Any], int | None], *, pushes: bool = True, pulls: bool = True) -> None:
        """Visit the shards in place, each under its lock. Local.

        Between nodes, shards may be sent in the wire format. All other methods are exact.

        Args:
            fn: Called with the slice and the array of a shard. It returns the number of non-finite elements.
            pushes: Whether ``fn`` changes the shard. If so, the staleness of the visit is recorded.
            pulls: Whether ``fn`` copies the values of the shard. Staleness is counted from the last visit with
                ``pulls``.
        """
        # A visit to a short vector takes some microseconds, of which each line here is a part.
        statistics, sampled, all_seen = self._statistics, self._sampled, self._seen
        statistics.n_exchanges += 1
        n_transfers = pushes + pulls
        first_staleness: int | None = None
        for locked in self._blocks.visit(self._order, updated=pushes, encoded=True):
            with locked as block:
                index, data = block.index, block.data
                seen, self.tags = all_seen[index], block.tags
                self.staleness = staleness = 0 if seen is None else block.version - seen
                if index == sampled and pushes and seen is not None:
                    first_staleness = staleness
                    if staleness or self._has_pushed:
                        self._movement.record_found(data)
                n_nonfinite = fn(self.parts[index], data if self._rows == 1 else self._rows_of(data))
                if index == sampled and pulls:
                    self._movement.record_left(data)
            # Others may wait for the lock; the rest does not need it.
            if n_nonfinite is not None:
                statistics.n_nonfinite += n_nonfinite
            statistics.bytes_sent += n_transfers * data.nbytes
            if pulls:
                all_seen[index] = block.version + pushes
            elif seen is not None:
                all_seen[index] = seen + pushes  # this worker's own updates do not count as staleness
        # The samples of a GPU have arrived once all shards are released.
        if first_staleness is not None:
            is_unchanged = not first_staleness and not self._has_pushed
            statistics.record_staleness(first_staleness, 0.0 if is_unchanged else self._movement.distance())
        if pulls:
            self._has_pushed = False
            self._movement.advance()
        elif pushes:
            self._has_pushed = True

    def read(self, out: Any, row: int = 0) -> None:
        """Copy a row to ``out`` (n,), each shard under its lock. Local; not counted as an exchange."""
        for locked in self._blocks.visit(self._order, updated=False):
            with locked as block:
                index = block.index
                assign(out[self.parts[index]], block.data if self._rows == 1 else self._rows_of(block.data)[row])

    def write(self, values: Any, row: int | None = None) -> None:
        """Replace a row, or all rows, by ``values`` (n,), shard by shard. Local; others see them after a barrier."""
        for locked in self._blocks.visit(self._order, updated=True):
            with locked as block:
                index = block.index
                shard = self._rows_of(block.data)
                assign(shard if self._rows == 1 or row is None else shard[row], values[self.parts[index]])

    def lags(self) -> np.ndarray:
        """Return the age of this worker's last pull of each shard, for a checkpoint. Local.

        Returns:
            (shards,) the number of updates by others since this worker's last pull; -1 before the first pull.
        """
        lags = np.full(len(self.parts), -1.0)
        for locked in self._blocks.visit(self._order, updated=False):
            with locked as block:
                index = block.index
                seen = self._seen[index]
                if seen is not None:
                    lags[index] = block.version - seen
        return lags

    def set_lags(self, lags: Any) -> None:
        """Restore the age of the last pull of each shard, as returned by ``lags()``. Local.

        Args:
            lags: (shards,) the ages, or one number for all shards. If they were saved with another number of shards,
                each shard gets the age of the shard that was at its place. The number of ranks must be the same.
        """
        lags = self._for_these_shards(np.atleast_1d(lags))
        for locked in self._blocks.visit(self._order, updated=False):
            with locked as block:
                index = block.index
                self._seen[index] = None if lags[index] < 0 else block.version - int(lags[index])

    def read_tags(self) -> np.ndarray:
        """Return the tags (shards, N_TAGS) of all shards. Local."""
        tags = np.zeros((len(self.parts), N_TAGS))
        for locked in self._blocks.visit(self._order, updated=False):
            with locked as block:
                index = block.index
                tags[index] = block.tags
        return tags

    def write_tags(self, tags: Any) -> None:
        """Replace the tags of all shards. Local; others see them after a barrier.

        Args:
            tags: (shards, N_TAGS) the tags. If they were saved with another number of shards, each shard gets the
                tags of the shard that was at its place. The number of ranks must be the same.
        """
        tags = self._for_these_shards(np.asarray(tags))
        for locked in self._blocks.visit(self._order, updated=True):
            with locked as block:
                index = block.index
                block.tags[:] = tags[index]

    def _for_these_shards(self, values: np.ndarray) -> np.ndarray:
        """Return for each shard the value of the shard that was there when they were saved, maybe in another size.

        Every rank must have the same number of shards.
        """
        n = len(self.parts)
        return values[np.arange(n) * len(values) // n] if n else values

    def _rows_of(self, shard: Any) -> Any:
        """Return a shard as an array (rows, length), or (length,) if there is one row."""
        return shard if self._rows == 1 else shard.reshape(self._rows, -1)

    def free(self) -> None:
        """Free the memory. Collective."""
        self._blocks.free()


class _Movement:
    """How far a vector has moved since this worker left it, estimated from a sample of its first visited shard.

    Args:
        n: Elements of the whole vector.
    """

    def __init__(self, n: int) -> None:
        self._n = n
        self._size = -1  # not allocated yet
        self._found = self._left = self._reference = self._difference = np.zeros(0)
        self._on_gpu = False
        self._shard: Any = None  # the last shard that was left, and its sample
        self._view = np.zeros(0)

    def record_found(self, shard: Any) -> None:
        """Copy the sample before the worker changes it. A sample from a GPU arrives by the release of the shard."""
        if self._size < 0:
            self._allocate(shard)
        self._copy(self._found, shard)

    def record_left(self, shard: Any) -> None:
        """Copy the sample after the worker has changed it. A sample from a GPU arrives by the release of the shard."""
        if shard is self._shard:  # in place on the node: the same array at each visit
            self._left[...] = self._view
            return
        if self._size < 0:
            self._allocate(shard)
        if not self._on_gpu:
            self._shard, self._view = shard, shard[: self._size]
        self._copy(self._left, shard)

    def advance(self) -> None:
        """Make the sample that was left the reference of the next visit."""
        self._left, self._reference = self._reference, self._left

    def distance(self) -> float:
        """Return the estimated Euclidean distance of the whole vector; exact if the sample is the whole vector."""
        difference = np.subtract(self._found, self._reference, out=self._difference)
        return math.sqrt(self._n / max(self._size, 1) * difference.dot(difference))

    def _allocate(self, shard: Any) -> None:
        self._size, self._on_gpu = min(shard.size, SAMPLE), gpu.is_device(shard)
        self._difference = np.zeros(self._size)
        if self._on_gpu:
            samples = [gpu.current().page_locked(self._size, shard.dtype) for _ in range(3)]
        else:
            # A copy without a conversion takes half the time; NumPy cannot subtract all 16-bit types.
            dtype = shard.dtype if shard.dtype.itemsize >= 4 else np.dtype(np.float64)
            samples = [np.zeros(self._size, dtype) for _ in range(3)]
        self._found, self._left, self._reference = samples

    def _copy(self, to: np.ndarray, shard: Any) -> None:
        if self._on_gpu:
            gpu.current().copy(to, shard[: self._size])
        else:
            to[...] = shard[: self._size]
