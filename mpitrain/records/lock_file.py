"""The contents of the lock file of a run folder: the process that trains there (``trainer.runlock``)."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

NAME = "lock"
FRESH_SECONDS = 120.0
"""The time without a touch after which the owner counts as dead."""


def describe() -> dict[str, Any]:
    """Return the description of this process that the lock file contains."""
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": pid,
        "started": _started(pid),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
    }


def read(path: Path) -> dict[str, Any]:
    """Return the owner that a lock file names; empty if the file is incomplete or does not exist."""
    try:
        owner = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def is_gone(owner: dict[str, Any]) -> bool:
    """Return whether the owner of a lock file is known to have ended."""
    here = describe()
    if owner.get("machine") == here["machine"]:
        return _started(owner.get("pid", 0)) != owner.get("started")
    is_of_this_job = here["job"] is not None and owner.get("job") == here["job"]
    return is_of_this_job and owner.get("restart") != here["restart"]


def _machine() -> str:
    """Return the identity of this boot and process namespace, as containers may share a host name."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"


def _started(pid: int) -> str | None:
    """Return the start time of a process in ticks since boot; None if it does not exist or is dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def is_held(folder: Path) -> bool:
    """Return whether a job trains in a run folder: there is a lock, its owner may live, and it was touched lately."""
    path = folder / NAME
    try:
        age = time.time() - path.stat().st_mtime
    except OSError:
        return False
    return age < FRESH_SECONDS and not is_gone(read(path))
