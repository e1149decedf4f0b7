"""Starts commands on ranks of their own, also from a process that is a rank itself, and never leaves one behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MPIS = ("openmpi", "mpich")

# A rank's environment tells MPI that it is a rank; a child that inherits it would try to join its parent's world.
LAUNCHER_PREFIXES = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "HYDRA_", "HYDI_", "MPI_LOCAL", "MPIR_CVAR_")
LAUNCHER_NAMES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMI_RANK", "PMIX_RANK")


unmarked_test: str | None = None
"""The test that is running, if it has no mark `launches`: the mark is what `make check` leaves out."""


@dataclass(frozen=True)
class Finished:
    """What is left of a command: `output` is stdout and stderr as they came."""

    returncode: int
    output: str
    seconds: float
    timed_out: bool


def is_launched(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether an MPI launcher started this process; asked of the environment, so that MPI need not be started."""
    return any(name in environ for name in LAUNCHER_NAMES)


def installed() -> tuple[str, ...]:
    """The MPIs that `make setup` has made an environment for."""
    return tuple(mpi for mpi in MPIS if (ROOT / ".venv" / mpi / "bin" / "mpirun").exists())


def python(mpi: str) -> str:
    """The interpreter of an MPI's environment; of this process for "active"."""
    return sys.executable if mpi == "active" else str(ROOT / ".venv" / mpi / "bin" / "python")


def environment(mpi: str, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment, without what a launcher put into it, with the virtual environment of `mpi` active."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER_PREFIXES)}
    if mpi != "active":
        venv = ROOT / ".venv" / mpi
        env["VIRTUAL_ENV"] = str(venv)
        env["PATH"] = f"{venv / 'bin'}{os.pathsep}{env.get('PATH', '')}"
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # hundreds of processes: each would compile every module again
    env["OMP_NUM_THREADS"] = "1"
    env["PYTHONUNBUFFERED"] = "1"  # what was printed before an abort is there to read
    env.update(extra or {})
    return env


def launch(
    n_ranks: int,  # 0: the command itself, without a launcher
    command: Sequence[str],
    *,
    mpi: str = "openmpi",
    timeout_seconds: float = 60.0,
    extra_env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
) -> Finished:
    """Run `command` on `n_ranks` ranks until it ends, or end all its processes after `timeout_seconds`."""
    if n_ranks and unmarked_test:
        raise RuntimeError(f"{unmarked_test} starts ranks: mark it with pytest.mark.launches")
    full = [str(ROOT / "jobs" / "local.sh"), str(n_ranks), *command] if n_ranks else list(command)
    start = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            full,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(mpi, extra_env),
            cwd=cwd or ROOT,
            start_new_session=True,
        )
        timed_out = False
        try:
            process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            _end_session(process)
        seconds = time.monotonic() - start
        output.seek(0)
        text = output.read().decode(errors="replace")
    return Finished(process.returncode, text, seconds, timed_out)


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """Ends every process of the session that `process` leads: Open MPI gives each rank a process group of its own."""
    for sign, limit_seconds in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        deadline = time.monotonic() + limit_seconds
        left = _session_members(process.pid)
        for pid in left:
            try:
                os.kill(pid, sign)
            except ProcessLookupError:
                continue
        while left and time.monotonic() < deadline:
            process.poll()
            left = _session_members(process.pid)
            time.sleep(0.02)
    process.wait()


def _session_members(session: int) -> list[int]:
    """The living processes of a session (a zombie holds nothing and counts as gone)."""
    members = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            state, _, _, sid = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):
            continue
        if int(sid) == session and state != "Z":
            members.append(int(entry.name))
    return members
