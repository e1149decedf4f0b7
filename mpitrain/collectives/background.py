"""An exchange in the background, while its worker computes.

One thread of a rank makes it, so that several follow each other. MPI has to let several threads of a process call it;
where it does not (``mpitrain info``), an exchange is made at once, and nothing is gained.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

_of_thread = threading.local()


def in_background() -> bool:
    """Whether this thread's work is of the kind that must not take a core from the one that computes. Local."""
    return getattr(_of_thread, "is_background", False)


def _begin() -> None:
    _of_thread.is_background = True


class Started:
    """Something that goes on in the background, or has been done already.

    Args:
        future: Of the thread; None if it is done.
    """

    def __init__(self, future: Future[object] | None = None) -> None:
        self._future = future

    @property
    def done(self) -> bool:
        """Whether it has ended. Local."""
        return self._future is None or self._future.done()

    def finish(self) -> None:
        """Wait for its end; raises what it raised. Local."""
        if self._future is not None:
            self._future.result()


class Background:
    """Runs functions one after the other in a thread of its own.

    Args:
        threads: Whether there may be one; without it a function runs when it is handed over.
    """

    def __init__(self, *, threads: bool) -> None:
        self._threads = threads
        self._pool: ThreadPoolExecutor | None = None

    def start(self, fn: Callable[[], object]) -> Started:
        """Begin ``fn``. Local."""
        if not self._threads:
            fn()
            return Started()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "exchange", _begin)
        return Started(self._pool.submit(fn))

    def stop(self) -> None:
        """Wait until all is done. Local."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
