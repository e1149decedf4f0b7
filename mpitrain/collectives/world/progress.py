"""Progress for ranks whose peers on other nodes compute, and service to their requests for large data.

MPI lets the origin of a Get wait until its target calls MPI again, and over TCP every MPI does so by default: a Get
from a rank that computes for a second takes a second. Between nodes each rank therefore runs a thread that calls MPI
every millisecond, in compiled code that does not wait for Python's interpreter lock. Between the ranks of one node this
is not needed: there are no messages.

The interval of a millisecond is for networks of which nothing is known. MPIs wait for their sockets with an epoll file
on Linux, and other threads can wait for that file too. Where these files have announced arriving messages, the thread
sleeps until they do, and an idle thread costs the rank that computes next to nothing. A message that another thread of
the rank reads from the socket is not announced. A thread that polls MPI for long therefore says so (``polling``), or a
request is served up to 5 ms late. Where the files are trusted, a background exchange does not poll at all: the serving
thread polls for both (``NativeMPI.watched``).

The thread also serves requests from ranks of other nodes: it acquires a lock and sends the block, receives the block
and releases the lock. An exchange is thus two round trips, and neither waits for the computation of this rank. MPI's
own Get would be the natural way. But over TCP Open MPI sends one to two times as many bytes towards the target as the
Get brings back (``am_rdma_start`` makes the request as long as its answer), and both MPIs use one direction of a
link at a time for messages that they negotiate. Short messages fill both.
"""

from __future__ import annotations

import atexit
import itertools
import sys
import threading
import time
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from mpitrain.collectives.world.fault_tolerance import FaultTolerance, wait_to_be_ended
from mpitrain.collectives.world.service import TAGS, Service
from mpitrain.collectives.world.transfers import NativeMPI, polls_per_wakeup
from mpitrain.collectives.world.wakeup import event_files, poll_structs, request_short_slices
from mpitrain.errors import RankFailed
from mpitrain.kernels.native import service

MOST_AWAITED = 16
"""Locks that a thread of a rank may wait for at one home."""

SLOTS_OF_A_RANK = 2 * MOST_AWAITED + 4  # two of its threads exchange; a request that returns a block never waits

SHUTDOWN_POLL_SECONDS = 0.01  # of a rank at its end for the others


class ProgressThread(Service):
    """A thread that serves requests of other ranks until ``stop``, and this rank's requests to theirs.

    Collective to create, because it duplicates ``comm``.

    Args:
        comm: The ranks. MPI must have been started with MPI_THREAD_MULTIPLE.
        fault_tolerance: The handling of dead ranks; by default, a death ends all ranks.
    """

    def __init__(self, comm: Any, fault_tolerance: FaultTolerance | None = None) -> None:
        self._comm = comm.Dup()  # kept alive: compiled code has only its handle
        fault_tolerance = fault_tolerance or FaultTolerance(self._comm)
        self._ending = fault_tolerance.part(comm.Dup())
        self._size: int = comm.Get_size()
        super().__init__(NativeMPI(self._comm, fault_tolerance), range(self._size), itertools.cycle(TAGS))
        self._thread = threading.Thread(target=self._run, name="mpi-progress", daemon=True)
        self._thread.start()
        atexit.register(self._end)  # runs before MPI is finalized

    def _run(self) -> None:
        request_short_slices()
        mpi, n_ranks = self._mpi, self._size
        n_slots = SLOTS_OF_A_RANK * n_ranks
        flag = np.zeros(2, np.int32)
        requests = np.zeros((n_ranks, service.MOST_REQUESTS * service.REQUEST_WORDS), np.int64)
        states = np.zeros((n_slots, service.STATE_WORDS), np.int64)
        statuses = np.zeros(service.N_PIECES * mpi.status_bytes, np.uint8)
        pieces = np.zeros((n_slots * service.N_PIECES + n_ranks) * mpi.request_bytes, np.uint8)
        files, drain = poll_structs([mpi.wakeup.reads, *event_files()]), np.zeros(service.DRAIN_BYTES, np.uint8)
        slots = np.arange(n_slots)
        arrays = flag, requests, statuses, pieces, states, files
        memory = [array.ctypes.data for array in arrays]
        memory += [files.size, mpi.wakeup.reads, drain.ctypes.data]
        self._buffers = *arrays, slots, drain  # kept alive: MPI may still write to them after an error
        result = service.serve()(
            mpi.functions,
            mpi.comm,
            mpi.byte,
            mpi.request_bytes,
            polls_per_wakeup(),
            mpi.shared,
            flag,
            requests,
            states,
            slots,
            mpi.dead,
            np.array(memory, np.int64),
        )
        if result < 0:
            mpi.close(result)
            wait_to_be_ended()
            raise RuntimeError(f"this rank can no longer serve other nodes: {mpi.error(-result)}")

    @property
    def cpu_seconds(self) -> float:
        """The CPU time of this thread so far. Local; before its end."""
        return time.clock_gettime(time.pthread_getcpuclockid(self._thread.ident)) if self._thread.ident else 0.0

    def polling(self) -> AbstractContextManager[None]:
        """Return a context in which this thread polls MPI with pauses, because the calling thread polls, too. Local."""
        return self._mpi.polling()

    def _end(self) -> None:
        """Serve until every living rank has reached its end, then stop. Collective, even if one has stopped before.

        The rank that ends first holds data that the others still request; in MPI_Finalize it could not answer.
        """
        from mpi4py import MPI

        try:
            if not MPI.Is_finalized():
                with self.polling():
                    self._ending.run_on_survivors(self._wait_for_all)
        except BaseException as error:  # atexit would only print it and go on: the others would wait
            if isinstance(error, MPI.Exception):
                wait_to_be_ended()
            sys.excepthook(type(error), error, error.__traceback__)
        finally:
            self.stop()

    def _wait_for_all(self, comm: Any) -> None:
        """Wait for all ranks, with pauses between polls. Collective.

        Raises:
            RankFailed: A rank of ``comm`` is known to be dead. Open MPI would say in its own words that it is.
        """
        if len(self._ending.dead) > self._ending.size - comm.Get_size():
            raise RankFailed("a rank died before its end")
        ended = comm.Ibarrier()
        while not ended.Test():
            time.sleep(SHUTDOWN_POLL_SECONDS)

    def stop(self) -> None:
        """End the thread. Local; safe to call again."""
        if self._thread.is_alive():
            self._mpi.shared[service.STOP] = 1
            self._mpi.wakeup.wake()
            self._thread.join()
