"""Run all benchmarks on one NVIDIA GPU and write the page of results; ``make bench-gpu`` calls it.

    python -m benchmarks.gpu.run [kernels] [exchange] [training]

Nothing needs to be installed but what runs: this Python has CuPy, torch and mpi4py, and mpitrain is taken from this
checkout. mpirun is $MPIRUN, else the one beside this Python, else the first on PATH; without one only the kernels are
measured. What fails or takes too long does not stop the others; the names come at the end.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu import machine as gpu_machine

ROOT = Path(__file__).resolve().parents[2]
GRACE_SECONDS = 10.0  # for mpirun to end its ranks


@dataclass(frozen=True)
class Run:
    """One benchmark.

    Attributes:
        name: Of its results.
        n_ranks: Of mpirun; 0 without it.
        command: The module, and its arguments.
        limit_seconds: After which it has failed. All of them together stay below ten minutes.
    """

    name: str
    n_ranks: int
    command: tuple[str, ...]
    limit_seconds: float


# With more ranks the vectors are fewer: eight of them fill the memory of the host that stands behind staging.
OF_MANY = ("benchmarks.gpu.exchange", "--sizes", "16M,256M", "--repeats", "10")
PARTS = {
    "kernels": (Run("gpu-kernels", 0, ("benchmarks.gpu.kernels",), 150),),
    "exchange": (
        Run("gpu-exchange-2", 2, ("benchmarks.gpu.exchange",), 90),
        Run("gpu-exchange-4", 4, OF_MANY, 75),
        Run("gpu-exchange-8", 8, OF_MANY, 90),
    ),
    "training": (Run("gpu-training", 2, ("benchmarks.gpu.training",), 150),),
}


def find_mpirun(environment: Mapping[str, str]) -> str | None:
    """Return the absolute path of mpirun, or None.

    Raises:
        FileNotFoundError: $MPIRUN is no program in a folder called bin, as every MPI has it.
    """
    wanted = environment.get("MPIRUN")
    if wanted:
        found = shutil.which(wanted, path=environment.get("PATH"))
        if found is None or Path(found).name != "mpirun" or Path(found).absolute().parent.name != "bin":
            raise FileNotFoundError(f"MPIRUN={wanted} is not the bin/mpirun of an MPI")
        return str(Path(found).absolute())
    beside = shutil.which("mpirun", path=str(Path(sys.executable).parent))
    return beside or shutil.which("mpirun", path=environment.get("PATH"))


def command_of(run: Run) -> list[str]:
    """Return the command of a benchmark."""
    benchmark = [sys.executable, "-m", *run.command]
    return ["jobs/local.sh", str(run.n_ranks), *benchmark] if run.n_ranks else benchmark


def environment_of(run: Run, mpirun: str | None) -> dict[str, str]:
    """Return this process's environment, with mpitrain from this checkout and the chosen mpirun."""
    environment = dict(os.environ)
    paths = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    environment["PYTHONUNBUFFERED"] = "1"
    if run.n_ranks and mpirun is not None:
        environment["VIRTUAL_ENV"] = str(Path(mpirun).parent.parent)  # whose mpirun jobs/local.sh takes
    return environment


def record(run: Run, mpirun: str | None) -> str | None:
    """Run a benchmark and keep its results; return why it failed, else None."""
    if run.n_ranks and mpirun is None:
        return "there is no mpirun: put one on PATH or name it by MPIRUN=..."
    command = command_of(run)
    print(f"== {run.name}: {shlex.join(command)}", flush=True)
    why = finished(
        [sys.executable, "-m", "benchmarks.pages.record", run.name, *command], environment_of(run, mpirun), run
    )
    page = ROOT / "docs" / "benchmarks" / f"{run.name}.md"
    if why is None:  # where this machine keeps its Python is nobody's business
        page.write_text(page.read_text().replace(sys.executable, "python3"))
    return why


def finished(command: Sequence[str], environment: Mapping[str, str], run: Run) -> str | None:
    """Run a command with a time limit, in the checkout; return why it failed, else None."""
    began = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, env=dict(environment), start_new_session=True)
    try:
        code = process.wait(run.limit_seconds)
    except subprocess.TimeoutExpired:
        _end(process)
        return f"took more than {run.limit_seconds:g} s"
    except BaseException:
        _end(process)
        raise
    print(f"== {run.name}: {time.monotonic() - began:.0f} s", flush=True)
    return f"exit code {code}" if code else None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and its whole session, since mpirun puts each rank in its own process group."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        until = time.monotonic() + GRACE_SECONDS
        left = _members(process.pid)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, sign)
        while left and time.monotonic() < until:
            process.poll()
            left = _members(process.pid)
            time.sleep(0.05)
    process.wait()


def _members(session: int) -> list[int]:
    """Return the live processes of a session."""
    members = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, ValueError):
                state, _, _, sid = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(sid) == session and state != "Z":
                    members.append(int(entry.name))
    return members


def main(
    arguments: Sequence[str] | None = None,
    problem: Callable[[], str | None] = gpu_machine.problem,
    start: Callable[[Run, str | None], str | None] = record,
) -> int:
    """Run the benchmark and return the exit code.

    Args:
        arguments: Of the command line.
        problem: Why nothing can be measured here, else None.
        start: Makes one run; why it failed, else None.
    """
    parser = argparse.ArgumentParser(description="All benchmarks on a GPU.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.parts if name not in PARTS]
    if unknown:
        parser.error(f"there is no part {', '.join(unknown)}: choose from {', '.join(PARTS)}")
    why_not = problem()
    if why_not:
        print(f"bench-gpu: {why_not}", file=sys.stderr)
        return 2
    try:
        mpirun = find_mpirun(os.environ)
    except FileNotFoundError as error:
        print(f"bench-gpu: {error}", file=sys.stderr)
        return 2
    failed = {}
    for run in [run for name in PARTS if name in (options.parts or PARTS) for run in PARTS[name]]:
        why = start(run, mpirun)
        if why:
            print(f"== {run.name} failed: {why}", flush=True)
            failed[run.name] = why
    page = Run("gpu-page", 0, ("benchmarks.pages.gpu_page",), 60)
    why = finished(command_of(page), environment_of(page, None), page)
    if why:
        failed["the page"] = why
    if failed:
        print(f"failed: {'; '.join(f'{name} ({why})' for name, why in failed.items())}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
