"""Tries MPI's operations in ranks of their own, so that a crash or a hang is a result and not the end.

    here                     mpirun -n 2, its output in a file          two ranks (collectives.probe.child)
    start  ----------------> start ----------------------------------->  send, all-reduce, window creation, ...
    read   <-----------------------------------------------------------  a line a rank and operation, in files
    died, raised, or silent for too long: that is the verdict on the operation that both ranks have not ended;
    start again with those after it

All of it runs on one host. The ranks get the environment of this process without what a launcher has put into it: they
are no part of its world. What a user sets to choose how MPI works (OMPI_MCA_*, UCX_*, LD_LIBRARY_PATH) stays, because
that is what is tried.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OPERATIONS = (
    "send",
    "all-reduce",
    "window creation",
    "put",
    "get",
    "accumulate",
    "fetch_and_op",
    "rput",
    "rget",
    "lock",
)
MEMORIES = ("host", "pinned", "device")
"""Managed memory is not among them: nothing here allocates it, and the driver moves it about under MPI."""

WINDOW_CREATION = "window creation"
NEED_A_WINDOW = OPERATIONS[OPERATIONS.index(WINDOW_CREATION) + 1 :]

PROGRAM = ("-m", "mpitrain.collectives.probe.child")

START_SECONDS = 60.0
"""For two interpreters to start, MPI and the GPU included."""
HANG_SECONDS = 15.0
"""An operation that says nothing for so long hangs: it moves 16 MiB a few times."""
END_SECONDS = 5.0
"""For a pair to end by itself, or when asked to."""

# What launchers and resource managers tell their ranks. A child that inherits it would join its parent's world, or its
# launcher would start ranks on other hosts.
OF_LAUNCHERS = (
    "OMPI_",
    "PMIX_",
    "PMI_",
    "PRTE_",
    "OPAL_USER_",
    "HYDRA_",
    "HYDI_",
    "MPI_LOCAL",
    "SLURM",
    "PBS_",
    "LSB_",
)
OF_USERS = ("OMPI_MCA_", "PMIX_MCA_", "PMIX_PREFIX", "PRTE_PREFIX")
"""Settings whose names begin like those of launchers."""
PASSED_BY_LAUNCHERS = re.compile(
    "OMPI_MCA_(PREFIXES|cpu_type|initial_wdir|num_procs|orte_.*|ess.*|pmix.*|shmem_RUNTIME_QUERY_hint)"
)
"""What Open MPI's mpirun hands to its ranks as settings."""


@dataclass(frozen=True)
class Outcome:
    """What an operation came to.

    Attributes:
        verdict: ``ok``, ``wrong`` (bytes), ``error``, ``crashed``, ``hung`` or ``not tried``.
        detail: The error's first line, the signal, the reason.
        latency_us: Of 8 bytes; of a window of 16 MiB, made and freed.
        gb_per_s: At 16 MiB, where bytes move.
    """

    verdict: str
    detail: str = ""
    latency_us: float | None = None
    gb_per_s: float | None = None


Matrix = dict[str, dict[str, Outcome]]
"""By operation and memory."""


def measure(
    reasons: Mapping[str, str | None],
    operations: Sequence[str] = OPERATIONS,
    *,
    program: Sequence[str] = PROGRAM,
    hang_seconds: float = HANG_SECONDS,
) -> Matrix:
    """Try all operations with each kind of memory. Local; a second or two for each kind, more where something hangs.

    Args:
        reasons: By memory: why it cannot be tried, None where it can.
        operations: In this order.
        program: What a rank runs, after the interpreter's name.
        hang_seconds: See ``HANG_SECONDS``.
    """
    launcher = find_launcher()
    if launcher is None:
        why = "there is no mpirun beside the interpreter or on PATH"
        reasons = {memory: reason or why for memory, reason in reasons.items()}
    columns = {}
    for memory, reason in reasons.items():
        if reason is None and launcher is not None:
            command = [*_launch(launcher), sys.executable, *program]
            columns[memory] = _column(command, memory, operations, hang_seconds)
        else:
            columns[memory] = dict.fromkeys(operations, Outcome("not tried", reason or ""))
    return {operation: {memory: columns[memory][operation] for memory in columns} for operation in operations}


