"""A limit on the time of a test: when it has passed, every rank writes its stacks and the whole job ends.

A rank that hangs in MPI cannot be interrupted from Python. A thread writes the stacks and aborts the job. If compiled
code holds the interpreter lock, that thread cannot run, and `faulthandler` does the same from C a little later.
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
OUTPUT_SECONDS = 3.0  # within which the others write their stacks, on a busy machine
BACKUP_SECONDS = 8.0
UNINTERESTING = ("/site-packages/pluggy/", "/site-packages/_pytest/", "/site-packages/pytest/", "<frozen runpy>")


class Watchdog:
    """A timer for tests.

    Args:
        rank: This rank, for messages.
        size: The number of ranks.
        abort: Ends the whole job, given the exit code. Default: only this process ends.
    """

    def __init__(self, rank: int = 0, size: int = 1, abort: Callable[[int], object] | None = None) -> None:
        self.rank = rank
        self.size = size
        self.note = ""  # written with the stacks: a failure of this rank that its peers do not know of
        self._abort = abort
        self._stderr = os.dup(2)  # pytest captures fd 2 while a test runs

    @contextmanager
    def limit(self, seconds: float, what: str) -> Iterator[None]:
        """Abort the job if the body takes longer than `seconds`. The message names it as `what`."""
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
        """Write the stacks and exit after `seconds`, even if compiled code holds the interpreter lock."""
        faulthandler.dump_traceback_later(seconds, exit=True, file=self._stderr)

    def die(self, message: str) -> NoReturn:
        """Write a message and abort the job."""
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
        time.sleep((self.size - self.rank) * STAGGER_SECONDS + OUTPUT_SECONDS)  # until the others have written theirs
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
