"""Progress for ranks whose peers on other nodes compute, and the way that large data take between nodes.

MPI lets the origin of a Get wait until its target calls MPI again, and over TCP every MPI does so by default: a Get
from a rank that computes for a second takes a second. Between nodes each rank therefore runs a thread that gives MPI
a chance every millisecond, in compiled code that does not wait for Python's interpreter lock. Between the ranks of one
node nothing of the kind is needed: there is no message.

The thread also does what ranks of other nodes ask for by message: it takes a lock and sends the block, receives the
block and frees the lock. So an exchange is two round trips, and neither waits for what this rank computes. MPI's own
Get would be the natural way. But over TCP Open MPI sends one to two times as many bytes towards the target as the
Get brings back (``am_rdma_start`` makes the request as long as its answer), and both MPIs use one direction of a
link at a time for messages that they negotiate. Short messages fill both.
"""

from __future__ import annotations

import atexit
import ctypes
import itertools
import threading
import time
from typing import Any

import numpy as np

from mpitrain.collectives.background import in_background
from mpitrain.kernels import service
from mpitrain.kernels.locks import OWNER_MASK
from mpitrain.kernels.wire import PLAIN, Encoded

EMPTY = np.zeros(0, np.uint8)

Arrays = tuple[np.ndarray, np.ndarray]
"""What goes together: a block and its tags."""

SLOTS_OF_A_RANK = 4  # it waits for one lock and gives two others back, at the most
NAP_SECONDS = 200e-6  # between two looks of a background thread, where an MPI that waits would spin
TAGS = range(2, 1000)  # of requests and what they move, in turn: only a few are under way


