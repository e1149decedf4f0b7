"""Requests to the progress thread of another rank, made and awaited in compiled code (``kernels.native.service``)."""

from __future__ import annotations

import ctypes
import functools
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np

from mpitrain.collectives.world.background import (
    FOREGROUND_BACKOFF_SECONDS,
    LONGEST_BACKOFF_SECONDS,
    SHORTEST_BACKOFF_SECONDS,
    Backoff,
    in_background,
)
from mpitrain.collectives.world.failure_detector import FAILURE_POLL_SECONDS
from mpitrain.collectives.world.fault_tolerance import LONGEST_DETECTION_SECONDS, FaultTolerance
from mpitrain.collectives.world.wakeup import WakeupPipe
from mpitrain.collectives.world.watchdog import waiting
from mpitrain.kernels.native import lock_words, service
from mpitrain.kernels.native.lock_words import OWNER_MASK

Arrays = tuple[np.ndarray, np.ndarray]
"""A block and its tags, which travel together."""

# Polls without a pause, then the shortest and the longest pause between two polls, in microseconds.
FOREGROUND = 200, 1, 20
BACKGROUND = 0, round(1e6 * SHORTEST_BACKOFF_SECONDS), round(1e6 * LONGEST_BACKOFF_SECONDS)

NO_MESSAGE = np.zeros(0, np.int64)

LATE_POLLS = 1000
"""Calls of compiled code after the death of the server, in which MPI may still complete a request."""


class ServerLost(Exception):
    """The error of a request to a rank that has died."""


class NativeMPI:
    """MPI for compiled code: the addresses of its functions, handles, sizes, and words shared with the serving thread.

    Args:
        comm: The ranks.
        fault_tolerance: The handling of dead ranks.
    """

    def __init__(self, comm: Any, fault_tolerance: FaultTolerance) -> None:
        from mpi4py import MPI

        self.fault_tolerance, self.dead = fault_tolerance, fault_tolerance.dead_words
        self.rank: int = comm.Get_rank()

        library = ctypes.CDLL(MPI.__file__)  # and the libraries it is linked with: MPI and the C library
        addresses = [ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in service.FUNCTIONS]
        self.functions = np.array(addresses, np.int64)
        self.comm = ctypes.c_int64(MPI._handleof(comm)).value
        self.byte = ctypes.c_int64(MPI._handleof(MPI.BYTE)).value
        sizes: Any = {kind: MPI._sizeof(kind) for kind in (MPI.Request, MPI.Status)}
        self.request_bytes, self.status_bytes = sizes[MPI.Request], sizes[MPI.Status]
        self.error = MPI.Exception
        self.pending: set[Transfer] = set()  # keeps memory that MPI reads and writes, even if the waiting thread fails
        self.shared = np.zeros(service.SHARED_WORDS, np.int64)
        self.shared[service.SURVIVES] = fault_tolerance.survives_failures
        self.wakeup, self._lock = WakeupPipe(), threading.Lock()
        self._completed, self._may_watch = WakeupPipe(blocking=True), threading.Lock()
        self._swap = lock_words.swap()

    def watched(self, n: int, requests: np.ndarray, statuses: np.ndarray) -> int:
        """Let the serving thread of this rank wait for n requests, and sleep until they are complete. Local.

        The calling thread sleeps because two threads that poll would slow down the thread that computes gradients. The
        serving thread accepts the requests only if the network can wake it.

        Returns:
            1 if the requests are complete, 0 if the calling thread must wait itself, or a negative error code of MPI.
        """
        shared = self.shared
        if not shared[service.TRUSTED] or not self._may_watch.acquire(blocking=False):
            return 0
        try:
            if shared[service.OUTCOME] != service.NONE:
                return 0
            shared[service.N_WATCHED], shared[service.WAKEUP_OF_WATCHED] = n, self._completed.writes
            shared[service.WATCHED], shared[service.WATCHED_STATUSES] = requests.ctypes.data, statuses.ctypes.data
            if self._swap(shared, service.OUTCOME, service.NONE, service.WATCHING) != service.NONE:
                return 0
            self.wakeup.wake()
            self._completed.wait()  # the serving thread writes the outcome first, and then to the pipe
            outcome = int(shared[service.OUTCOME])
            shared[service.OUTCOME] = service.NONE
            return 1 if outcome == service.COMPLETE else outcome
        finally:
            self._may_watch.release()

    def close(self, code: int) -> None:
        """Refuse further calls of ``watched`` and end the present one: the serving thread has failed. Local.

        Args:
            code: The negative error code of MPI.
        """
        self.shared[service.TRUSTED] = 0
        if self._swap(self.shared, service.OUTCOME, service.NONE, service.CLOSED) == service.WATCHING:
            self.shared[service.OUTCOME] = code
            self._completed.wake()

    def has_died(self, rank: int) -> bool:
        """Return whether a rank has died, when MPI has reported an error. Local; it waits for the failure detector."""
        if not self.fault_tolerance.survives_failures:
            return False
        deadline = time.monotonic() + LONGEST_DETECTION_SECONDS
        while not self.dead[rank] and time.monotonic() < deadline:
            self.fault_tolerance.poll()
            time.sleep(FAILURE_POLL_SECONDS)
        return bool(self.dead[rank])

    @contextmanager
    def polling(self) -> Iterator[None]:
        """Let the serving thread poll MPI with pauses inside the context, because another thread polls, too. Local."""
        with self._lock:
            self.shared[service.POLLING] += 1
        if self.shared[service.ASLEEP]:
            self.wakeup.wake()
        try:
            yield
        finally:
            with self._lock:
                self.shared[service.POLLING] -= 1


