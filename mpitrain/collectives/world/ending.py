"""The end of all ranks after an error: as quietly as the launcher allows, so that the error is the last thing seen.

Launchers print a report of their own, a dozen lines with Open MPI, when a rank calls MPI_Abort or exits with a code
other than 0 while others are running. Two endings avoid it:

- If all ranks have failed, they notify rank 0, finalize MPI and exit with code 0; rank 0 exits last, with the
  code of the error, which becomes that of the launcher.
- If one rank has failed, the others may be waiting for it and must be ended. Under Open MPI's own launcher an exit code
  other than 0 ends them with a third of the lines that MPI_Abort prints.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

from mpitrain.collectives.world.failure_detector import ulfm_requested
from mpitrain.collectives.world.launcher_watch import abort, watch_launcher
from mpitrain.collectives.world.launchers import is_launched, is_set, launched_rank
from mpitrain.collectives.world.thread_level import import_mpi
from mpitrain.collectives.world.watchdog import watchdog
from mpitrain.errors import OUTPUT_SECONDS, TURN_SECONDS, UsageError, printable

GRACE_SECONDS = 5.0
"""How long a failed rank waits for the others to fail too."""

LAST_SECONDS = 2.0
"""How long rank 0 waits, at most, until the processes of the other ranks are gone."""

POLL_SECONDS = 0.01

TAG = 32_749
"""Tag of the messages between failed ranks. They use MPI_COMM_WORLD, which mpitrain does not use for anything else."""

DAEMONS = ("prterun", "prted", "mpirun", "mpiexec")
"""Programs of Open MPI 5 that start ranks and end all of them after an exit code other than 0."""


def end_with_line(text: str, code: int, *, on_all_ranks: bool = False, after_death: bool = False) -> int:
    """Print an error in one line, on one rank, and end all ranks; return the exit code if there is only one rank.

    Args:
        text: The line, without the name of the program.
        code: The exit code.
        on_all_ranks: Whether all ranks find the same error, so that only the first one prints it.
        after_death: Whether the error is the death of a rank.
    """
    comm = _world() if is_launched() else None
    if comm is None or comm.Get_size() == 1:
        rank = launched_rank()
        if rank != 0:
            time.sleep(GRACE_SECONDS)  # a launcher may end all processes when the first ends: let that be number 0
        if rank == 0 or not on_all_ranks:
            _print_line(text, rank)
        return code
    rank = comm.Get_rank()
    if rank == 0:
        _print_line(text, rank)
    if after_death:
        time.sleep(0.0 if rank == 0 else GRACE_SECONDS + rank * TURN_SECONDS)
    elif all_have_failed():
        exit_in_order(code)
    if rank != 0:
        _print_line(text, rank)
    return end_all(comm, code)


def _world() -> Any:
    """Return MPI's communicator of all ranks, and start MPI if necessary; None if it cannot be started."""
    try:
        MPI = import_mpi()
    except (ImportError, RuntimeError, UsageError):
        return None
    return None if MPI.Is_finalized() else MPI.COMM_WORLD


def _print_line(text: str, rank: int) -> None:
    where = f" (rank {rank})" if rank else ""
    sys.stderr.write(f"mpitrain: error{where}: {printable(text)}\n")
    sys.stderr.flush()


def all_have_failed(grace_seconds: float = GRACE_SECONDS) -> bool:
    """Return whether every rank calls this function within the grace time. Collective if so, else Local.

    MPI must be running. The result is False if a rank is dead.
    """
    from mpi4py import MPI

    try:
        return _all_have_failed(grace_seconds)
    except MPI.Exception:
        return False


def _all_have_failed(grace_seconds: float) -> bool:
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    rank, size = comm.Get_rank(), comm.Get_size()
    deadline = time.monotonic() + grace_seconds
    if rank != 0:
        request = comm.isend((socket.gethostname(), os.getpid()), 0, TAG)
        answered = _poll(lambda: comm.Iprobe(0, TAG), deadline)
        if answered:
            comm.recv(source=0, tag=TAG)
            request.wait()
        return answered
    for _ in range(size - 1):
        if not _poll(lambda: comm.Iprobe(MPI.ANY_SOURCE, TAG), deadline):
            return False
        _processes.append(comm.recv(source=MPI.ANY_SOURCE, tag=TAG))
    for other in range(1, size):
        comm.send(None, other, TAG)
    return True


_processes: list[tuple[str, int]] = []
"""Host and process number of the other ranks; on rank 0, once all ranks have failed."""


def _poll(condition: Any, deadline: float) -> bool:
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def exit_in_order(code: int) -> NoReturn:
    """End this rank after ``all_have_failed``. Rank 0 ends last, so its exit code is that of the run. Collective."""
    from mpi4py import MPI

    rank = MPI.COMM_WORLD.Get_rank()
    _flush()
    backup = threading.Timer(GRACE_SECONDS, os._exit, (code,))  # a window that is still in use may block MPI
    backup.daemon = True
    backup.start()
    atexit._run_exitfuncs()
    if not MPI.Is_finalized():
        MPI.Finalize()
    if rank == 0:
        here = socket.gethostname()
        _poll(
            lambda: not any(_exists(pid) for host, pid in _processes if host == here), time.monotonic() + LAST_SECONDS
        )
        time.sleep(OUTPUT_SECONDS)  # ranks of other hosts; and the launcher must have noticed
    _flush()
    ctypes.CDLL(None).exit(code if rank == 0 else 0)  # MPICH's launcher must hear from a function that C calls at exit
    raise AssertionError("unreachable")


def end_all(comm: Any, code: int) -> NoReturn:
    """End all ranks now, with this exit code. Local.

    Args:
        comm: A communicator of all ranks.
        code: The exit code, not 0.
    """
    watchdog.announce_end_of_all()
    _flush()
    time.sleep(OUTPUT_SECONDS)
    if _exit_ends_all(code):
        watch_launcher()
        os._exit(code)
    abort(comm, code)
    os._exit(code)


def _exit_ends_all(code: int) -> bool:
    """Return whether the launcher ends all ranks when this process exits with the code."""
    if code == 0 or ulfm_requested() or not is_set("OMPI_COMM_WORLD_SIZE"):
        return False
    try:
        return Path(f"/proc/{os.getppid()}/comm").read_text().strip() in DAEMONS
    except OSError:
        return False


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):  # closed, or absent
            continue
