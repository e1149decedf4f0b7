"""Background exchanges, and waiting that leaves the core to the thread that computes.

One thread of a rank runs the exchanges, so that they follow each other in order. MPI has to let several threads of a
process call it; where it does not (``mpitrain info``), an exchange runs at once, and nothing overlaps.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

SHORTEST_BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS = 200e-6, 4e-3
"""Pause between two polls of a background thread."""

SPIN_SECONDS, FOREGROUND_BACKOFF_SECONDS = 100e-6, 50e-6
"""A foreground thread polls without a pause at first, then with this one."""

_of_thread = threading.local()


def threads_may_call_mpi() -> bool:
    """Return whether several threads of a rank may call this MPI at once. Local; MPI must have been started."""
    from mpi4py import MPI

    return MPI.Query_thread() == MPI.THREAD_MULTIPLE


def in_background() -> bool:
    """Return whether this is a background thread, which must not take the core from the computing thread. Local."""
    return getattr(_of_thread, "is_background", False)


class Backoff:
    """Pauses between the polls of a waiting thread, which grow with the time of waiting.

    Args:
        shortest, longest: The bounds of a pause in seconds. Between them, a pause is as long as the time since the
            first pause.
    """

    def __init__(self, shortest: float, longest: float) -> None:
        self._shortest, self._longest = shortest, longest
        self._began: float | None = None

    def rest(self) -> None:
        """Pause once. Local."""
        now = time.perf_counter()
        if self._began is None:
            self._began = now
        time.sleep(min(max(now - self._began, self._shortest), self._longest))


def wait_with_backoff(is_done: Callable[[], bool]) -> None:
    """Poll with pauses until ``is_done()``. Local.

    A blocking MPI call would spin. In the background, it would take the core from the computing thread. Even a poll
    costs this thread tens of microseconds, so the pauses grow with the time of waiting. In the foreground, a blocking
    call would hold the lock that MPICH has around all of MPI. This rank would then not serve requests for tens of
    milliseconds.
    """
    began = time.perf_counter()
    if in_background():
        spin_seconds, backoff = 0.0, Backoff(SHORTEST_BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS)
    else:
        spin_seconds, backoff = SPIN_SECONDS, Backoff(FOREGROUND_BACKOFF_SECONDS, FOREGROUND_BACKOFF_SECONDS)
    while not is_done():
        if time.perf_counter() - began >= spin_seconds:
            backoff.rest()


def wait_all(requests: list[Any]) -> None:
    """Wait for all these MPI requests, with pauses between polls. Local."""
    if requests:
        wait_with_backoff(lambda: bool(requests[0].Testall(requests)))


def _mark_thread() -> None:
    _of_thread.is_background = True


class Started:
    """A background operation, which is running or has ended.

    Args:
        future: The future of the operation; None if it has ended.
    """

    def __init__(self, future: Future[object] | None = None) -> None:
        self._future = future
        self._was_awaited = future is None

    @property
    def done(self) -> bool:
        """Whether the operation has ended. Local."""
        return self._future is None or self._future.done()

    def wait(self) -> None:
        """Wait until the operation ends. If it has raised an exception, raise it here. Local."""
        self._was_awaited = True
        if self._future is not None:
            self._future.result()

    def wait_unless_waited(self) -> None:
        """Call ``wait``, unless it was called before. Local."""
        if not self._was_awaited:
            self.wait()


class Background:
    """A thread that runs functions one after the other.

    Args:
        threads: Whether a thread may be used. If not, ``start`` runs the function itself.
    """

    def __init__(self, *, threads: bool) -> None:
        self._threads = threads
        self._pool: ThreadPoolExecutor | None = None
        self._last = Started()

    def start(self, fn: Callable[[], object]) -> Started:
        """Start ``fn`` when all earlier functions have ended. Local."""
        if not self._threads:
            fn()
            return Started()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "exchange", _mark_thread)
        self._last = Started(self._pool.submit(fn))
        return self._last

    def stop(self) -> None:
        """Wait for all functions. Raise the exception of the last one, unless its ``wait`` has raised it. Local."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        self._last.wait_unless_waited()
