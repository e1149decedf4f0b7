"""Progress for ranks whose peers on other nodes compute, and the way that large data take between nodes.

MPI lets the origin of a Get wait until its target calls MPI again, and over TCP every MPI does so by default: a Get
from a rank that computes for a second takes a second. Between nodes each rank therefore runs a thread that gives MPI
a chance every millisecond, in compiled code that does not wait for Python's interpreter lock. Between the ranks of one
node nothing of the kind is needed: there is no message.

Every millisecond is for networks of which nothing is known. MPIs wait for their sockets with files that Linux has for
it (epoll), and such a file can be waited for like any other: where they have announced what came, the thread sleeps
until they do, and an idle one costs the rank that computes next to nothing. What another thread of the rank has taken
from the socket is not announced: one that looks at MPI for long says so (``polling``), or a request is served up to
5 ms late. An exchange in the background does not look where they are trusted: the serving thread looks for both
(``watched``).

The thread also does what ranks of other nodes ask for by message: it takes a lock and sends the block, receives the
block and frees the lock. So an exchange is two round trips, and neither waits for what this rank computes. MPI's own
Get would be the natural way. But over TCP Open MPI sends one to two times as many bytes towards the target as the
Get brings back (``am_rdma_start`` makes the request as long as its answer), and both MPIs use one direction of a
link at a time for messages that they negotiate. Short messages fill both.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import itertools
import os
import platform
import select
import struct
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from mpitrain.collectives.world import fault_tolerance
from mpitrain.collectives.world.background import (
    LONGEST_BACKOFF_SECONDS,
    SHORTEST_BACKOFF_SECONDS,
    in_background,
    wait_with_backoff,
)
from mpitrain.kernels.native import lock_words, service
from mpitrain.kernels.native.lock_words import OWNER_MASK
from mpitrain.kernels.native.wire import PLAIN, Encoded

Arrays = tuple[np.ndarray, np.ndarray]
"""What goes together: a block and its tags."""

SLOTS_OF_A_RANK = 6  # each of its threads waits for one lock at the most; to give blocks back waits for nothing
TAGS = range(2, 1000)  # of requests and what they move, in turn: only a few are under way

SHUTDOWN_POLL_SECONDS = 0.01  # of a rank at its end for the others

SLICE_NANOSECONDS = 100_000
SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}  # numbers of the system call

# Looks without a nap, then the shortest and the longest nap between two, in microseconds.
FOREGROUND = 200, 1, 20
BACKGROUND = 0, round(1e6 * SHORTEST_BACKOFF_SECONDS), round(1e6 * LONGEST_BACKOFF_SECONDS)


class _Calls:
    """MPI for compiled code: addresses of its functions, handles and sizes. Local.

    Args:
        comm: The ranks.
    """

    def __init__(self, comm: Any) -> None:
        from mpi4py import MPI

        library = ctypes.CDLL(MPI.__file__)  # and what it is linked with: MPI and the C library
        addresses = [ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in service.FUNCTIONS]
        self.functions = np.array(addresses, np.int64)
        self.comm = ctypes.c_int64(MPI._handleof(comm)).value
        self.byte = ctypes.c_int64(MPI._handleof(MPI.BYTE)).value
        sizes: Any = {kind: MPI._sizeof(kind) for kind in (MPI.Request, MPI.Status)}
        self.request_bytes, self.status_bytes = sizes[MPI.Request], sizes[MPI.Status]
        self.error = MPI.Exception
        self.under_way: set[Transfer] = set()  # what MPI reads and writes stays, whatever becomes of who waits for it
        self.shared = np.zeros(service.SHARED_WORDS, np.int64)
        self.wakeup, self._lock = WakeupPipe(), threading.Lock()
        self._over, self._may_watch = WakeupPipe(waits=True), threading.Lock()
        self._swap = lock_words.swap()

    def watched(self, n: int, requests: np.ndarray, statuses: np.ndarray) -> int:
        """Let the serving thread wait for n requests, if it sleeps until the network wakes it. Local.

        This thread sleeps meanwhile: two that look take twice as much from the one that computes.

        Returns:
            1 when they are complete, an error code of MPI, negative, and 0 if it is for this thread to wait.
        """
        shared = self.shared
        if not shared[service.TRUSTED] or not self._may_watch.acquire(blocking=False):
            return 0
        try:
            if shared[service.OUTCOME] != service.NONE:
                return 0
            shared[service.N_WATCHED], shared[service.WAKEUP_OF_WATCHED] = n, self._over.writes
            shared[service.WATCHED], shared[service.WATCHED_STATUSES] = requests.ctypes.data, statuses.ctypes.data
            if self._swap(shared, service.OUTCOME, service.NONE, service.WATCHING) != service.NONE:
                return 0
            self.wakeup.ring()
            self._over.wait()  # read after the serving thread has written the outcome, and then the bell
            outcome = int(shared[service.OUTCOME])
            shared[service.OUTCOME] = service.NONE
            return 1 if outcome == service.COMPLETE else outcome
        finally:
            self._may_watch.release()

    def close(self, code: int) -> None:
        """The serving thread looks no longer: refuse what is handed to it, and give back what it has. Local.

        Args:
            code: Of the error of MPI that has ended it, negative.
        """
        self.shared[service.TRUSTED] = 0
        if self._swap(self.shared, service.OUTCOME, service.NONE, service.CLOSED) == service.WATCHING:
            self.shared[service.OUTCOME] = code
            self._over.ring()

    @contextmanager
    def polling(self) -> Iterator[None]:
        """While a thread looks at what arrives for MPI: the serving one looks too, after naps."""
        with self._lock:
            self.shared[service.POLLING] += 1
        if self.shared[service.ASLEEP]:
            self.wakeup.ring()
        try:
            yield
        finally:
            with self._lock:
                self.shared[service.POLLING] -= 1


class ProgressThread:
    """Serves the ranks of ``comm`` until ``stop``, or all of them end. Collective to create (it duplicates ``comm``).

    Args:
        comm: The ranks between which there must be progress. MPI must have been started with MPI_THREAD_MULTIPLE.
    """

    def __init__(self, comm: Any) -> None:
        self._comm = comm.Dup()  # held: compiled code knows its handle only
        self._calls = _Calls(self._comm)
        self._rank, self._size = comm.Get_rank(), comm.Get_size()
        self._tags = itertools.cycle(TAGS)
        self._thread = threading.Thread(target=self._run, name="mpi-progress", daemon=True)
        self._thread.start()
        atexit.register(self._end)  # runs before MPI is finalized

    def _run(self) -> None:
        ask_for_short_slices()
        calls, n_ranks = self._calls, self._size
        n_slots = SLOTS_OF_A_RANK * n_ranks
        flag, requests = np.zeros(2, np.int32), np.zeros((n_ranks, service.REQUEST_WORDS), np.int64)
        states = np.zeros((n_slots, service.STATE_WORDS), np.int64)
        statuses = np.zeros(service.N_PIECES * calls.status_bytes, np.uint8)
        pieces = np.zeros((n_slots * service.N_PIECES + n_ranks) * calls.request_bytes, np.uint8)
        files, drain = polled([calls.wakeup.reads, *files_of_events()]), np.zeros(service.DRAIN_BYTES, np.uint8)
        arrays = flag, requests, statuses, pieces, states, files
        memory = [array.ctypes.data for array in arrays]
        memory += [files.size, calls.wakeup.reads, drain.ctypes.data]
        self._held = *arrays, drain  # after an error MPI may go on to write there
        result = service.serve()(
            calls.functions,
            calls.comm,
            calls.byte,
            calls.request_bytes,
            polls_per_wakeup(),
            calls.shared,
            flag,
            requests,
            states,
            np.array(memory, np.int64),
        )
        if result < 0:
            calls.close(result)
            fault_tolerance.wait_to_be_ended()
            raise RuntimeError(f"this rank can serve other nodes no longer: {calls.error(-result)}")

    def swap(self, rank: int, word: int, before: int, after: int) -> int:
        """Make the lock word at an address of ``rank`` ``after`` if it is ``before``. Returns what it was. Local."""
        return self._ask(service.SWAP, rank, (0, 0), (), (word, before, after)).wait()

    def fetch(
        self,
        rank: int,
        addresses: tuple[int, int],
        arrays: Arrays,
        acquire: tuple[int, int] = (0, 0),
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
        kind = service.ACQUIRE if acquire[0] else service.FETCH
        return self._ask(kind, rank, addresses, arrays, (acquire[0], 0, acquire[1]), encoded)

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
        return self._ask(service.STORE, rank, addresses, arrays, swap, encoded)

    def _ask(
        self,
        kind: int,
        rank: int,
        addresses: tuple[int, int],
        arrays: Sequence[np.ndarray],
        word: tuple[int, int, int],
        encoded: Encoded = PLAIN,
    ) -> Transfer:
        here, there = np.zeros(4, np.int64), [0, 0, 0, 0]
        for k, (address, array) in enumerate(zip(addresses, arrays, strict=False)):
            here[2 * k : 2 * k + 2] = array.ctypes.data, array.nbytes
            there[2 * k : 2 * k + 2] = address, array.nbytes
        words = np.array([kind, self._rank, *there, *word, next(self._tags), *encoded], np.int64)
        return Transfer(self._calls, rank, words, here, arrays)

    def polling(self) -> AbstractContextManager[None]:
        """While this thread looks at what arrives for MPI: the serving one looks too, after naps. Local."""
        return self._calls.polling()

    def _end(self) -> None:
        """Serve until every rank has come to its end, then stop. Collective, whether or not one has stopped before.

        Who ends first has what the others go on to ask for, and would wait for them in MPI_Finalize without an answer.
        """
        from mpi4py import MPI

        try:
            if not MPI.Is_finalized():
                ended = self._comm.Ibarrier()
                with self.polling():
                    while not ended.Test():
                        time.sleep(SHUTDOWN_POLL_SECONDS)
        except BaseException as error:  # Python would note it and go on: the others would wait
            if isinstance(error, MPI.Exception):
                fault_tolerance.wait_to_be_ended()
            sys.excepthook(type(error), error, error.__traceback__)
        finally:
            self.stop()

    def stop(self) -> None:
        """End the thread. Local; safe to call again."""
        if self._thread.is_alive():
            self._calls.shared[service.STOP] = 1
            self._calls.wakeup.ring()
            self._thread.join()


class Transfer:
    """What another rank has been asked for.

    Args:
        calls: Of MPI.
        rank: Who has been asked.
        words: The request.
        here: (4,) Addresses and bytes of what is sent or received.
        arrays: That this memory belongs to.
    """

    def __init__(
        self, calls: _Calls, rank: int, words: np.ndarray, here: np.ndarray, arrays: Sequence[np.ndarray]
    ) -> None:
        n = service.n_messages(int(here[1]), int(here[3]))
        self._calls, self._rank = calls, rank
        self._words, self._arrays = words, arrays
        self._header, self._flag = np.zeros(service.HEADER_WORDS, np.int64), np.zeros(1, np.int32)
        self._requests, self._statuses = (np.zeros(n * k, np.uint8) for k in (calls.request_bytes, calls.status_bytes))
        calls.under_way.add(self)
        known = calls.functions, calls.comm, calls.byte, calls.request_bytes
        self._n = self._checked(service.ask()(*known, rank, words, here, self._header, self._requests))

    def wait(self) -> int:
        """Until all of it is done. Returns the lock word as it was. Local.

        Raises:
            RuntimeError: When it was not what it must have been.
        """
        self._wait_for(self._n)
        self._calls.under_way.discard(self)
        found = int(self._header[0])
        if self._words[service.KIND] == service.STORE and found != self._words[service.BEFORE]:
            owner = (found & OWNER_MASK) - 1
            raise RuntimeError(f"the lock was taken over by rank {owner}: this rank was taken for dead")
        return found

    def wait_for_lock(self) -> float:
        """Until the lock is this rank's. Returns the seconds that this took if another one had it, else 0. Local."""
        began = time.perf_counter()
        self._wait_for(1)
        return time.perf_counter() - began if self._header[1] else 0.0

    def _wait_for(self, n: int) -> None:
        """Until the first n requests are complete."""
        backoff = BACKGROUND if in_background() else FOREGROUND
        if backoff is BACKGROUND and self._checked(self._calls.watched(n, self._requests, self._statuses)):
            return
        waited = np.zeros(2, np.int64)
        known = self._calls.functions, n, self._requests, self._statuses, self._flag, polls_per_wakeup(), waited
        with self._calls.polling():
            while not self._checked(service.wait_for_requests()(*known, *backoff)):
                pass

    def _checked(self, result: int) -> int:
        if result < 0:
            raise self._calls.error(-result)
        return result


