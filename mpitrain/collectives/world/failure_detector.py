"""Detection of dead ranks, where launcher and MPI let the others survive (ULFM)."""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
from collections.abc import Collection
from typing import Any

import numpy as np

from mpitrain.collectives.world.background import threads_may_call_mpi
from mpitrain.collectives.world.launcher_watch import abort
from mpitrain.collectives.world.watchdog import watchdog
from mpitrain.errors import OUTPUT_SECONDS, UsageError
from mpitrain.log import logger

FAILURE_POLL_SECONDS = 0.02

SWITCH = "OMPI_MCA_mpi_ft_enable"
"""Environment: what ``mpirun --with-ft ulfm`` sets for its ranks."""

FINALIZE_WITHOUT_BARRIER = "ompi_async_mpi_finalize"
"""Of Open MPI's library: the flag behind its parameter of that name."""

NOBODY: frozenset[int] = frozenset()


def ulfm_requested() -> bool:
    """Return whether the launcher lets ranks survive the death of another rank. Local; MPI need not be running."""
    return os.environ.get(SWITCH, "").lower() in ("1", "true", "yes")


def ulfm_available() -> bool:
    """Return whether launcher and MPI let ranks survive and notice the death of another rank. Local.

    If so, this call also disables the launcher's barrier in MPI_Finalize, which a dead rank would never reach.

    Raises:
        UsageError: The launcher lets ranks survive, but this MPI allows only one thread to call it, so no thread can
            poll for failures. Or the barrier cannot be disabled.
    """
    from mpi4py import MPI

    if not ulfm_requested() or MPI.get_vendor()[0] != "Open MPI":
        return False
    if not threads_may_call_mpi():
        raise UsageError(
            "this MPI lets only one thread of a rank call it (mpitrain info), but surviving the death of a rank needs "
            "two threads: remove --with-ft ulfm"
        )
    try:  # the parameter itself is read when MPI starts, which a script may have done before
        ctypes.c_bool.in_dll(ctypes.CDLL(MPI.__file__), FINALIZE_WITHOUT_BARRIER).value = True
    except ValueError as error:
        raise UsageError(
            f"this Open MPI's MPI_Finalize would wait for a rank that died ({error}): remove --with-ft ulfm"
        ) from error
    return True


def names_of(ranks: Collection[int]) -> str:
    """Return ``rank 2``, or ``ranks 1, 3``."""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, sorted(ranks)))}"


class FailureDetector:
    """A thread that polls MPI for dead ranks. Local to create.

    Args:
        comm: The ranks.
        leaves_no_survivors: Whether a death ends all ranks, because none can continue without all others.

    Attributes:
        dead: The ranks known to have died. The set is replaced when it changes.
        dead_words: (ranks,) int64, 1 for each rank in ``dead``, for compiled code.
        leaves_no_survivors: See the argument.
    """

    def __init__(self, comm: Any, *, leaves_no_survivors: bool) -> None:
        self.dead, self.dead_words = NOBODY, np.zeros(comm.Get_size(), np.int64)
        self._reported = NOBODY
        self.leaves_no_survivors = leaves_no_survivors
        self._comm, self._rank, self._size = comm, comm.Get_rank(), comm.Get_size()
        self._stopped, self._polling = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._run, name="mpi-failures", daemon=True)
        self._thread.start()
        atexit.register(self.stop)  # runs before MPI is finalized

    def _run(self) -> None:
        while not self._stopped.wait(FAILURE_POLL_SECONDS):
            self.poll()

    def poll(self) -> None:
        """Update ``dead``. Local.

        The lowest surviving rank reports new deaths. Its first report names all deaths: a lower rank may have died
        before it reported them, and ranks learn of deaths in different orders.
        """
        from mpi4py import MPI

        MPI.COMM_SELF.Iprobe()  # MPI detects failures inside calls; no rank of this communicator dies
        with self._polling:
            failed, ours = self._comm.Get_failed(), self._comm.Get_group()
            dead = frozenset(MPI.Group.Translate_ranks(failed, range(failed.Get_size()), ours))
            failed.Free()
            ours.Free()
            self.dead_words[list(dead)] = 1
            self.dead, new = dead, NOBODY
            if self._rank == min(set(range(self._size)) - dead):
                new, self._reported = dead - self._reported, dead
        if new:
            self._report(new)

    def _report(self, new: frozenset[int]) -> None:
        text = f"{names_of(new)} of {self._size} died"
        if self.leaves_no_survivors:
            text += ", with memory that the others need: resume from the newest checkpoint"
        logger.critical(text)
        if self.leaves_no_survivors:
            watchdog.announce_end_of_all()
            self._stopped.wait(OUTPUT_SECONDS)
            abort(self._comm, 1)

    def stop(self) -> None:
        """End the thread. Local; safe to call again."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
