"""The phases of this rank's time, recorded where a run measures it anyway.

    recorder.is_on                              tested at each change of phase; False unless a ``Timeline`` is recorded
    previous = recorder.enter(EXCHANGE, now)    ends the present phase of the training thread and begins another
    recorder.enter(previous, now)               goes back
    recorder.add_wait(began, ended)             a wait inside a phase, in any thread

The phases of the training thread follow each other without gaps. Times are those of ``time.perf_counter``.
"""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Callable
from typing import Final

COMPUTE: Final = 0
UPDATE: Final = 1
EXCHANGE: Final = 2
CHECKPOINT: Final = 3
EVALUATION: Final = 4
WAITING: Final = 5
BACKGROUND_WAITING: Final = 6

EVENTS_PER_WRITE: Final = 128
NUMBERS_PER_WRITE: Final = 3 * EVENTS_PER_WRITE


class Recorder:
    """The recorder of this process. All methods are Local.

    Attributes:
        is_on: Whether phases are recorded. Test it before you call ``enter`` or ``add_wait``.
    """

    def __init__(self) -> None:
        self.is_on = False
        self._events: list[float] = []
        self._phase, self._since, self._thread = COMPUTE, 0.0, 0
        self._write: Callable[[array[float]], None] | None = None
        self._writing = threading.Lock()

    def start(self, write: Callable[[array[float]], None]) -> None:
        """Begin to record, in a phase of computation. The calling thread is the one that trains.

        Args:
            write: A function that stores events. It is called with (phase, began, ended) of each, in one array.
        """
        self._write, self._events = write, []
        self._phase, self._since, self._thread = COMPUTE, time.perf_counter(), threading.get_ident()
        self.is_on = True

    def enter(self, phase: int, now: float) -> int:
        """End the present phase at the time ``now`` and begin ``phase``; return the one that has ended."""
        previous = self._phase
        events = self._events
        events += (previous, self._since, now)
        self._phase, self._since = phase, now
        if len(events) >= NUMBERS_PER_WRITE:
            self.flush()
        return previous

    def add_wait(self, began: float, ended: float) -> None:
        """Record a wait of the calling thread."""
        is_training = threading.get_ident() == self._thread
        events = self._events
        events += (WAITING if is_training else BACKGROUND_WAITING, began, ended)
        if len(events) >= NUMBERS_PER_WRITE:
            self.flush()

    def flush(self) -> None:
        """Store the events that are buffered."""
        with self._writing:
            events, self._events = self._events, []
            if self._write is not None and events:
                self._write(array("d", events))

    def stop(self) -> None:
        """End the present phase, store all events and record no more; a second call does nothing."""
        if self.is_on:
            self.enter(COMPUTE, time.perf_counter())
            self.is_on = False
            self.flush()
            self._write = None


recorder = Recorder()
"""The recorder of this process, which is one rank."""