@functools.cache
def polls_per_wakeup() -> int:
    """How often a thread looks between two naps. Local.

    Open MPI reads its sockets at the end of one call out of eight: the next one sees what came.
    """
    from mpi4py import MPI

    return 9 if MPI.get_vendor()[0] == "Open MPI" else 1


class WakeupPipe:
    """What another thread rings for one that waits, among other files or for it alone. Local.

    Args:
        waits: Whether there is nothing else that is waited for: for ``wait``.
    """

    def __init__(self, *, waits: bool = False) -> None:
        self.reads, self.writes = os.pipe()
        os.set_blocking(self.reads, waits)
        os.set_blocking(self.writes, False)

    def ring(self) -> None:
        """Wake who waits, now or when it waits next."""
        with suppress(BlockingIOError):  # it has been rung already, and nobody has come
            os.write(self.writes, b"!")

    def wait(self) -> None:
        """Sleep until it has been rung."""
        os.read(self.reads, service.DRAIN_BYTES)

    def __del__(self) -> None:
        for end in (self.reads, self.writes):
            os.close(end)


def files_of_events() -> list[int]:
    """The files of this process that tell what has happened to others (epoll): an MPI waits for its sockets with one.

    Local. Linux only; none elsewhere.
    """
    found = []
    for path in Path("/proc/self/fd").glob("*"):
        with suppress(OSError):  # the folder's own file has gone meanwhile
            if path.readlink().name == "anon_inode:[eventpoll]":
                found.append(int(path.name))
    return found


