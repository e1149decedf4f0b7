"""Progress for one-sided operations whose target computes.

MPI lets the origin of a Get wait until its target calls MPI again, and over TCP every MPI does so by default: a Get
from a rank that computes for a second takes a second. Between nodes each rank therefore runs a thread that gives MPI
a chance every millisecond. Between the ranks of one node nothing of the kind is needed: there is no message.
"""

from __future__ import annotations

import atexit
import threading
from typing import Any

PERIOD_SECONDS = 1e-3


class ProgressThread:
    """Calls ``Iprobe`` on a communicator of its own until ``stop``. Collective to create (it duplicates ``comm``).

    Args:
        comm: The ranks between which there must be progress.
        period_seconds: Between two calls: the longest that a peer waits for this rank's attention.
    """

    def __init__(self, comm: Any, period_seconds: float = PERIOD_SECONDS) -> None:
        self._comm = comm.Dup()
        self._period_seconds = period_seconds
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mpi-progress", daemon=True)
        self._thread.start()
        atexit.register(self.stop)  # runs before MPI is finalized

    def _run(self) -> None:
        rank = self._comm.Get_rank()
        while not self._stopped.wait(self._period_seconds):
            self._comm.Iprobe(source=rank)

    def stop(self) -> None:
        """End the thread. Local; safe to call again."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
