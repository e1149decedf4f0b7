"""The communicator between MPI ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from mpi4py import MPI

from mpitrain.collectives import tree
from mpitrain.collectives.allreduce import AllReduce, PendingAllReduce
from mpitrain.collectives.background import Background, Started
from mpitrain.collectives.blocks import MPIBlocks
from mpitrain.collectives.mailboxes import Mailboxes
from mpitrain.collectives.memory import Window
from mpitrain.collectives.partition import shards
from mpitrain.collectives.shared import LARGEST_SHARD, SharedVector
from mpitrain.collectives.statistics import Statistics

if TYPE_CHECKING:
    from mpitrain.collectives.world import World


POLL_SECONDS = 20e-6
"""Between two looks at what others do: a core that another rank may need is given away meanwhile."""


class MPICommunicator:
    """Implements ``Communicator`` between the ranks of a world. Each worker is a rank."""

    def __init__(self, world: World, statistics: Statistics | None = None) -> None:
        self.world = world
        self.rank, self.size, self.nodes = world.rank, world.size, world.nodes
        self.statistics = statistics or Statistics()
        self._allreduce = AllReduce(world, self.statistics)
        self._made: list[Any] = []
        self._pending: PendingAllReduce | None = None
        self._background = Background(threads=MPI.Query_thread() == MPI.THREAD_MULTIPLE)
        self._fetched: np.ndarray | None = None

    def split(self, color: int) -> MPICommunicator:
        """A communicator of those workers that give the same ``color``. Collective."""
        part = MPICommunicator(self.world.split(color), self.statistics)
        self._made.extend((part.world, part))
        return part

    def vector(self, n: int, dtype: Any) -> Window:
        """A vector of zeros that peers can read. Collective."""
        window = Window(self.world, n, dtype)
        self._allreduce.prepare(window)
        self._made.append(window)
        return window

    def node_vector(self, n: int, dtype: Any) -> Window:
        """A vector of zeros that peers can read; the workers of a node have one between them. Collective."""
        window = Window(self.world, n, dtype, one_a_node=True)
        self._made.append(window)
        return window

    def read(self, vector: Any, peer: int, fn: Callable[[Any], object]) -> None:
        """Call ``fn`` with the peer's vector as it is now. Local; not counted as an exchange."""
        memory = vector.of(peer)
        if memory is not None:
            vector.sync()
            fn(memory)
            return
        if self._fetched is None or self._fetched.size < vector.local.nbytes:
            self._fetched = np.empty(vector.local.nbytes, np.uint8)
        fetched = self._fetched[: vector.local.nbytes].view(vector.dtype)
        vector.get(peer, fetched)
        vector.flush(peer)
        self.statistics.wire_bytes += vector.local.nbytes
        fn(fetched)

    def shared_vector(self, n: int, dtype: Any, rows: int = 1) -> SharedVector:
        """One vector for all workers, zeros, sharded over them; or several, changed together. Collective."""
        parts = shards(n, self.size, LARGEST_SHARD)
        blocks = MPIBlocks(self.world, [s.owner for s in parts], [rows * s.size for s in parts], dtype, self.statistics)
        self._made.append(blocks)
        return SharedVector(blocks, self.rank, self.size, self.statistics, rows)

    def mailboxes(self, n: int, dtype: Any, slots: int = 1) -> Mailboxes:
        """Vectors at every worker that others read or change under their locks. Collective."""
        homes = [rank for rank in range(self.size) for _ in range(slots)]
        blocks = MPIBlocks(self.world, homes, [n] * len(homes), dtype, self.statistics)
        self._made.append(blocks)
        return Mailboxes(blocks, self.rank, slots, self.statistics)

    def allreduce(self, vector: Any, *, mean: bool = False) -> None:
        """Replace every worker's vector by the sum (or mean) of all; the same bits everywhere. Collective."""
        self._allreduce(vector, scale=1.0 / self.size if mean else 1.0)

    def slice_of(self, n: int) -> slice:
        """This worker's part of a vector of ``n`` elements. Local."""
        return self._allreduce.slice_of(n)

    def reduce_slices(self, vector: Any, fn: Callable[[slice, Sequence[Any]], object]) -> None:
        """Give each worker what adds up to the sum of all workers' vectors in its part. Collective."""
        self._allreduce.reduce_slices(vector, fn)

    def start_allreduce(self, vector: Any, *, mean: bool = False) -> PendingAllReduce:
        """Begin an all-reduce that goes on in the background. Collective."""
        self._pending = PendingAllReduce(self.world, vector, 1.0 / self.size if mean else 1.0, self.statistics)
        return self._pending

    def start(self, fn: Callable[[], object]) -> Started:
        """Begin ``fn`` in the background. Local."""
        return self._background.start(fn)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until something that others do makes ``condition()`` true. Local."""
        if condition():
            return
        began = time.perf_counter()
        while not condition():
            self.world.comm.Iprobe()  # progress, for MPIs whose one-sided operations wait for it
            time.sleep(POLL_SECONDS)
        self.statistics.wait_seconds += time.perf_counter() - began

    def broadcast(self, array: Any, root: int = 0) -> None:
        """Copy the root's array to every worker's. Collective."""
        tree.broadcast(self.world, array, root)

    def reduce(self, array: Any, root: int = 0) -> None:
        """Sum every worker's array into the root's; the others' are spent. Collective."""
        tree.reduce(self.world, array, root)

    def gather(self, values: Sequence[float]) -> np.ndarray:
        """A few numbers of each worker, to all: (size, len(values)) float64. Collective."""
        mine = np.asarray(values, np.float64)
        all_values = np.empty((self.size, mine.size))
        self.world.comm.Allgather(mine, all_values)
        return all_values

    def barrier(self) -> None:
        """Wait for every worker. Collective."""
        began = time.perf_counter()
        self.world.comm.Barrier()
        self.statistics.wait_seconds += time.perf_counter() - began

    def free(self) -> None:
        """Give back everything that was made here. Collective."""
        self._background.stop()
        if self._pending is not None:
            self._pending.finish()  # MPI still writes to memory that goes now
            self._pending = None
        for made in reversed(self._made):
            made.free()
        self._made.clear()
        self._allreduce.free()
