"""The end of Open MPI's launcher where it cannot reach all hosts.

When a rank has called MPI_Abort, the launcher waits for its daemons on all hosts. If the link to one of them is cut, it
waits until TCP gives up, a quarter of an hour later. A process that a rank on the launcher's host starts therefore
ends the launcher, which then returns 1 instead of the code of the rank.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from mpitrain.collectives.world.launchers import openmpi_starts_other_hosts

LAUNCHER_SECONDS = 15.0
"""How long Open MPI's launcher may take to end all ranks before it is ended itself."""

LAUNCHERS = ("prterun", "mpirun", "mpiexec")
"""The names of Open MPI's launcher. A rank of another host is a child of a daemon instead."""

# Open MPI's launcher ends at once at the second SIGTERM. A process is identified by its number and start time. The
# remote shells of the launcher, each in a process group of its own, would keep its standard output open.
WATCH = """
import os, signal, sys, time
pid, start, seconds = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
def runs():
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[19] == start
    except OSError:
        return False
def shells():
    try:
        children = [int(word) for word in open(f"/proc/{pid}/task/{pid}/children").read().split()]
        return {os.getpgid(child) for child in children} - {os.getpgid(pid)}
    except OSError:
        return set()
deadline = time.monotonic() + seconds
while runs() and time.monotonic() < deadline:
    time.sleep(0.5)
groups = shells() if runs() else ()
for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
    if runs():
        os.kill(pid, number)
        time.sleep(1)
for group in groups:
    try:
        os.killpg(group, signal.SIGTERM)
    except OSError:
        pass
"""


def abort(comm: Any, code: int) -> None:
    """Let MPI end all ranks now, with this exit code. Local.

    Args:
        comm: A communicator of all ranks.
        code: The exit code, not 0.
    """
    watch_launcher()
    comm.Abort(code)


def watch_launcher() -> None:
    """Start a process that ends Open MPI's launcher if it waits for a host that it cannot reach. Local."""
    if not openmpi_starts_other_hosts():
        return
    launcher = os.getppid()
    with suppress(OSError, IndexError):
        name, _, facts = Path(f"/proc/{launcher}/stat").read_text().rpartition(")")
        if name.partition("(")[2] in LAUNCHERS:
            subprocess.Popen(
                [sys.executable, "-I", "-c", WATCH, str(launcher), facts.split()[19], str(LAUNCHER_SECONDS)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # the launcher ends the process groups of all ranks
            )