class Transfer:
    """A pending request to another rank.

    Args:
        mpi: MPI for compiled code.
        rank: The other rank.
        words: The request, laid out as in ``native.service.protocol``.
        here: (4,) the addresses and sizes of the blocks to send or to receive.
        arrays: The arrays that own this memory.
        sent: Whether to send the request now. Otherwise another transfer sends it, or this one when it is awaited.
        also: Transfers whose requests this one sends in its message, if they are to the same rank.
    """

    def __init__(
        self,
        mpi: NativeMPI,
        rank: int,
        words: np.ndarray,
        here: np.ndarray,
        arrays: Sequence[np.ndarray],
        *,
        sent: bool = True,
        also: Sequence[Transfer] = (),
    ) -> None:
        n = service.n_messages(int(here[1]), int(here[3]))
        self.rank = rank
        self._mpi, self._words, self._arrays = mpi, words, arrays
        self._header, self._flag = np.zeros(service.HEADER_WORDS, np.int64), np.zeros(1, np.int32)
        self._requests, self._statuses = (np.zeros(n * k, np.uint8) for k in (mpi.request_bytes, mpi.status_bytes))
        mpi.pending.add(self)
        self._is_lost, self._is_sent, self._n = False, sent, 0
        also = [transfer for transfer in also if transfer.rank == rank and not transfer._is_sent]
        self._message = message_of(words, *(transfer._words for transfer in also)) if sent else NO_MESSAGE
        known = mpi.functions, mpi.comm, mpi.byte, mpi.request_bytes
        try:
            request = words, self._message, here
            self._n = self._checked(service.ask()(*known, rank, *request, self._header, self._requests))
        except ServerLost:  # raised again where this request is awaited
            self._is_lost = True
        for transfer in also:
            transfer._is_sent = True  # or lost

    def _send(self) -> None:
        """Send the request, which no other transfer has sent."""
        self._is_sent, self._message = True, message_of(self._words)
        known = self._mpi.functions, self._mpi.comm, self._mpi.byte, self.rank, self._message
        self._checked(service.send()(*known, self._requests[self._n * self._mpi.request_bytes :]))
        self._n += 1

    def wait(self) -> int:
        """Wait until the request is complete, and return the former lock word. Local.

        Raises:
            RuntimeError: The former lock word was not the expected one.
            ServerLost: The other rank has died. The memory of the request may have been written in part.
        """
        self._wait_for()
        self._mpi.pending.discard(self)
        found = int(self._header[0])
        if self._words[service.KIND] == service.STORE and found != self._words[service.BEFORE]:
            owner = (found & OWNER_MASK) - 1
            raise RuntimeError(f"the lock was taken over by rank {owner}: this rank was considered dead")
        return found

    def polling(self) -> AbstractContextManager[None]:
        """Return a context in which the serving thread knows that the calling thread polls MPI. Local."""
        return self._mpi.polling()

    def granted(self) -> bool:
        """Poll MPI once, and return whether this rank has the lock, or never gets it from a dead rank. Local."""
        if self._is_lost:
            return True
        known = self._mpi.functions, 1, self._requests, self._statuses, self._flag
        try:
            if not self._is_sent:
                self._send()
            return bool(self._checked(service.test_requests()(*known, polls_per_wakeup())))
        except ServerLost:
            return True

    @property
    def was_taken(self) -> bool:
        """Whether another rank had the lock when the request arrived. It is known when the lock is granted."""
        return bool(self._header[1])

    def wait_for_lock(self) -> float:
        """Wait until this rank has the lock. Local.

        Returns:
            The seconds waited if another rank had the lock, else 0.

        Raises:
            ServerLost: The other rank has died.
        """
        began = time.perf_counter()
        self._wait_for(1)
        return time.perf_counter() - began if self._header[1] else 0.0

    def _wait_for(self, most: int | None = None) -> None:
        """Wait until the MPI requests are complete, or the first ``most`` of them."""
        if self._is_lost:
            raise ServerLost
        if not self._is_sent:
            self._send()
        n = most or self._n
        with waiting("an answer of another node", lambda: [self.rank]):
            if not in_background():
                self._poll(n, FOREGROUND)
            elif not self._checked(self._mpi.watched(n, self._requests, self._statuses)):
                self._poll(n, BACKGROUND)

    def _poll(self, n: int, backoff: tuple[int, int, int]) -> None:
        """Poll MPI until the first n requests are complete."""
        waited = np.zeros(2, np.int64)
        known = self._mpi.functions, n, self._requests, self._statuses, self._flag, polls_per_wakeup(), waited
        with self._mpi.polling():
            n_late = 0
            while not self._checked(service.wait_for_requests()(*known, *backoff)):
                n_late += int(self._mpi.dead[self.rank])
                if n_late > LATE_POLLS:
                    self._is_lost = True
                    raise ServerLost

    def _checked(self, result: int) -> int:
        if result < 0:
            self._is_lost = self._mpi.has_died(self.rank)
            raise ServerLost if self._is_lost else self._mpi.error(-result)
        return result


