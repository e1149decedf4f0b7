"""A ``Communicator`` whose workers all live in one process."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpitrain.collectives.topology.partition import split
from mpitrain.collectives.world.background import Started
from mpitrain.collectives.world.fault_tolerance import of_part
from mpitrain.collectives.world.statistics import Statistics
from mpitrain.simulation.peer_memory import Layout, SimulatedPeerMemory
from mpitrain.simulation.scheduler import Group, Scheduler


@dataclass(frozen=True)
class SimulatedPending:
    """A pending operation. Implements ``Pending``.

    Attributes:
        wait: A function that completes the operation.
    """

    wait: Callable[[], None]


class SimulatedCommunicator(SimulatedPeerMemory):
    """The ``Communicator`` of one simulated worker.

    The base class ``SimulatedPeerMemory`` has the methods that allocate and read memory. This class adds the collective
    operations and the operations in the background.

    Args:
        scheduler: The scheduler that runs the workers.
        layout: The layout of the memory of the world.
        group: The workers that this worker communicates with.
        rank: The rank of this worker in the group.
        statistics: The counters of exchanges; new ones by default.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        layout: Layout,
        group: Group,
        rank: int,
        statistics: Statistics | None = None,
    ) -> None:
        super().__init__(scheduler, layout, group, rank, statistics)
        self._counted_exchanges = self._counted_bytes = 0  # up to the last step

    @property
    def dead(self) -> frozenset[int]:
        """Workers that have died. Local."""
        return of_part(self._scheduler.dead, self._group.ranks)

    def split(self, color: int) -> SimulatedCommunicator:
        """Return a communicator of the workers that pass the same ``color``. Collective."""

        def make_groups(colors: list[int]) -> dict[int, Group]:
            members: dict[int, list[int]] = {}
            for world_rank, other in zip(self._group.ranks, colors, strict=True):
                members.setdefault(other, []).append(world_rank)
            return {color: self._scheduler.group(ranks, self._layout.nodes) for color, ranks in members.items()}

        group: Group = self._exchange(color, make_groups)[color]
        rank = bisect_left(group.ranks, self._world_rank)
        return SimulatedCommunicator(self._scheduler, self._layout, group, rank, self.statistics)

    def allreduce(self, vector: Any, *, mean: bool = False, part: slice | None = None) -> None:
        """Replace every worker's vector, or a part of it, by the sum or mean over all workers. Collective."""
        mine = vector.local if part is None else vector.local[part]
        scale = mine.dtype.type(1.0 / self.size if mean else 1.0)
        self._count_reduction(mine.nbytes)

        def add(vectors: list[np.ndarray]) -> None:
            total = vectors[0]
            for other in vectors[1:]:
                total += other
            total *= scale
            for other in vectors[1:]:
                other[...] = total

        self._exchange(mine, add, "allreduce", mine.nbytes)

    def slice_of(self, n: int) -> slice:
        """Return this worker's slice of a vector of ``n`` elements; the workers of a node divide the vector. Local."""
        node_ranks = self._group.ranks_of_nodes[self.nodes[self.rank]]
        return split(n, len(node_ranks))[bisect_left(node_ranks, self.rank)]

    def reduce_slices(self, vector: Any, fn: Callable[[slice, Sequence[Any]], object]) -> None:
        """Call ``fn(part, [total])`` with this worker's slice and the sum of all vectors in this slice. Collective."""
        self._count_reduction(vector.local.nbytes)
        total = self._exchange(
            vector.local, lambda vectors: sum(vectors[1:], vectors[0].copy()), "allreduce", vector.local.nbytes
        )
        mine = self.slice_of(vector.local.size)
        fn(mine, [total[mine].copy()])
        self.barrier()

    def start_allreduce(self, vector: Any, *, mean: bool = False) -> SimulatedPending:
        """Start an all-reduce. Collective.

        The simulation performs it when all workers have called ``wait``. Until then, the vectors must not change.
        """
        return SimulatedPending(lambda: self.allreduce(vector, mean=mean))

    def start(self, fn: Callable[[], object]) -> Started:
        """Call ``fn`` immediately, and return an operation that is already complete. Local."""
        fn()
        return Started()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until one-sided operations of others make ``condition()`` true. Local."""
        self._scheduler.wait_until(self._world_rank, condition, self._group)

    def broadcast(self, array: Any, root: int = 0) -> None:
        """Copy the root's array to the array of every worker. Collective."""
        array[...] = self._exchange(array, lambda arrays: arrays[root].copy(), "tree", array.nbytes)

    def reduce(self, array: Any, root: int = 0) -> None:
        """Replace the root's array by the sum of all workers' arrays. Collective."""
        total = self._exchange(array, lambda arrays: sum(arrays[1:], arrays[0].copy()), "tree", array.nbytes)
        if self.rank == root:
            array[...] = total

    def gather(self, values: Sequence[float]) -> np.ndarray:
        """Return a few numbers of each worker to all workers: (size, len(values)) float64. Collective."""
        mine = np.array(values, np.float64)
        gathered: np.ndarray = self._exchange(mine, np.stack, "gather", mine.nbytes)
        return gathered.copy()

    def barrier(self) -> None:
        """Wait for every worker. Collective."""
        self._exchange(None, lambda _: None, "barrier")

    def compute(self) -> None:
        """Let virtual time pass for a gradient, while other workers run. Local."""
        while self._scheduler.schedule.computing(self._world_rank):
            self._scheduler.give_way()

    def end_step(self) -> None:
        """End a local step: advance this worker's clock and let others run. Local."""
        n_exchanges, n_bytes = self.statistics.n_exchanges, self.statistics.bytes_sent
        self._scheduler.schedule.step_made(
            self._world_rank, n_exchanges - self._counted_exchanges, n_bytes - self._counted_bytes
        )
        self._counted_exchanges, self._counted_bytes = n_exchanges, n_bytes
        self._scheduler.give_way()

    def _count_reduction(self, n_bytes: int) -> None:
        """Count an all-reduce of that many bytes, of which a ring sends 2*(p - 1)/p."""
        self.statistics.n_exchanges += 1
        self.statistics.bytes_sent += 2 * (self.size - 1) * n_bytes // self.size
