"""An exchange in the background, while its worker computes.

One thread of a rank makes it, so that several follow each other. MPI has to let several threads of a process call it;
where it does not (``mpitrain info``), an exchange is made at once, and nothing is gained.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

SHORTEST_BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS = 200e-6, 4e-3
"""Between two looks at something that is waited for in the background."""

SPIN_SECONDS, FOREGROUND_BACKOFF_SECONDS = 100e-6, 50e-6
"""The same for a thread that has nothing else to do. It naps too, but for the first moments."""

_of_thread = threading.local()


def threads_may_call_mpi() -> bool:
    """Whether several threads of a rank may call this MPI at once. Local; MPI must have been started."""
    from mpi4py import MPI

    return MPI.Query_thread() == MPI.THREAD_MULTIPLE


def in_background() -> bool:
    """Whether this thread's work is of the kind that must not take a core from the one that computes. Local."""
    return getattr(_of_thread, "is_background", False)


class Backoff:
    """Between the looks of a thread at what it waits for: the longer it has waited, the more seldom it looks.

    Args:
        shortest, longest: Seconds of a nap; between them it is as long as the time since the first one began.
    """

    def __init__(self, shortest: float, longest: float) -> None:
        self._shortest, self._longest = shortest, longest
        self._began: float | None = None

    def rest(self) -> None:
        """Take the next one. Local."""
        now = time.perf_counter()
        if self._began is None:
            self._began = now
        time.sleep(min(max(now - self._began, self._shortest), self._longest))


def wait_with_backoff(is_done: Callable[[], bool]) -> None:
    """Wait for something by looking at it now and then. Local.

    An MPI that waits spins. In the background that takes the core from the thread that computes. A look takes tens of
    microseconds from it too: there are the fewer of them the longer it takes. In the foreground it would keep the lock
    that MPICH has around all of MPI, and this rank would not serve the others meanwhile, for tens of milliseconds.
    """
    began = time.perf_counter()
    if in_background():
        spin_seconds, backoff = 0.0, Backoff(SHORTEST_BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS)
    else:
        spin_seconds, backoff = SPIN_SECONDS, Backoff(FOREGROUND_BACKOFF_SECONDS, FOREGROUND_BACKOFF_SECONDS)
    while not is_done():
        if time.perf_counter() - began >= spin_seconds:
            backoff.rest()


def _begin() -> None:
    _of_thread.is_background = True


class Started:
    """Something that goes on in the background, or has been done already.

    Args:
        future: Of the thread; None if it is done.
    """

    def __init__(self, future: Future[object] | None = None) -> None:
        self._future = future
        self._is_told = future is None

    @property
    def done(self) -> bool:
        """Whether it has ended. Local."""
        return self._future is None or self._future.done()

    def wait(self) -> None:
        """Wait for its end; raises what it raised. Local."""
        self._is_told = True
        if self._future is not None:
            self._future.result()

    def wait_unless_waited(self) -> None:
        """The same, unless somebody has finished it before. Local."""
        if not self._is_told:
            self.wait()


class Background:
    """Runs functions one after the other in a thread of its own.

    Args:
        threads: Whether there may be one; without it a function runs when it is handed over.
    """

    def __init__(self, *, threads: bool) -> None:
        self._threads = threads
        self._pool: ThreadPoolExecutor | None = None
        self._last = Started()

    def start(self, fn: Callable[[], object]) -> Started:
        """Begin ``fn``. Local."""
        if not self._threads:
            fn()
            return Started()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "exchange", _begin)
        self._last = Started(self._pool.submit(fn))
        return self._last

    def stop(self) -> None:
        """Wait until all is done; raises what the last one raised, if nobody has finished that. Local."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        self._last.wait_unless_waited()