class ProgressThread:
    """Serves the ranks of ``comm`` until ``stop``. Collective to create (it duplicates ``comm``).

    Args:
        comm: The ranks between which there must be progress. MPI must have been started with MPI_THREAD_MULTIPLE.
    """

    def __init__(self, comm: Any) -> None:
        self._comm = comm.Dup()
        self._rank = comm.Get_rank()
        self._tags = itertools.cycle(TAGS)
        self._stopped = np.zeros(1, np.int64)
        self._thread = threading.Thread(target=self._run, name="mpi-progress", daemon=True)
        self._thread.start()
        atexit.register(self.stop)  # runs before MPI is finalized

    def _run(self) -> None:
        from mpi4py import MPI

        library = ctypes.CDLL(MPI.__file__)  # and what it is linked with: MPI and the C library
        addresses = [ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in service.FUNCTIONS]
        sizes: Any = {kind: MPI._sizeof(kind) for kind in (MPI.Request, MPI.Status)}
        n_ranks = self._comm.Get_size()
        n_slots = SLOTS_OF_A_RANK * n_ranks
        flag, requests = np.zeros(2, np.int32), np.zeros((n_ranks, service.REQUEST_WORDS), np.int64)
        states = np.zeros((n_slots, service.STATE_WORDS), np.int64)
        statuses = np.zeros(service.N_PIECES * sizes[MPI.Status], np.uint8)
        pieces = np.zeros((n_slots * service.N_PIECES + n_ranks) * sizes[MPI.Request], np.uint8)
        memory = [array.ctypes.data for array in (flag, requests, statuses, pieces, states)]
        service.serve()(
            np.array(addresses, np.int64),
            ctypes.c_int64(MPI._handleof(self._comm)).value,
            ctypes.c_int64(MPI._handleof(MPI.BYTE)).value,
            sizes[MPI.Request],
            self._stopped,
            flag,
            requests,
            states,
            np.array(memory, np.int64),
        )

    def swap(self, rank: int, word: int, before: int, after: int) -> int:
        """Make the lock word at an address of ``rank`` ``after`` if it is ``before``. Returns what it was. Local."""
        tag, header, requests = self._expect(rank)
        self._ask(service.SWAP, rank, tag, (0, 0), (EMPTY, EMPTY), (word, before, after))
        return Transfer(header, requests).wait()

    def fetch(
        self,
        rank: int,
        addresses: tuple[int, int],
        arrays: Arrays,
        take: tuple[int, int] = (0, 0),
        encoded: Encoded = PLAIN,
    ) -> Transfer:
        """Begin to copy what lies at addresses of ``rank`` to arrays. Local.

        Args:
            rank: Whose memory.
            addresses: There.
            arrays: Here.
            take: The address of a lock word, and the owner bits to set in it first, as soon as nobody else's are set.
            encoded: What ``rank`` encodes to the first of the addresses when it has taken the lock.
        """
        tag, header, requests = self._expect(rank)
        requests += [self._comm.Irecv(piece, rank, tag) for piece in pieces(*arrays)]
        kind = service.TAKE if take[0] else service.FETCH
        self._ask(kind, rank, tag, addresses, arrays, (take[0], 0, take[1]), encoded)
        return Transfer(header, requests)

    def store(
        self,
        rank: int,
        addresses: tuple[int, int],
        arrays: Arrays,
        swap: tuple[int, int, int],
        encoded: Encoded = PLAIN,
    ) -> Transfer:
        """Begin to copy arrays to addresses of ``rank``, and to swap a lock word when they are there. Local.

        Args:
            rank: Whose memory.
            addresses: There.
            arrays: Here.
            swap: The address of a lock word, what it is, and what it becomes.
            encoded: To what ``rank`` adds what has come to the first of the addresses before it swaps.
        """
        tag, header, requests = self._expect(rank)
        self._ask(service.STORE, rank, tag, addresses, arrays, swap, encoded)
        requests += [self._comm.Isend(piece, rank, service.STORED + tag) for piece in pieces(*arrays)]
        return Transfer(header, requests, swap[1])

    def _expect(self, rank: int) -> tuple[int, np.ndarray, list[Any]]:
        """A tag, and room for the header of the answer."""
        tag, header = next(self._tags), np.zeros(service.HEADER_WORDS, np.int64)
        return tag, header, [self._comm.Irecv(header, rank, tag)]

    def _ask(
        self,
        kind: int,
        rank: int,
        tag: int,
        addresses: tuple[int, int],
        arrays: Arrays,
        word: tuple[int, int, int],
        encoded: Encoded = PLAIN,
    ) -> None:
        stretches = [addresses[0], arrays[0].nbytes, addresses[1], arrays[1].nbytes]
        words = [kind, self._rank, *stretches, *word, tag, *encoded]
        self._comm.Send(np.array(words, np.int64), rank, service.TAG_REQUEST)

    def stop(self) -> None:
        """End the thread. Local; safe to call again."""
        self._stopped[0] = 1
        if self._thread.is_alive():
            self._thread.join()


class Transfer:
    """What another rank has been asked for.

    Args:
        header: What it answers first.
        requests: Of MPI: for the header, then for the data.
        expected: What the lock word must have been, if anything.
    """

    def __init__(self, header: np.ndarray, requests: list[Any], expected: int | None = None) -> None:
        self._header, self._requests, self._expected = header, requests, expected

    def wait(self) -> int:
        """Until all of it is done. Returns the lock word as it was. Local.

        Raises:
            RuntimeError: When it was not what it must have been.
        """
        while in_background() and not self._requests[0].Testall(self._requests):
            time.sleep(NAP_SECONDS)
        self._requests[0].Waitall(self._requests)
        found = int(self._header[0])
        if self._expected is not None and found != self._expected:
            owner = (found & OWNER_MASK) - 1
            raise RuntimeError(f"the lock was taken over by rank {owner}: this rank was taken for dead")
        return found

    def wait_for_lock(self) -> float:
        """Until the lock is this rank's. Returns the seconds that this took if another one had it, else 0. Local."""
        began = time.perf_counter()
        while in_background() and not self._requests[0].Test():
            time.sleep(NAP_SECONDS)
        self._requests[0].Wait()
        return time.perf_counter() - began if self._header[1] else 0.0


def pieces(*arrays: np.ndarray) -> list[Any]:
    """Their bytes as the service cuts them, for MPI."""
    from mpi4py import MPI

    raws, size = [array.view(np.uint8) for array in arrays], service.PIECE_BYTES
    return [[raw[at : at + size], MPI.BYTE] for raw in raws for at in range(0, raw.size, size)]
