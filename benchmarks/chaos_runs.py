"""What the kill loops share: commands with a limit, and the traces that a run leaves."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

LIMIT_SECONDS = 300.0
"""Of a run: one that hangs is lost."""

OTHERS = r"sm_segment\..*0000\.\d+|sem\.mp-.*|mpitrain-test-.*"
"""Names of files of others: MPI processes that no launcher started, Python's multiprocessing, tests of mpitrain."""


def finished(
    command: Sequence[str], limit_seconds: float = LIMIT_SECONDS, env: Mapping[str, str] | None = None
) -> tuple[str, int]:
    """Return the output and the exit code of a command, which is ended if it hangs."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=env,
    ) as process:
        try:
            output, _ = process.communicate(timeout=limit_seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            output, _ = process.communicate()
            output += f"\nended after {limit_seconds:.0f} s"
    return output, process.returncode


def left_in_memory(before: Collection[str]) -> list[str]:
    """Return the files in /dev/shm that were not there before and that no process uses."""
    return sorted(name for name in set(os.listdir("/dev/shm")) - set(before) if not _is_mapped(name))


def _is_mapped(name: str) -> bool:
    """Return whether a file in /dev/shm is in use, gone or of another kind: other programs run here too."""
    if not Path("/dev/shm", name).exists() or re.fullmatch(OTHERS, name):
        return True
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            if f"/dev/shm/{name}" in maps.read_text(errors="replace"):
                return True
    return False