def find_launcher() -> str | None:
    """The mpirun of this interpreter's environment, else the one on PATH."""
    folders = (str(Path(sys.executable).parent), None)
    found = (shutil.which(name, path=folder) for folder in folders for name in ("mpirun", "mpiexec"))
    return next(filter(None, found), None)


def child_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """``environ`` without what launchers have put into it, and with what they need to start two ranks anywhere.

    As in jobs/local.sh: a container's root may, ranks that wait give way, Hydra forks whatever resource manager it
    believes to see.
    """
    inherited = {name: value for name, value in environ.items() if not _is_of_a_launcher(name)}
    allowed = [f"{who}_ALLOW_RUN_AS_ROOT{more}" for who in ("OMPI", "PRTE") for more in ("", "_CONFIRM")]
    defaults = {"OMPI_MCA_mpi_yield_when_idle": "1", "HYDRA_LAUNCHER": "fork", "OMP_NUM_THREADS": "1"}
    return defaults | inherited | dict.fromkeys(allowed, "1")


def _is_of_a_launcher(name: str) -> bool:
    if name.startswith(OF_USERS):
        return PASSED_BY_LAUNCHERS.fullmatch(name) is not None
    return name.startswith(OF_LAUNCHERS)


def _launch(launcher: str) -> list[str]:
    """The launcher with what it needs to start two ranks on any number of cores."""
    done = subprocess.run(
        [launcher, "--version"], capture_output=True, text=True, env=child_environment(os.environ), check=False
    )
    is_open_mpi = re.search("Open MPI|OpenRTE|PRRTE", done.stdout) is not None
    return [launcher, "-n", "2", *(["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"] if is_open_mpi else [])]


def _column(command: Sequence[str], memory: str, operations: Sequence[str], hang_seconds: float) -> dict[str, Outcome]:
    """All operations with one kind of memory."""
    outcomes: dict[str, Outcome] = {}
    left = list(operations)
    while left:
        attempt = _attempt(command, memory, left, hang_seconds)
        outcomes |= attempt.outcomes
        left = left[len(attempt.outcomes) :]
        if not left:
            break
        if not attempt.started:
            outcomes |= dict.fromkeys(left, attempt.failure)
            break
        failed, *left = left
        outcomes[failed] = attempt.failure
        if failed == WINDOW_CREATION:
            reason = Outcome("not tried", "no window can be made")
            outcomes |= {name: reason for name in left if name in NEED_A_WINDOW}
            left = [name for name in left if name not in NEED_A_WINDOW]
    return outcomes


@dataclass(frozen=True)
class Attempt:
    """What one pair of ranks did.

    Attributes:
        outcomes: Of what both ranks ended, in order.
        failure: Of what came next; of all that was asked for where the pair has not ``started``.
    """

    outcomes: dict[str, Outcome]
    failure: Outcome
    started: bool


@dataclass
class Report:
    """What a rank has written so far."""

    ready: bool = False
    problem: str = ""
    segments: list[str] = field(default_factory=list)
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def error(self) -> Outcome | None:
        """What it raised."""
        return next((Outcome(**record) for record in self.found.values() if record["verdict"] == "error"), None)


