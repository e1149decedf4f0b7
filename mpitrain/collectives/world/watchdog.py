"""A watchdog: a rank that waits for too long says what it waits for, and then all ranks end.

A rank may wait for ever for one that makes fewer steps, has left the script, is stopped, or is behind a broken link.
Every blocking wait of this package is inside ``with waiting("an all-reduce", ranks)``. A daemon thread of each process
compares the age of the waits with the timeout. When one is too old,

1. the rank writes one line: what it waits for, in which step, for how long, for whom;
2. the other ranks of the node (``node_status``) write theirs, with the line of the script if they are not waiting;
3. a moment later the job ends with exit code ``errors.EXIT_TIMEOUT``.

A wait costs the waiting thread two insertions into a dictionary, and a step costs two stores. A wait may ``restart``
while the awaited ranks make progress. Time in which this process itself was stopped (a suspended job) does not count.
"""

from __future__ import annotations

import atexit
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Collection
from types import TracebackType
from typing import Any

from mpitrain.collectives.world import node_status
from mpitrain.collectives.world.node_status import NodeStatus
from mpitrain.collectives.world.wakeup import WakeupPipe
from mpitrain.errors import EXIT_TIMEOUT, TURN_SECONDS
from mpitrain.log import logger

DEFAULT_TIMEOUT_SECONDS = 600.0
LONGEST_TICK_SECONDS = 1.0
TICKS_OF_A_TIMEOUT = 20
GRACE_TICKS = 4
"""Between a rank's line and the end of the job: the others write theirs."""

ABORT_SECONDS = 10.0
"""After which a process whose MPI_Abort does not return ends itself."""

Ranks = Callable[[], Collection[int]]


