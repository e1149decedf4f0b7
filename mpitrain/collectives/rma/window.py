"""Vectors in memory that other ranks can access: node-shared segments that MPI exposes to other nodes without a copy.

Between the ranks of a node, a vector is plain memory: ``window.of(peer)`` is an array that kernels read and write in
place. Between nodes, ``get`` and ``put`` copy from and to the same bytes (``rma.remote_copies``): there is no second
copy.

See MPI 4.1, chapter 12 (one-sided communications). All windows stay in one passive-target epoch for their whole life
(``Lock_all`` at creation); ``rma.locks`` synchronises the ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from mpi4py import MPI

from mpitrain.collectives.rma.remote_copies import AddressBook, OneSidedCopies, RemoteCopies, ServedCopies
from mpitrain.collectives.topology.partition import split
from mpitrain.collectives.world.shared_memory import check_free_memory_on_all
from mpitrain.errors import RankFailed

if TYPE_CHECKING:
    from mpitrain.collectives.world.world import World


class Window:
    """An array on every rank that all ranks can access. Collective to create and to free.

    Args:
        world: The ranks.
        n: The number of elements on this rank; ranks may differ.
        dtype: The type of the elements, the same on all ranks.
        node_shared: Whether the ranks of a node share one array; ``n`` is then the same on all of them.

    Attributes:
        local: (n,) this rank's array, initially zeros.
        plan: A prepared all-reduce of the array; None without one.
    """

    def __init__(self, world: World, n: int, dtype: Any, *, node_shared: bool = False) -> None:
        with world.waiting("the allocation of shared memory"):
            self._allocate(world, n, dtype, node_shared)

    def _allocate(self, world: World, n: int, dtype: Any, node_shared: bool) -> None:
        """Allocate the memory and expose it. Collective."""
        self.world = world
        self.plan: Callable[[float], None] | None = None
        self.dtype = np.dtype(dtype)
        own = n if world.local_rank == 0 or not node_shared else 0
        n_bytes = max(own * self.dtype.itemsize, 1)
        check_free_memory_on_all(world.node_comm.allreduce(n_bytes), world.comm)
        # Separate segments: each begins on its own page, in the NUMA domain of the rank that touches it first.
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
        self._touch(split(n, world.local_size)[world.local_rank] if node_shared else slice(n))
        self._remote: RemoteCopies | None = None
        if world.n_nodes > 1 and world.service is not None:
            self._remote = ServedCopies(world, world.service, self._direct)
        elif world.n_nodes > 1:
            self._remote = OneSidedCopies(world, self.local.view(np.uint8))
        self.sync()
        world.comm.Barrier()

    def _touch(self, part: slice) -> None:
        """Set a part of the array to zero, even if its memory is new and therefore zero.

        A rank that is alone on its node gets heap memory, which may have been used before. A new segment has no pages
        yet. Touching them here places them in this rank's NUMA domain, and the next ``check_free_memory`` counts them.
        """
        self.local[part] = 0

    def of(self, rank: int) -> np.ndarray | None:
        """Return the array of ``rank`` in place if it is on this node, else None. Local."""
        return self._direct.get(rank)

    def of_part(self, world: World) -> Window:
        """Return the same arrays as a window of a part of the ranks. Collective over the part.

        The memory still belongs to this window. Do not free the new one.

        Args:
            world: The part of the ranks of this window.
        """
        window = copy.copy(self)
        position = {member: rank for rank, member in enumerate(self.world.members)}
        window.world, window.plan = world, None
        window._direct = {rank: self._direct[position[world.members[rank]]] for rank in world.node_ranks}
        window._remote = None
        if world.n_nodes > 1:
            assert world.service is not None
            window._remote = ServedCopies(world, world.service, window._direct)
        return window

    @property
    def book(self) -> AddressBook:
        """The addresses of the arrays, where requests of other nodes are served. Local."""
        assert isinstance(self._remote, ServedCopies)
        return self._remote.book

    def get(self, rank: int, out: np.ndarray, start: int = 0) -> None:
        """Start to fill ``out`` from a remote ``rank``'s array at ``start``; ``flush`` completes it. Local.

        Raises:
            RankFailed: All ranks of that node are dead.
        """
        assert self._remote is not None
        self._remote.get(rank, out, start * self.dtype.itemsize)

    def put(self, rank: int, values: np.ndarray, start: int = 0) -> None:
        """Start to copy ``values`` to a remote ``rank``'s array at ``start``; ``flush`` completes it. Local.

        Raises:
            RankFailed: All ranks of that node are dead.
        """
        assert self._remote is not None
        self._remote.put(rank, values, start * self.dtype.itemsize)

    def flush(self, rank: int) -> None:
        """Complete all copies of this thread from and to ``rank``. Local.

        Raises:
            RankFailed: All ranks of that node are dead.
        """
        assert self._remote is not None
        self._remote.flush(rank)

    def sync(self) -> None:
        """Order the accesses of this rank to shared memory with those of other ranks. Local."""
        self._shared.Sync()
        if self._remote is not None:
            self._remote.sync()

    def free(self) -> None:
        """Free the memory. Collective; do not use its arrays afterwards.

        Freeing an MPI window is collective over all its ranks. If one of them has died, the window therefore stays
        until the process ends.
        """
        if self.world.survives_failures:
            self.world.barrier()
            if not self.world.is_whole:
                return
        self._direct.clear()
        self.plan = None
        try:
            with self.world.waiting("the release of shared memory"), self.world.translated_errors():
                if self._remote is not None:
                    self._remote.free()
                self._shared.Unlock_all()
                self._shared.Free()
        except RankFailed:  # it has died since the barrier
            return
