"""Start commands on ranks, also from a process that is a rank itself, and leave no process behind."""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MPIS = ("openmpi", "mpich")

# These tell MPI that a process is a rank: a child that inherits them would try to join its parent's world.
LAUNCHER_PREFIXES = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "HYDRA_", "HYDI_", "MPI_LOCAL", "MPIR_CVAR_")
LAUNCHER_NAMES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMI_RANK", "PMIX_RANK")


_running: set[subprocess.Popen[bytes]] = set()

unmarked_test: str | None = None
"""The test that is running, if it is not marked `launches`. It may start no ranks, so that `make check` stays fast."""


@dataclass(frozen=True)
class Finished:
    """The result of a command. `output` is its stdout and stderr, interleaved as they came."""

    returncode: int
    output: str
    seconds: float
    timed_out: bool


def is_launched(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether an MPI launcher started this process. MPI need not be running."""
    return any(name in environ for name in LAUNCHER_NAMES)


def installed() -> tuple[str, ...]:
    """Return the MPIs that have an environment (`make setup`)."""
    return tuple(mpi for mpi in MPIS if (ROOT / ".venv" / mpi / "bin" / "mpirun").exists())


def python(mpi: str) -> str:
    """Return the path of the interpreter in the environment of an MPI, of this process's for "active"."""
    return sys.executable if mpi == "active" else str(ROOT / ".venv" / mpi / "bin" / "python")


@functools.cache
def sleep_when_idle() -> Path | None:
    """Compile the library that makes waiting ranks sleep (sleep_when_idle.cpp); return None without a compiler."""
    source = Path(__file__).with_name("sleep_when_idle.cpp")
    library = ROOT / "build" / "tests" / "sleep_when_idle.so"
    if library.exists() and library.stat().st_mtime >= source.stat().st_mtime:
        return library
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        return None
    library.parent.mkdir(parents=True, exist_ok=True)
    building = library.with_suffix(f".{os.getpid()}-{threading.get_ident()}")  # others compile it at the same time
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", str(building), str(source)], check=True)
    building.replace(library)
    return library


def environment(mpi: str, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment variables for a command under `mpi`: this process's, without those that a launcher set."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER_PREFIXES)}
    if mpi != "active":
        venv = ROOT / ".venv" / mpi
        env["VIRTUAL_ENV"] = str(venv)
        env["PATH"] = f"{venv / 'bin'}{os.pathsep}{env.get('PATH', '')}"
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # hundreds of processes: each would compile every module again
    env["OMP_NUM_THREADS"] = "1"
    env["PYTHONUNBUFFERED"] = "1"  # an abort loses nothing that was printed
    if library := sleep_when_idle():
        env["LD_PRELOAD"] = str(library)
    env.update(extra or {})
    return env


def launch(
    n_ranks: int,  # 0: the command itself, without a launcher
    command: Sequence[str],
    *,
    mpi: str = "openmpi",
    timeout_seconds: float = 240.0,
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
        _running.add(process)
        try:
            process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            _end_session(process)
            _running.discard(process)
        seconds = time.monotonic() - start
        output.seek(0)
        text = output.read().decode(errors="replace")
    return Finished(_exit_code(process.returncode, text), text, seconds, timed_out)


def _exit_code(returncode: int, output: str) -> int:
    """Return the exit code of a launch, also where Open MPI's launcher itself has crashed after it had ended the ranks.

    The launcher has then printed the code with which a rank ended all ranks. A rank that crashes has another exit code.
    """
    codes = re.findall(r"^ +Errorcode: (\d+)$", output, re.MULTILINE)
    if returncode != -signal.SIGSEGV or not codes or "prterun has exited due to" not in output:
        return returncode
    warnings.warn("mpirun crashed after it had ended all ranks", stacklevel=3)
    return int(codes[-1])


def end_all() -> None:
    """End all commands that `launch` has started and other threads wait for."""
    for process in list(_running):
        _end_session(process)


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """End every process of the session that `process` leads: Open MPI gives each rank a process group of its own."""
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
    """Return the running processes of a session. A zombie holds nothing and is left out."""
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