def _attempt(command: Sequence[str], memory: str, names: Sequence[str], hang_seconds: float) -> Attempt:
    with tempfile.TemporaryDirectory(prefix="mpitrain-probe-") as name:
        folder = Path(name)
        output = folder / "output"
        with output.open("wb") as file:
            process = _start([*command, name, memory, *names], file)
        try:
            silent = _watch(process, folder, names, hang_seconds)
        finally:
            _end(process, folder)
        ranks, text = _reports(folder), output.read_text(errors="replace")
    outcomes = dict(_agreed(ranks, names))
    started = all(report.ready for report in ranks)
    errors = [report.error for report in ranks if report.error is not None]
    if not started:
        problems = [report.problem for report in ranks if report.problem]
        lines = [line.strip() for line in text.splitlines() if line.strip(" -\n")]
        reasons = [f"no two ranks within {START_SECONDS:.0f} s"] if silent else [*lines[:1], "no two ranks started"]
        failure = Outcome("not tried", [*problems, *reasons][0])
    elif errors:
        failure = errors[0]
    elif silent:
        failure = Outcome("hung", f"nothing for {hang_seconds:g} s")
    else:
        failure = Outcome("crashed", _cause(text, process.returncode))
    return Attempt(outcomes, failure, started)


def _start(command: Sequence[str], output: Any) -> subprocess.Popen[bytes]:
    """On all cores: what pins this rank to one would pin both of the pair to it."""
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=child_environment(os.environ),
            start_new_session=True,
        )
    finally:
        os.sched_setaffinity(0, own)


def _watch(process: subprocess.Popen[bytes], folder: Path, names: Sequence[str], hang_seconds: float) -> bool:
    """Wait until the pair has done all or ends; whether it has fallen silent instead."""
    n_lines, since = 0, time.monotonic()
    while process.poll() is None:
        ranks = _reports(folder)
        if len(dict(_agreed(ranks, names))) == len(names):
            return False
        n = sum(report.ready + len(report.found) for report in ranks)
        if n != n_lines:
            n_lines, since = n, time.monotonic()
        if any(report.error or report.problem for report in ranks):
            limit_seconds = END_SECONDS
        else:
            limit_seconds = hang_seconds if all(report.ready for report in ranks) else START_SECONDS
        if time.monotonic() - since > limit_seconds:
            process.terminate()
            return True
        time.sleep(0.02)
    return False


def _end(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Nothing of the pair is left afterwards."""
    for end in (None, process.terminate, process.kill):
        if end is not None:
            end()
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
            break
    for file in folder.glob("*.pid"):
        with suppress(OSError):
            if str(folder) in Path(f"/proc/{file.stem}/cmdline").read_text():  # and not somebody else by now
                os.kill(int(file.stem), signal.SIGKILL)
    for report in _reports(folder):
        for segment in report.segments:
            Path(segment).unlink(missing_ok=True)


def _reports(folder: Path) -> list[Report]:
    ranks = []
    for rank in range(2):
        report = Report()
        with suppress(FileNotFoundError):
            text = (folder / f"rank-{rank}.jsonl").read_text()
            for line in text[: text.rfind("\n") + 1].splitlines():  # the last one may not be whole yet
                record = json.loads(line)
                report.ready = report.ready or "ready" in record
                report.problem = report.problem or record.get("problem", "")
                report.segments = report.segments or record.get("segments", [])
                if "operation" in record:
                    report.found[record.pop("operation")] = record
        ranks.append(report)
    return ranks


def _agreed(ranks: Sequence[Report], names: Sequence[str]) -> list[tuple[str, Outcome]]:
    """The operations that both ranks have ended without an exception; wrong on one is wrong."""
    agreed = []
    for name in names:
        records = [report.found.get(name) for report in ranks]
        if any(record is None or record["verdict"] == "error" for record in records):
            break
        first, second = (Outcome(**record) for record in records if record is not None)
        agreed.append((name, second if second.verdict == "wrong" else first))
    return agreed


def _cause(output: str, code: int) -> str:
    """Which signal ended a rank, as launchers tell it; their own exit codes differ."""
    found = re.search(r"signal:? (\d+)", output, re.IGNORECASE)
    return f"signal {found[1]}" if found else f"exit code {code}"
