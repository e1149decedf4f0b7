"""Vectors that all workers share, such as a center. One worker initializes, saves and loads them for all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mpitrain import kernels
from mpitrain.algorithms.base.peers import saves_shared_state
from mpitrain.algorithms.base.state import State
from mpitrain.collectives.communicator import Communicator


class SharedRows:
    """The rows of a shared vector, with names. Collective to create.

    Worker 0 sets the first values of the rows. In a checkpoint, only the part of the first living worker contains rows.

    If a node is lost with shards of the rows, such a shard continues from the worker that visits it first. The first
    row, and all rows that start as equal to it, get the present values of the worker's own vector, the start
    of the first row. All other rows and the tags continue with zeros.

    Args:
        comm: The communicator of the workers.
        start: The first values (n,) of each row, by the name that the row has in a checkpoint. The rows are at least
            float32.
        tags: The checkpoint entry for the tags, which are numbers stored with each shard; None to store no tags.
        counts_pulls: Whether the state includes the age of this worker's last pull of each shard: the number of updates
            by other workers since then. At first, all ages are 0.

    Attributes:
        vector: The shared vector.
    """

    def __init__(
        self, comm: Communicator, start: Mapping[str, Any], *, tags: str | None = None, counts_pulls: bool = False
    ) -> None:
        self._comm, self._names, self._tags, self._counts_pulls = comm, tuple(start), tags, counts_pulls
        like = start[self._names[0]]
        self._dtype = kernels.accumulator(like.dtype)
        self._own, self._follows = like, [values is like for values in start.values()]
        self.vector = comm.shared_vector(like.size, self._dtype, rows=len(start))
        self.vector.restart_from(self._restart)
        self._seed(start, 0)

    def empty_shard(self, like: Any) -> Any:
        """Return an empty shard in the memory (host or GPU) of ``like``; calls with it compile kernels. Local."""
        rows = len(self._names)
        return np.zeros_like(like, dtype=self._dtype, shape=(rows, 0) if rows > 1 else (0,))

    def read(self, out: Any, row: int = 0) -> None:
        """Copy a row to ``out`` (n,). Local."""
        self.vector.read(out, row)

    def write(self, values: Any, row: int = 0) -> None:
        """Replace a row by ``values`` (n,). Local; peers see it after a barrier."""
        self.vector.write(values, row)

    def state(self) -> Iterator[tuple[str, Any]]:
        """Yield the ages of this worker's pulls. On the first living worker, also yield rows and tags. Local."""
        if self._counts_pulls:
            yield "lags", self.vector.lags()
        if saves_shared_state(self._comm):
            for row, name in enumerate(self._names):
                values = np.empty(self.vector.n, self._dtype)
                self.vector.read(values, row)
                yield name, values
            if self._tags is not None:
                yield self._tags, self.vector.read_tags()

    def load(self, state: State) -> None:
        """Set the rows from worker 0's part of a checkpoint. Collective."""
        self._seed(state, state["lags"] if self._counts_pulls else None, None if self._tags is None else self._tags)

    def merge(self, parts: Sequence[State]) -> Iterator[tuple[str, Any]]:
        """Yield the rows and their tags from worker 0's part of a checkpoint. Local."""
        for name in (*self._names, *([] if self._tags is None else [self._tags])):
            yield name, parts[0][name]

    def restart(self, state: State) -> None:
        """Set the rows from the merged entries of another number of workers. Collective."""
        self._seed(state, 0, self._tags)

    def place(self, start: Any) -> None:
        """Set all rows to ``start`` (n,). Collective."""
        self._seed(dict.fromkeys(self._names, start), 0)

    def _restart(self, part: slice, shard: Any) -> None:
        """Set the values from which a lost shard continues. Local."""
        for row, follows in zip(shard if len(self._names) > 1 else [shard], self._follows, strict=True):
            if follows:
                kernels.assign(row, self._own[part])
            else:
                row[...] = 0

    def _seed(self, values: State, lags: Any, tags: str | None = None) -> None:
        if self._comm.rank == 0:
            if tags is not None:
                self.vector.write_tags(values[tags])
            for row, name in enumerate(self._names):
                self.vector.write(values[name], row)
        self._comm.barrier()
        if self._counts_pulls:
            self.vector.set_lags(lags)
            self._comm.barrier()  # before the first push, which would count as one that came after the pull
