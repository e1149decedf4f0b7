"""Trials of MPI's operations in a separate job of two ranks, where a crash or a hang is a result.

    here                     mpirun -n 2, its output in a file          two ranks (collectives.probe.child)
    start  ----------------> start ----------------------------------->  send, all-reduce, window creation, ...
    read   <-----------------------------------------------------------  a line per rank and operation, in files
    a rank died, raised an exception, or was silent for too long: that is the verdict on the operation that the two
    ranks did not complete; start again with the operations after it

All of it runs on one host.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpitrain.collectives.probe.launcher import child_environment, find_launcher, launch_command
from mpitrain.collectives.probe.outcome import NEED_A_WINDOW, OPERATIONS, WINDOW_CREATION, Matrix, Outcome
from mpitrain.collectives.probe.reports import Report, completed, read_reports

PROGRAM = ("-m", "mpitrain.collectives.probe.child")

START_SECONDS = 60.0
"""Longest start of two interpreters, MPI and the GPU included."""
HANG_SECONDS = 15.0
"""An operation that is silent for this long hangs: it moves 16 MiB a few times."""
END_SECONDS = 5.0
"""Longest end of a pair, by itself or when terminated."""


def measure(
    reasons: Mapping[str, str | None],
    operations: Sequence[str] = OPERATIONS,
    *,
    program: Sequence[str] = PROGRAM,
    hang_seconds: float = HANG_SECONDS,
) -> Matrix:
    """Try operations with each kind of memory. Local; it takes about two seconds for each kind, longer after a hang.

    Args:
        reasons: For each kind of memory, the reason why it cannot be tried, or None if it can.
        operations: The operations, in order.
        program: The arguments with which each rank starts its Python interpreter.
        hang_seconds: See ``HANG_SECONDS``.
    """
    launcher = find_launcher()
    if launcher is None:
        why = "there is no mpirun beside the interpreter or on PATH"
        reasons = {memory: reason or why for memory, reason in reasons.items()}
    columns = {}
    for memory, reason in reasons.items():
        if reason is None and launcher is not None:
            command = [*launch_command(launcher), sys.executable, *program]
            columns[memory] = _column(command, memory, operations, hang_seconds)
        else:
            columns[memory] = dict.fromkeys(operations, Outcome("not tried", reason or ""))
    return {operation: {memory: columns[memory][operation] for memory in columns} for operation in operations}


def _column(command: Sequence[str], memory: str, operations: Sequence[str], hang_seconds: float) -> dict[str, Outcome]:
    """Try all operations with one kind of memory."""
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
    """The result of one pair of ranks.

    Attributes:
        outcomes: The outcomes of the operations that both ranks have completed, in order.
        failure: The outcome of the operation after those, or of all operations if the pair has not started.
        started: Whether both ranks have started.
    """

    outcomes: dict[str, Outcome]
    failure: Outcome
    started: bool


def _attempt(command: Sequence[str], memory: str, names: Sequence[str], hang_seconds: float) -> Attempt:
    with tempfile.TemporaryDirectory(prefix="mpitrain-probe-") as name:
        folder = Path(name)
        output = folder / "output"
        with output.open("wb") as file:
            process = _start([*command, name, memory, *names], file)
        try:
            silent = _wait(process, folder, names, hang_seconds)
        finally:
            _end(process, folder)
        reports, text = read_reports(folder), output.read_text(errors="replace")
    outcomes = dict(completed(reports, names))
    if not all(report.ready for report in reports):
        return Attempt(outcomes, _start_failure(reports, text, silent=silent), started=False)
    errors = [report.error for report in reports if report.error is not None]
    if errors:
        failure = errors[0]
    elif silent:
        failure = Outcome("hung", f"nothing for {hang_seconds:g} s")
    else:
        failure = Outcome("crashed", _cause(text, process.returncode))
    return Attempt(outcomes, failure, started=True)


def _start_failure(reports: Sequence[Report], text: str, *, silent: bool) -> Outcome:
    """Return why the pair has not started: a rank's own problem, else the first line of the output."""
    problems = [report.problem for report in reports if report.problem]
    lines = [line.strip() for line in text.splitlines() if line.strip(" -\n")]
    reasons = [f"no two ranks within {START_SECONDS:.0f} s"] if silent else [*lines[:1], "no two ranks started"]
    return Outcome("not tried", [*problems, *reasons][0])


def _start(command: Sequence[str], output: Any) -> subprocess.Popen[bytes]:
    """Start the pair on all cores: a rank pinned to one core would pin both ranks of the pair to it."""
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


def _wait(process: subprocess.Popen[bytes], folder: Path, names: Sequence[str], hang_seconds: float) -> bool:
    """Wait until the pair completes all operations or ends; return whether it has fallen silent instead."""
    n_lines, since = 0, time.monotonic()
    while process.poll() is None:
        reports = read_reports(folder)
        if len(completed(reports, names)) == len(names):
            return False
        n = sum(report.ready + len(report.found) for report in reports)
        if n != n_lines:
            n_lines, since = n, time.monotonic()
        if any(report.error or report.problem for report in reports):
            limit_seconds = END_SECONDS
        else:
            limit_seconds = hang_seconds if all(report.ready for report in reports) else START_SECONDS
        if time.monotonic() - since > limit_seconds:
            process.terminate()
            return True
        time.sleep(0.02)
    return False


def _end(process: subprocess.Popen[bytes], folder: Path) -> None:
    """End the launcher and both ranks, and remove the shared memory that a killed rank leaves behind."""
    for end in (None, process.terminate, process.kill):
        if end is not None:
            end()
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
            break
    for file in folder.glob("*.pid"):
        with suppress(OSError):
            if str(folder) in Path(f"/proc/{file.stem}/cmdline").read_text():  # the id may have been reused
                os.kill(int(file.stem), signal.SIGKILL)
    for report in read_reports(folder):
        for segment in report.segments:
            Path(segment).unlink(missing_ok=True)


def _cause(output: str, code: int) -> str:
    """Return the signal that ended a rank, as launchers print it; their own exit codes differ."""
    found = re.search(r"signal:? (\d+)", output, re.IGNORECASE)
    return f"signal {found[1]}" if found else f"exit code {code}"
