"""The lock of a run folder: two jobs in one folder would destroy each other's checkpoints.

    RUN/lock    {"host": ..., "pid": ..., "started": ..., "job": ..., "restart": ..., "run": ...}

The lead, the first rank alive, creates the file (O_EXCL), touches it every few seconds, and removes it at the end of
the run, also after an error. If the lead is killed, the file remains. If other ranks of the run continue, the next lead
takes the file over, also on another host: "run" is a number that only the ranks of this run know. Another job takes
it over

- at once, if the owner was a process of this machine that is gone, or this SLURM job before it was requeued;
- otherwise, once the file has not been touched for two minutes by the clock of the file system.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from mpitrain.collectives.world.survivor_collectives import broadcast
from mpitrain.collectives.world.world import World
from mpitrain.errors import UsageError
from mpitrain.records.lock_file import FRESH_SECONDS, NAME, describe, is_gone, read
from mpitrain.trainer import runfolder
from mpitrain.trainer.run import Hook, Run

SECONDS_BETWEEN_TOUCHES = 10.0
SECONDS_TO_SETTLE = 0.2
"""The wait after a takeover, in which one that began at the same moment ends."""


class LockHook(Hook):
    """The hook that takes over the lock of the run folder when the lead has died.

    Args:
        lock: The lock, as returned by ``held``; None in a run without a folder.
    """

    def __init__(self, lock: RunLock | None) -> None:
        self._lock = lock

    def on_lead(self, run: Run) -> None:
        """Take over the lock."""
        if self._lock is not None:
            self._lock.acquire()


@contextlib.contextmanager
def held(folder: Path | None, world: World) -> Iterator[RunLock | None]:
    """Hold the lock of a run folder inside the block, and create the folder if necessary. Collective.

    Yields:
        The lock object of this rank, after rank 0 has acquired the lock; None without a folder.

    Raises:
        UsageError: Another job holds the lock, or the folder cannot be used. All ranks raise it.
    """
    if folder is None:
        yield None
        return
    lock = RunLock(folder / NAME, broadcast(world, lambda: secrets.token_hex(8)))
    runfolder.make_folder(folder, world, lock.acquire)
    try:
        runfolder.require_shared(folder, world)
        yield lock
    finally:
        lock.release()


class RunLock:
    """The lock file of a run folder. Only the lead acquires it. All methods are Local.

    Args:
        path: The file.
        run: The number of this run; empty for a run of one process.
    """

    def __init__(self, path: Path, run: str = "") -> None:
        self._path, self._run = path, run
        self._text = json.dumps({**describe(), "run": run})
        self._released = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Acquire the lock, or take it over from a process that has ended or from a dead lead of this run.

        Raises:
            UsageError: Another job holds the lock.
        """
        try:
            with self._path.open("x") as file:
                file.write(self._text)
        except FileExistsError:
            self._take_over()
        self._thread = threading.Thread(target=self._keep, name="run-lock", daemon=True)
        self._thread.start()

    def _take_over(self) -> None:
        ours = self._path.with_name(f".{NAME}-{socket.gethostname()}-{os.getpid()}")
        ours.write_text(self._text)
        try:
            owner = read(self._path)
            try:
                age = ours.stat().st_mtime - self._path.stat().st_mtime
            except FileNotFoundError:  # its owner has just released it
                age = FRESH_SECONDS
            is_of_this_run = bool(self._run) and owner.get("run") == self._run
            if age < FRESH_SECONDS and not is_gone(owner) and not is_of_this_run:
                job = f" (job {owner['job']})" if owner.get("job") else ""
                raise UsageError(
                    f"{self._path.parent} is in use by process {owner.get('pid')} on {owner.get('host')}{job}, "
                    f"last active {max(age, 0):.0f} s ago: wait for its end, or {FRESH_SECONDS:.0f} s if it was killed"
                )
            ours.replace(self._path)
        finally:
            ours.unlink(missing_ok=True)
        self._released.wait(SECONDS_TO_SETTLE)
        if not self._is_ours():
            raise UsageError(f"{self._path.parent} has just been locked by another job: wait until that job ends")

    def _is_ours(self) -> bool:
        try:
            return self._path.read_text() == self._text
        except OSError:
            return False

    def _keep(self) -> None:
        while not self._released.wait(SECONDS_BETWEEN_TOUCHES):
            with contextlib.suppress(OSError):
                os.utime(self._path)

    def release(self) -> None:
        """Remove the file if this process still owns it."""
        self._released.set()
        if self._thread is not None and self._is_ours():
            with contextlib.suppress(OSError):
                self._path.unlink()