def polled(files: Sequence[int]) -> np.ndarray:
    """A struct pollfd for each: until something can be read."""
    kind = np.dtype([("fd", np.int32), ("events", np.int16), ("revents", np.int16)])
    return np.array([(file, select.POLLIN, 0) for file in files], kind)


def ask_for_short_slices() -> None:
    """Let this thread run soon after it wakes, and then for a short time only. Local.

    Others compute on its core, and a thread that wakes may otherwise have to wait until one of their slices is over,
    some milliseconds. Linux 6.12 and later know a slice of each thread's own; before, and elsewhere, nothing happens.
    """
    number = SCHED_SETATTR.get(platform.machine())
    if sys.platform == "linux" and number is not None and os.sched_getscheduler(0) == os.SCHED_OTHER:
        nice = os.getpriority(os.PRIO_PROCESS, 0)
        # struct sched_attr: its size, the normal policy, no flags; nice, no priority; the slice in nanoseconds.
        attributes = struct.pack("=IIQiIQQQ", 48, 0, 0, nice, 0, SLICE_NANOSECONDS, 0, 0)
        ctypes.CDLL(None).syscall(number, 0, attributes, 0)


def wait_all(requests: list[Any]) -> None:
    """Until all these requests of MPI are done. Local."""
    if requests:
        wait_with_backoff(lambda: bool(requests[0].Testall(requests)))


def pieces(*arrays: np.ndarray) -> list[Any]:
    """Their bytes as the service cuts them, for MPI."""
    from mpi4py import MPI

    raws, size = [array.view(np.uint8) for array in arrays], service.PIECE_BYTES
    return [[raw[at : at + size], MPI.BYTE] for raw in raws for at in range(0, raw.size, size)]
