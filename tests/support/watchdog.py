"""A limit on the time of a test: when it has passed, every rank says where it stands and the whole job ends.

A rank that hangs in MPI cannot be interrupted from Python, so there are two clocks. A thread writes the stacks and
aborts the job; where it cannot run, because compiled code holds the interpreter lock, `faulthandler` does so from C.
"""

from __future__ import annotations

import faulthandler
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

EXIT_CODE = 70  # EX_SOFTWARE; pytest's own end at 5
STAGGER_SECONDS = 0.1  # rank i writes i times this later, so that the stacks of two ranks do not mix
BACKUP_SECONDS = 3.0
UNINTERESTING = ("/site-packages/pluggy/", "/site-packages/_pytest/", "/site-packages/pytest/", "<frozen runpy>")


class Watchdog:
    """Limits the time of what runs under `limit`.

    Args:
        rank, size: who speaks; of how many.
        abort: ends the whole job (it gets the exit code).
    """

    def __init__(self, rank: int = 0, size: int = 1, abort: Callable[[int], object] | None = None) -> None:
        self.rank = rank
        self.size = size
        self.note = ""  # what this rank has to say beside its stacks: the failure that its peers have not heard of
        self._abort = abort
        self._stderr = os.dup(2)  # pytest captures fd 2 while a test runs

    @contextmanager
    def limit(self, seconds: float, what: str) -> Iterator[None]:
        """Aborts the job if its body is not left within `seconds`; `what` is named in the message."""
        timer = threading.Timer(seconds, self._expire, (seconds, what))
        timer.daemon = True
        self.backup(seconds + self.size * STAGGER_SECONDS + BACKUP_SECONDS)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            faulthandler.cancel_dump_traceback_later()

    def backup(self, seconds: float) -> None:
        """Writes the stacks and exits after `seconds`, whatever holds the interpreter lock."""
        faulthandler.dump_traceback_later(seconds, exit=True, file=self._stderr)

    def die(self, message: str) -> NoReturn:
        """Writes a message and aborts the job."""
        self._write(f"\n[rank {self.rank} of {self.size}] {message}\n")
        if self._abort is not None:
            self._abort(EXIT_CODE)
        os._exit(EXIT_CODE)

    def _expire(self, seconds: float, what: str) -> None:
        time.sleep(self.rank * STAGGER_SECONDS)
        note = f"This rank had failed before:\n{self.note}\n" if self.note else ""
        self._write(
            f"\n[rank {self.rank} of {self.size}] {what} has not ended after {seconds:g} s. {note}"
            f"The stack of every thread:\n{self._stacks()}"
        )
        time.sleep((self.size - self.rank) * STAGGER_SECONDS + 0.5)  # until the others have written theirs
        self.die("aborting")

    @staticmethod
    def _stacks() -> str:
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file=file, all_threads=True)
            file.seek(0)
            text = file.read().decode(errors="replace")
        # Without pytest's own frames, and without this thread, which comes first.
        lines = [line for line in text.splitlines() if not any(frame in line for frame in UNINTERESTING)]
        threads = "\n".join(lines).split("\n\n")
        return "\n\n".join(threads[1:] or threads)

    def _write(self, text: str) -> None:
        data = text.encode()
        while data:
            data = data[os.write(self._stderr, data) :]
