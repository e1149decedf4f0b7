"""The clock of a run, which stands still during evaluations and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """A clock that measures the seconds of training.

    It stands still before ``start``, inside ``paused`` and after ``stop``.

    Args:
        seconds: The time at the start; in a resumed run, the time of the checkpoint.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self._seconds = seconds
        self._since: float | None = None  # None: it stands still

    @property
    def seconds(self) -> float:
        """The seconds of training so far."""
        return self._seconds + (0.0 if self._since is None else time.perf_counter() - self._since)

    def start(self) -> None:
        """Start or resume the clock."""
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Stop the clock."""
        self._seconds, self._since = self.seconds, None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock inside the block."""
        was_running = self._since is not None
        self.stop()
        try:
            yield
        finally:
            if was_running:
                self.start()
