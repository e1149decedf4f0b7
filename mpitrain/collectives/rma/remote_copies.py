"""Copies between this rank and the arrays of ranks of other nodes, without locks."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from mpi4py import MPI

from mpitrain.collectives.world.transfers import ServerLost, Transfer
from mpitrain.errors import RankFailed

if TYPE_CHECKING:
    from mpitrain.collectives.world.service import Service
    from mpitrain.collectives.world.world import World

LARGEST_MESSAGE_BYTES = 1 << 30
"""Of one Get or Put: counts are 32-bit before MPI 4, and Open MPI 5 rejects the datatype that mpi4py then creates."""

LARGEST_REQUEST_BYTES = 1 << 22
"""Of one request to a progress thread."""

MOST_PENDING = 4
"""Requests of a thread to one rank."""

NOTHING = np.zeros(0, np.uint8)


def pieces_of(array: Any, first: int, largest: int | None = None) -> Iterator[tuple[int, Any]]:
    """Yield an array's bytes in pieces that fit into a message, each with its offset in a window.

    Args:
        array: An array in host or device memory.
        first: The offset of the array in the window, in bytes.
        largest: The most bytes of a piece; by default those of an MPI message.
    """
    raw, largest = array.view(np.uint8), largest or LARGEST_MESSAGE_BYTES
    for at in range(0, raw.size, largest):
        yield first + at, raw[at : at + largest]


class RemoteCopies(Protocol):
    """Copies from and to the arrays of ranks of other nodes."""

    def get(self, rank: int, out: np.ndarray, at: int) -> None:
        """Start to fill ``out`` from the array of ``rank``, from byte ``at`` on; ``flush`` completes it. Local."""

    def put(self, rank: int, values: np.ndarray, at: int) -> None:
        """Start to copy ``values`` to the array of ``rank``, from byte ``at`` on; ``flush`` completes it. Local."""

    def flush(self, rank: int) -> None:
        """Complete all copies of this thread from and to ``rank``. Local."""

    def sync(self) -> None:
        """Order the accesses of this rank to its array with those of other ranks. Local."""

    def free(self) -> None:
        """Free the memory. Collective."""


class OneSidedCopies:
    """Copies by MPI's one-sided operations. Collective to create and to free.

    The window cannot be used after the death of a rank.

    Args:
        world: The ranks.
        memory: The bytes of this rank's array.
    """

    def __init__(self, world: World, memory: np.ndarray) -> None:
        world.fault_tolerance.leave_no_survivors()
        self._world = world
        self._window = MPI.Win.Create(memory, 1, comm=world.comm)
        self._window.Lock_all(MPI.MODE_NOCHECK)

    def get(self, rank: int, out: np.ndarray, at: int) -> None:
        """Start to fill ``out`` from the array of ``rank``, from byte ``at`` on; ``flush`` completes it. Local."""
        for offset, piece in pieces_of(out, at):
            self._window.Get([piece, MPI.BYTE], rank, offset)

    def put(self, rank: int, values: np.ndarray, at: int) -> None:
        """Start to copy ``values`` to the array of ``rank``, from byte ``at`` on; ``flush`` completes it. Local."""
        for offset, piece in pieces_of(values, at):
            self._window.Put([piece, MPI.BYTE], rank, offset)

    def flush(self, rank: int) -> None:
        """Complete all copies from and to ``rank``. Local."""
        with self._world.waiting("memory of another node", lambda: [rank]):
            self._window.Flush(rank)

    def sync(self) -> None:
        """Order the accesses of this rank to its array with those of other ranks. Local."""
        self._window.Sync()

    def free(self) -> None:
        """Free the window. Collective."""
        self._window.Unlock_all()
        self._window.Free()


class AddressBook:
    """The addresses of an array of each rank, for requests of other nodes. Collective to create.

    If ranks survive the death of others, the book also has the address of each array in the other processes of its
    node, which can serve it after the death of its rank (``World.server_of``).

    Args:
        world: The ranks.
        arrays: The arrays of the ranks of this node, by rank.
    """

    def __init__(self, world: World, arrays: Mapping[int, np.ndarray]) -> None:
        ranks = world.node_ranks if world.survives_failures else [world.rank]
        self._addresses: list[dict[int, int]] = world.allgather({rank: arrays[rank].ctypes.data for rank in ranks})

    def address(self, home: int, server: int) -> int:
        """Return the address of the array of rank ``home`` in the process of rank ``server``. Local."""
        return self._addresses[server][home]


class ServedCopies:
    """Copies by requests to the progress thread of the rank that has the array. Collective to create.

    Args:
        world: The ranks.
        service: The requests of this rank to other progress threads.
        arrays: The arrays of the ranks of this node, by rank.

    Attributes:
        book: The addresses of the arrays.
    """

    def __init__(self, world: World, service: Service, arrays: Mapping[int, np.ndarray]) -> None:
        self._world, self._service = world, service
        self.book = AddressBook(world, arrays)
        # By rank and thread: whether data come, the piece, its offset in the array, and the request under way.
        self._pending: dict[tuple[int, int], list[tuple[bool, np.ndarray, int, Transfer]]] = {}

    def get(self, rank: int, out: np.ndarray, at: int) -> None:
        """Start to fill ``out`` from the array of ``rank``, from byte ``at`` on; ``flush`` completes it. Local.

        Raises:
            RankFailed: All ranks of that node are dead.
        """
        for offset, piece in pieces_of(out, at, LARGEST_REQUEST_BYTES):
            self._start(rank, piece, offset, fetches=True)

    def put(self, rank: int, values: np.ndarray, at: int) -> None:
        """Start to copy ``values`` to the array of ``rank``, from byte ``at`` on; ``flush`` completes it. Local.

        Raises:
            RankFailed: All ranks of that node are dead.
        """
        for offset, piece in pieces_of(values, at, LARGEST_REQUEST_BYTES):
            self._start(rank, piece, offset, fetches=False)

    def _start(self, rank: int, piece: np.ndarray, offset: int, *, fetches: bool) -> None:
        pending = self._pending.setdefault((rank, threading.get_ident()), [])
        if len(pending) == MOST_PENDING:
            self._complete(rank, *pending.pop(0))
        pending.append((fetches, piece, offset, self._request(rank, piece, offset, fetches=fetches)))

    def _request(self, rank: int, piece: np.ndarray, offset: int, *, fetches: bool) -> Transfer:
        server = self._world.server_of(rank)
        if server is None:
            raise RankFailed(f"rank {rank} died with its node")
        addresses, arrays = (self.book.address(rank, server) + offset, 0), (piece, NOTHING)
        if fetches:
            return self._service.fetch(server, addresses, arrays)
        return self._service.store(server, addresses, arrays, (0, 0, 0))

    def _complete(self, rank: int, fetches: bool, piece: np.ndarray, offset: int, transfer: Transfer) -> None:
        """Wait for a request, and repeat it at another rank of the node if its server has died."""
        while True:
            try:
                transfer.wait()
            except ServerLost:
                transfer = self._request(rank, piece, offset, fetches=fetches)
            else:
                return

    def flush(self, rank: int) -> None:
        """Complete all copies of this thread from and to ``rank``. Local.

        Raises:
            RankFailed: All ranks of that node are dead.
        """
        for pending in self._pending.pop((rank, threading.get_ident()), []):
            self._complete(rank, *pending)

    def sync(self) -> None:
        """Do nothing, because a processor makes the copies at both ends."""

    def free(self) -> None:
        """Do nothing, because the arrays belong to the window. Collective."""
