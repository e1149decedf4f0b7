"""Signals that ask a run to save a checkpoint and to stop."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from mpitrain.collectives.world.wakeup import WakeupPipe
from mpitrain.collectives.world.watchdog import watchdog

REQUESTS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
"""Batch systems send the first one ahead of the time limit, and the second one at it; the third one is Ctrl-C."""

ENDINGS = (signal.SIGTERM, signal.SIGINT)
"""Of which a second one ends the run at once."""


class StopSignal:
    """A context manager that turns SIGUSR1, SIGTERM and SIGINT into requests to save a checkpoint and stop.

    It is enough if one rank receives the signal. A second SIGTERM or SIGINT ends all ranks at once, with exit code 128
    + the number of the signal. A thread handles the signals, so this works even while the rank waits in MPI. At the end
    of the block, the previous handlers are restored.

    Args:
        end: Ends all ranks with an exit code.

    Attributes:
        number: The number of the last signal; 0 if there was none.
    """

    def __init__(self, end: Callable[[int], object] = os._exit) -> None:
        self.number = 0
        self._end = end
        self._pipe = WakeupPipe(blocking=True)
        self._before: dict[signal.Signals, Any] = {each: signal.signal(each, self._receive) for each in REQUESTS}
        self._file_before = signal.set_wakeup_fd(self._pipe.writes, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._run, name="signals", daemon=True)
        self._thread.start()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.number = number

    def _run(self) -> None:
        n_endings = 0
        while number := os.read(self._pipe.reads, 1)[0]:
            if number in ENDINGS:
                n_endings += 1
                watchdog.expect_exits()  # a launcher that ends the run may end some ranks first
            if n_endings > 1:
                self._end(128 + number)

    def restore(self) -> None:
        """Restore the previous handlers."""
        for each, handler in self._before.items():
            signal.signal(each, handler)
        signal.set_wakeup_fd(self._file_before)
        os.write(self._pipe.writes, b"\0")
        self._thread.join()

    def __enter__(self) -> StopSignal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()
