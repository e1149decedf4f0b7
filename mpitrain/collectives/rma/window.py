"""Vectors in memory that other ranks can reach: node-shared segments, exposed to other nodes over the same bytes.

Between the ranks of a node a vector is plain memory: ``window.of(peer)`` is an array, and a kernel reads and writes it
in place. Between nodes ``get`` and ``put`` move it with MPI's one-sided operations, on an MPI window that is created
over the very same bytes, so that no second copy exists.

MPI 4.1, chapter 12 (one-sided communications). All windows stay in one passive-target epoch for their whole life
(``Lock_all`` at creation): synchronisation is the business of ``collectives.rma.locks``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from mpi4py import MPI

from mpitrain.collectives.topology.partition import split
from mpitrain.collectives.world.shared_memory import check_free_memory_on_all

if TYPE_CHECKING:
    from mpitrain.collectives.world.world import World

LARGEST_MESSAGE_BYTES = 1 << 30
"""Of one Get or Put: counts were 32-bit before MPI 4, and Open MPI 5 refuses the type that mpi4py then makes."""


def pieces_of(array: Any, first: int) -> Iterator[tuple[int, Any]]:
    """An array's bytes in pieces that one message can carry, and where each lies in a window.

    Args:
        array: In host or device memory.
        first: Bytes of the window before it.
    """
    raw = array.view(np.uint8)
    for at in range(0, raw.size, LARGEST_MESSAGE_BYTES):
        yield first + at, raw[at : at + LARGEST_MESSAGE_BYTES]


class Window:
    """An array on every rank, reachable by all. Collective to create and to free.

    Args:
        world: The ranks.
        n: Elements on this rank; ranks may differ.
        dtype: The same on all ranks.
        node_shared: The ranks of a node have one array between them; ``n`` is then the same on all of them.

    Attributes:
        local: (n,) zeros at first; this rank's array.
        plan: Sums it over all ranks in one call; None where that has not been prepared.
    """

    def __init__(self, world: World, n: int, dtype: Any, *, node_shared: bool = False) -> None:
        self.world = world
        self.plan: Callable[[float], None] | None = None
        self.dtype = np.dtype(dtype)
        own = n if world.local_rank == 0 or not node_shared else 0
        n_bytes = max(own * self.dtype.itemsize, 1)
        check_free_memory_on_all(world.node_comm.allreduce(n_bytes), world.comm)
        # Separate segments: each begins on a page of its own, on the NUMA domain of the rank that touches it first.
        info = MPI.Info.Create({"alloc_shared_noncontig": "true"})
        self._shared = MPI.Win.Allocate_shared(n_bytes, 1, info=info, comm=world.node_comm)
        info.Free()
        self._shared.Lock_all(MPI.MODE_NOCHECK)
        lengths = world.node_comm.allgather(n)
        self._direct: dict[int, np.ndarray] = {}
        for local_rank, rank in enumerate(world.node_ranks):
            memory: Any = self._shared.Shared_query(0 if node_shared else local_rank)[0]
            array = np.frombuffer(memory, np.uint8)[: lengths[local_rank] * self.dtype.itemsize]
            self._direct[rank] = array.view(self.dtype)
        self.local = self._direct[world.rank]
        self._bytes = self.local.view(np.uint8)
        self._touch(split(n, world.local_size)[world.local_rank] if node_shared else slice(n))
        self._remote: MPI.Win | None = None
        if world.n_nodes > 1:
            self._remote = MPI.Win.Create(self._bytes, 1, comm=world.comm)
            self._remote.Lock_all(MPI.MODE_NOCHECK)
        self.sync()
        world.comm.Barrier()

    def _touch(self, part: slice) -> None:
        """Zero a part, even where the memory is new and zero already.

        A rank that is alone on its node gets memory of the heap, used before. A new segment has no pages yet: touched
        here they lie on this rank's NUMA domain, whoever writes first, and the next ``check_free_memory`` counts them.
        """
        self.local[part] = 0

    def of(self, rank: int) -> np.ndarray | None:
        """The array of ``rank`` itself when it is on this node, else None. Local."""
        return self._direct.get(rank)

    def get(self, rank: int, out: np.ndarray, start: int = 0) -> None:
        """Begin to copy ``out.size`` elements from ``start`` of another node's ``rank``; ``flush`` ends it. Local."""
        assert self._remote is not None
        for at, piece in pieces_of(out, start * self.dtype.itemsize):
            self._remote.Get([piece, MPI.BYTE], rank, at)

    def put(self, rank: int, values: np.ndarray, start: int = 0) -> None:
        """Begin to copy ``values`` to ``start`` of another node's ``rank``; ``flush`` ends it. Local."""
        assert self._remote is not None
        for at, piece in pieces_of(values, start * self.dtype.itemsize):
            self._remote.Put([piece, MPI.BYTE], rank, at)

    def flush(self, rank: int) -> None:
        """Wait until what was begun towards ``rank`` is done on both sides. Local."""
        assert self._remote is not None
        self._remote.Flush(rank)

    def sync(self) -> None:
        """Order this rank's loads and stores of the node's memory with those of the others. Local."""
        self._shared.Sync()
        if self._remote is not None:
            self._remote.Sync()

    def free(self) -> None:
        """Give the memory back. Collective; arrays taken from it must not be used any more.

        MPI frees a window only where all its ranks do. When one has died it stays until the process ends.
        """
        if self.world.survives_failures:
            self.world.barrier()
            if not self.world.is_whole:
                return
        if self._remote is not None:
            self._remote.Unlock_all()
            self._remote.Free()
        self._shared.Unlock_all()
        self._direct.clear()
        self.plan = None
        self._shared.Free()