def message_of(*requests: np.ndarray) -> np.ndarray:
    """Return a message that contains requests. Local.

    Raises:
        ValueError: There are more of them than fit into a message.
    """
    if len(requests) == 1:
        return requests[0]
    if len(requests) > service.MOST_REQUESTS:
        raise ValueError(f"a message has at most {service.MOST_REQUESTS} requests, not {len(requests)}")
    message = np.concatenate(requests)
    message[service.KIND] += service.FOLLOWING * (len(requests) - 1)
    return message


def first_granted(transfers: Sequence[Transfer]) -> int:
    """Wait until one of the transfers has its lock, and return its position in the sequence. Local.

    If there is only one transfer, the function returns 0 at once, and the caller waits for the lock.
    """
    if len(transfers) == 1:
        return 0  # the caller waits for it
    granted = functools.partial(_granted_now, transfers)
    if (first := granted()) is not None:
        return first
    with waiting("a lock of another node", lambda: [transfer.rank for transfer in transfers]), transfers[0].polling():
        if in_background():
            backoff = Backoff(SHORTEST_BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS)
        else:
            backoff = Backoff(0.0, FOREGROUND_BACKOFF_SECONDS)
        while (first := granted()) is None:
            backoff.rest()
    return first


def _granted_now(transfers: Sequence[Transfer]) -> int | None:
    return next((k for k, transfer in enumerate(transfers) if transfer.granted()), None)


@functools.cache
def polls_per_wakeup() -> int:
    """Return the number of polls of MPI between two pauses. Local.

    Open MPI reads its sockets only at the end of every eighth call, so that the next call finds what has arrived.
    """
    from mpi4py import MPI

    return 9 if MPI.get_vendor()[0] == "Open MPI" else 1


def pieces(*arrays: np.ndarray) -> list[Any]:
    """Divide the bytes of arrays into the pieces that the service sends, as MPI buffers. Local."""
    from mpi4py import MPI

    raws, size = [array.view(np.uint8) for array in arrays], service.PIECE_BYTES
    return [[raw[at : at + size], MPI.BYTE] for raw in raws for at in range(0, raw.size, size)]