class Waiting:
    """A context manager around a blocking wait of the calling thread. Created by ``waiting``."""

    __slots__ = ("_dog", "began", "ranks", "thread", "what")

    def __init__(self, dog: Watchdog, what: str, ranks: Ranks | None) -> None:
        self._dog, self.what, self.ranks = dog, what, ranks

    def __enter__(self) -> Waiting:
        self.thread, self.began = threading.get_ident(), self._dog.now
        self._dog.enter(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._dog.leave(self)

    def restart(self) -> None:
        """Restart the time of the wait, because the awaited ranks make progress. Local."""
        self.began = self._dog.now


class Watchdog:
    """The waits of a process, and the thread that watches them once ``start`` is called.

    Attributes:
        timeout: The timeout in seconds; 0 for none.
        now: The time on the watchdog's clock, in seconds.
        step: The step that this rank is in.
        advice: A remedy after a death, such as the command that resumes the run.
    """

    def __init__(self, timeout: float = DEFAULT_TIMEOUT_SECONDS) -> None:
        self.timeout, self.now, self.step, self.advice = timeout, 0.0, 0, ""
        self._waits: dict[Waiting, None] = {}
        self._row = memoryview(bytearray(8 * node_status.WIDTH)).cast("q")  # until there is a status
        self._status: NodeStatus | None = None
        self._reports_exits = False
        self._abort: Callable[[int], object] = os._exit
        self._rank = 0
        self._stopped, self._wakeup = False, WakeupPipe()
        self._thread: threading.Thread | None = None

    def enter(self, wait: Waiting) -> None:
        """Begin to watch a wait. Local."""
        self._waits[wait] = None
        self._row[node_status.N_WAITS] = 1

    def leave(self, wait: Waiting) -> None:
        """Stop watching a wait. If it was inside another wait, restart the time of that wait. Local."""
        del self._waits[wait]
        if not self._waits:
            self._row[node_status.N_WAITS] = 0
            return
        for other in list(self._waits):
            if other.thread == wait.thread:
                other.began = self.now

    def begin_step(self) -> None:
        """Count a step of this rank. Local."""
        self.step += 1
        self._row[node_status.STEP] = self.step

    def start(self) -> None:
        """Start the thread. Local; no effect if it is running already."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
            self._thread.start()
            atexit.register(self.stop)  # before MPI is finalized, which frees the memory of the status

    def attach(self, rank: int, abort: Callable[[int], object]) -> None:
        """Set the rank of this process, and the function that ends all ranks. Local."""
        self._rank, self._abort = rank, abort

    def watch_node(self, status: NodeStatus, *, reports_exits: bool) -> None:
        """Watch the processes of the node as well. Local.

        Args:
            status: The status of the ranks of this node.
            reports_exits: Whether to report a process that ends without announcing it.
        """
        status.row[node_status.STEP], status.row[node_status.N_WAITS] = self.step, bool(self._waits)
        self._row, self._status, self._reports_exits = status.row, status, reports_exits
        self._wakeup.wake()

    def expect_exits(self) -> None:
        """Stop reporting the ends of other processes, because they were requested. Local."""
        self._reports_exits = False

    def announce_end(self) -> None:
        """Announce to the node that this process ends in an orderly way. Local."""
        self._row[node_status.HAS_ENDED] = 1

    def announce_end_of_all(self) -> None:
        """Announce to the node that this process ends all ranks, for a reason that it has printed. Local."""
        self.announce_end()
        if self._status is not None and not self._stopped:
            self._status.announce_end_of_all()

    def stop(self) -> None:
        """End the thread. Local; safe to call again."""
        self.announce_end()
        self._stopped = True
        if self._thread is not None and self._thread is not threading.current_thread():
            self._wakeup.wake()
            self._thread.join()

    def _run(self) -> None:
        last = time.monotonic()
        poll, status = select.poll(), self._status
        poll.register(self._wakeup.reads, select.POLLIN)
        while not self._stopped:
            if status is not self._status and self._status is not None:
                status = self._status
                poll = status.exits
                poll.register(self._wakeup.reads, select.POLLIN)
            tick = min(LONGEST_TICK_SECONDS, self.timeout / TICKS_OF_A_TIMEOUT or LONGEST_TICK_SECONDS)
            for file, _ in poll.poll(1000 * tick):
                if file == self._wakeup.reads:
                    os.read(file, 64)
                elif status is not None and (rank := status.died(file)) is not None and self._reports_exits:
                    self._report_exit(status, rank)
            now = time.monotonic()
            self.now += min(now - last, 2 * tick)
            last = now
            late = self._late()
            if not self._stopped and (late or self._row[node_status.ALARM]):
                self._end_all(late, tick)

    def _late(self) -> list[Waiting]:
        """Return the innermost wait of each thread that has waited for longer than the timeout."""
        if not self.timeout:
            return []
        innermost = {wait.thread: wait for wait in list(self._waits)}
        return [wait for wait in innermost.values() if self.now - wait.began >= self.timeout]

    def _end_all(self, late: list[Waiting], tick: float) -> None:
        """Write this rank's line, let the others write theirs, and end all ranks."""
        if self._status is not None:
            self._status.raise_alarm()
        if late:
            logger.critical(
                "no progress for %.3g s: %s; all ranks end with exit code %d (--timeout, mpitrain.init(timeout=...))",
                self.now - late[0].began,
                self._describe(late[0]),
                EXIT_TIMEOUT,
            )
        else:
            logger.critical("another rank has waited for too long; this one is %s", self._doing())
        time.sleep(GRACE_TICKS * tick + min(self._rank, 20) * TURN_SECONDS)
        self.announce_end_of_all()
        backup = threading.Timer(ABORT_SECONDS, os._exit, (EXIT_TIMEOUT,))
        backup.daemon = True
        backup.start()
        self._abort(EXIT_TIMEOUT)

    def _describe(self, wait: Waiting) -> str:
        """Return ``in step 31, waiting in an all-reduce for rank 0 (in step 30)``."""
        status = self._status
        ranks = None if wait.ranks is None else [rank for rank in wait.ranks() if rank != self._rank]
        if not ranks and status is not None:
            ranks = status.not_waiting()
        if ranks and status is not None:
            whom = ", ".join(status.describe(rank) for rank in sorted(ranks))
        else:
            whom = ", ".join(f"rank {rank}" for rank in sorted(ranks)) if ranks else "another rank"
        return f"in step {self.step}, waiting in {wait.what} for {whom}"

    def _doing(self) -> str:
        """Return what this rank does while another one waits."""
        innermost = list(self._waits)[-1:]
        if innermost:
            return self._describe(innermost[0])
        if self._row[node_status.HAS_ENDED]:
            return f"at its end, after step {self.step}"
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        if frame is None:
            return f"busy in step {self.step}"
        code = frame.f_code
        return f"busy in step {self.step}, at line {frame.f_lineno} of {code.co_filename} ({code.co_name})"

    def _report_exit(self, status: NodeStatus, rank: int) -> None:
        """Report the death of a process of the node, on one rank."""
        if status.is_first():
            logger.critical(
                "rank %d (process %d on %s) was killed or crashed in step %s%s",
                rank,
                status.process(rank),
                status.host,
                status.step(rank),
                self.advice and f": {self.advice}",
            )


watchdog = Watchdog()
"""The watchdog of this process."""


def waiting(what: str, ranks: Ranks | None = None) -> Any:
    """Return a context manager around a blocking wait. Local.

    Args:
        what: The name of what is awaited, with an article: ``"a barrier"``.
        ranks: A function that returns the awaited ranks of the run; None if they are not known.
    """
    return Waiting(watchdog, what, ranks)
