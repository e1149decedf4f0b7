"""A ``Communicator`` whose workers all live in one process."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpitrain.collectives.rma.mailboxes import Mailboxes
from mpitrain.collectives.rma.shared_vector import LARGEST_SHARD, SMALLEST_SHARD, SharedVector
from mpitrain.collectives.topology.partition import shards, split
from mpitrain.collectives.world.background import Started
from mpitrain.collectives.world.fault_tolerance import of_part
from mpitrain.collectives.world.statistics import Statistics
from mpitrain.simulation.memory import BlockMemory, SimulatedBlocks, SimulatedVector
from mpitrain.simulation.scheduler import Group, Scheduler


@dataclass(frozen=True)
class Layout:
    """How the memory of a simulated world is divided.

    Args:
        nodes: (size,) the node of each worker.
        largest_shard: The most elements in a shard; small shards let a small vector have many of them.
        smallest_shard: The least elements in the share of an owner, where there are fewer owners than workers.
        interleave_locks: Give way before every lock, so that the visits of two workers to the shards of a vector
            interleave as they do between ranks.
    """

    nodes: tuple[int, ...]
    largest_shard: int = LARGEST_SHARD
    smallest_shard: int = SMALLEST_SHARD
    interleave_locks: bool = False


@dataclass(frozen=True)
class SimulatedPending:
    """A pending operation. Implements ``Pending``.

    Attributes:
        wait: Completes the operation.
    """

    wait: Callable[[], None]


class SimulatedCommunicator:
    """Implements ``Communicator`` for one simulated worker.

    Args:
        scheduler: Runs the workers.
        layout: Of the world's memory.
        group: The workers that this one communicates with.
        rank: Its rank in the group.
        statistics: Counters to add to; new ones by default.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        layout: Layout,
        group: Group,
        rank: int,
        statistics: Statistics | None = None,
    ) -> None:
        self.rank, self.size = rank, len(group.ranks)
        self.nodes = group.nodes
        self.statistics = statistics or Statistics()
        self._scheduler, self._layout, self._group = scheduler, layout, group
        self._world_rank = group.ranks[rank]
        self._counted_exchanges = self._counted_bytes = 0  # up to the last step

    @property
    def dead(self) -> frozenset[int]:
        """Workers that have died. Local."""
        return of_part(self._scheduler.dead, self._group.ranks)

    def split(self, color: int) -> SimulatedCommunicator:
        """Return a communicator of the workers that give the same ``color``. Collective."""

        def make_groups(colors: list[int]) -> dict[int, Group]:
            members: dict[int, list[int]] = {}
            for world_rank, other in zip(self._group.ranks, colors, strict=True):
                members.setdefault(other, []).append(world_rank)
            return {color: self._scheduler.group(ranks, self._layout.nodes) for color, ranks in members.items()}

        group: Group = self._exchange(color, make_groups)[color]
        rank = bisect_left(group.ranks, self._world_rank)
        return SimulatedCommunicator(self._scheduler, self._layout, group, rank, self.statistics)

    def vector(self, n: int, dtype: Any) -> SimulatedVector:
        """Allocate a vector of zeros that peers can read. Collective."""
        arrays = self._exchange(None, lambda _: [np.zeros(n, dtype) for _ in range(self.size)])
        return SimulatedVector(arrays, self.rank)

    def numbers(self, n: int) -> SimulatedVector:
        """Allocate a few float64 numbers that peers can read. Collective."""
        return self.vector(n, np.float64)

    def node_vector(self, n: int, dtype: Any) -> SimulatedVector:
        """Allocate a vector of zeros for each node, shared by its workers and readable by peers. Collective."""

        def make_arrays(_: list[None]) -> list[np.ndarray]:
            array_of = {node: np.zeros(n, dtype) for node in set(self.nodes)}
            return [array_of[node] for node in self.nodes]

        return SimulatedVector(self._exchange(None, make_arrays), self.rank)

    def publish(self, vector: Any) -> None:
        """Do nothing: peers always see a vector as it is. Local."""

    def read(self, vector: Any, peer: int, fn: Callable[[Any], object]) -> None:
        """Call ``fn`` with the current vector of a peer. Local; not counted as an exchange."""
        self._scheduler.schedule.peer_read(self._world_rank, self._group.ranks[peer], vector.arrays[peer].nbytes)
        fn(vector.arrays[peer])

    def shared_vector(self, n: int, dtype: Any, rows: int = 1) -> SharedVector:
        """Allocate one vector of zeros, or ``rows`` updated together, sharded over the workers. Collective."""

        def make_memory(_: list[None]) -> BlockMemory:
            parts = shards(n, self.nodes, self._layout.largest_shard, smallest=-(-self._layout.smallest_shard // rows))
            return BlockMemory(tuple(part.owner for part in parts), tuple(rows * part.size for part in parts), dtype)

        blocks = self._blocks(make_memory)
        return SharedVector(blocks, self.rank, self.size, self.statistics, rows)

    def mailboxes(self, n: int, dtype: Any, slots: int = 1) -> Mailboxes:
        """Allocate ``slots`` vectors at every worker, which others read or update under their locks. Collective."""

        def make_memory(_: list[None]) -> BlockMemory:
            homes = tuple(rank for rank in range(self.size) for _ in range(slots))
            return BlockMemory(homes, (n,) * len(homes), dtype)

        return Mailboxes(self._blocks(make_memory), self.rank, slots, self.statistics)

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
        """Return this worker's slice of a vector of ``n`` elements, which the workers of a node divide. Local."""
        node_ranks = self._group.ranks_of_nodes[self.nodes[self.rank]]
        return split(n, len(node_ranks))[bisect_left(node_ranks, self.rank)]

    def reduce_slices(self, vector: Any, fn: Callable[[slice, Sequence[Any]], object]) -> None:
        """Call ``fn`` with this worker's slice and the sum of all workers' vectors in that slice. Collective."""
        self._count_reduction(vector.local.nbytes)
        total = self._exchange(
            vector.local, lambda vectors: sum(vectors[1:], vectors[0].copy()), "allreduce", vector.local.nbytes
        )
        mine = self.slice_of(vector.local.size)
        fn(mine, [total[mine].copy()])
        self.barrier()

    def start_allreduce(self, vector: Any, *, mean: bool = False) -> SimulatedPending:
        """Start an all-reduce. Collective.

        It is made when all workers wait for it, of the vectors, which they must not change until then.
        """
        return SimulatedPending(lambda: self.allreduce(vector, mean=mean))

    def start(self, fn: Callable[[], object]) -> Started:
        """Call ``fn`` at once; the worker sees at its next step that it is done. Local."""
        fn()
        return Started()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until one-sided operations of others make ``condition()`` true. Local."""
        self._scheduler.wait_until(self._world_rank, condition, self._group)

    def broadcast(self, array: Any, root: int = 0) -> None:
        """Copy the root's array to every worker's. Collective."""
        array[...] = self._exchange(array, lambda arrays: arrays[root].copy(), "tree", array.nbytes)

    def reduce(self, array: Any, root: int = 0) -> None:
        """Add every worker's array to the root's. Collective."""
        total = self._exchange(array, lambda arrays: sum(arrays[1:], arrays[0].copy()), "tree", array.nbytes)
        if self.rank == root:
            array[...] = total

    def gather(self, values: Sequence[float]) -> np.ndarray:
        """Return a few numbers of each worker on all of them: (size, len(values)) float64. Collective."""
        mine = np.array(values, np.float64)
        gathered: np.ndarray = self._exchange(mine, np.stack, "gather", mine.nbytes)
        return gathered.copy()

    def barrier(self) -> None:
        """Wait for every worker. Collective."""
        self._exchange(None, lambda _: None, "barrier")

    def compute(self) -> None:
        """Spend the time of a gradient, in which others run. Local."""
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

    def free(self) -> None:
        """Do nothing: there are no windows to free. Collective."""

    def _exchange(self, value: Any, combine: Callable[[list[Any]], Any], kind: str = "set-up", n_bytes: int = 0) -> Any:
        return self._scheduler.exchange(self._group, self.rank, value, combine, kind, n_bytes)

    def _count_reduction(self, n_bytes: int) -> None:
        """Count an all-reduce of that many bytes, of which a ring sends 2*(p - 1)/p."""
        self.statistics.n_exchanges += 1
        self.statistics.bytes_sent += 2 * (self.size - 1) * n_bytes // self.size

    def _blocks(self, make_memory: Callable[[list[None]], BlockMemory]) -> SimulatedBlocks:
        """Allocate blocks of zeros. Collective."""
        memory = self._exchange(None, make_memory)
        interleave = self._layout.interleave_locks
        return SimulatedBlocks(memory, self._scheduler, self._group.ranks, self._world_rank, interleave=interleave)
