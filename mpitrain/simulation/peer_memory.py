"""Memory that workers of a simulated world access by one-sided operations: vectors, shared vectors and mailboxes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpitrain.collectives.rma.mailboxes import Mailboxes
from mpitrain.collectives.rma.shared_vector import LARGEST_SHARD, SMALLEST_SHARD, SharedVector
from mpitrain.collectives.topology.partition import shards
from mpitrain.collectives.world.statistics import Statistics
from mpitrain.simulation.memory import BlockMemory, SimulatedBlocks, SimulatedVector
from mpitrain.simulation.scheduler import Group, Scheduler


@dataclass(frozen=True)
class Layout:
    """The division of the memory of a simulated world into shards.

    Args:
        nodes: (size,) the node of each worker.
        largest_shard: The largest number of elements in a shard. A small value gives a small vector many shards.
        smallest_shard: The smallest number of elements that a worker owns. The shards of a short vector therefore
            belong to a few of the workers.
        interleave_locks: Whether other workers may run before a worker acquires a lock. The visits of two workers to
            the shards of a vector then interleave, as they do between ranks.
    """

    nodes: tuple[int, ...]
    largest_shard: int = LARGEST_SHARD
    smallest_shard: int = SMALLEST_SHARD
    interleave_locks: bool = False


class SimulatedPeerMemory:
    """The memory that the workers of a group can access: the simulated counterpart of ``PeerMemory``.

    Args:
        scheduler: The scheduler that runs the workers.
        layout: The layout of the memory of the world.
        group: The workers that share the memory.
        rank: The rank of this worker in the group.
        statistics: The counters of exchanges; new ones by default.

    Attributes:
        rank: Rank of this worker in the group.
        size: The number of workers in the group.
        nodes: (size,) the node of each worker.
        statistics: The counters of this worker's exchanges.
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
        """Do nothing, because peers always see the present values. Local."""

    def read(self, vector: Any, peer: int, fn: Callable[[Any], object]) -> None:
        """Call ``fn`` with the present vector of a peer. Local; the statistics do not count this as an exchange."""
        self._scheduler.schedule.peer_read(self._world_rank, self._group.ranks[peer], vector.arrays[peer].nbytes)
        fn(vector.arrays[peer])

    def shared_vector(self, n: int, dtype: Any, rows: int = 1) -> SharedVector:
        """Allocate a vector of zeros in shards, or ``rows`` vectors that are updated together. Collective."""

        def make_memory(_: list[None]) -> BlockMemory:
            parts = shards(n, self.nodes, self._layout.largest_shard, smallest=-(-self._layout.smallest_shard // rows))
            return BlockMemory(tuple(part.owner for part in parts), tuple(rows * part.size for part in parts), dtype)

        blocks = self._blocks(make_memory)
        return SharedVector(blocks, self.rank, self.size, self.statistics, rows)

    def mailboxes(self, n: int, dtype: Any, slots: int = 1) -> Mailboxes:
        """Allocate ``slots`` vectors at every worker, each with a lock under which others access it. Collective."""

        def make_memory(_: list[None]) -> BlockMemory:
            homes = tuple(rank for rank in range(self.size) for _ in range(slots))
            return BlockMemory(homes, (n,) * len(homes), dtype)

        return Mailboxes(self._blocks(make_memory), self.rank, slots, self.statistics)

    def free(self) -> None:
        """Do nothing, because there are no windows to free. Collective."""

    def _exchange(self, value: Any, combine: Callable[[list[Any]], Any], kind: str = "set-up", n_bytes: int = 0) -> Any:
        return self._scheduler.exchange(self._group, self.rank, value, combine, kind, n_bytes)

    def _blocks(self, make_memory: Callable[[list[None]], BlockMemory]) -> SimulatedBlocks:
        """Allocate blocks of zeros. Collective."""
        memory = self._exchange(None, make_memory)
        interleave = self._layout.interleave_locks
        return SimulatedBlocks(memory, self._scheduler, self._group.ranks, self._world_rank, interleave=interleave)
