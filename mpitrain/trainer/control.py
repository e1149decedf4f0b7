"""Orders of rank 0 to save or to stop, sent to the other ranks without blocking.

Ranks of a synchronous method step in lockstep: a broadcast tells them at every tenth step. Ranks of an asynchronous
method poll a scoreboard instead, one-sided, a few times a second. Where a worker is a group of ranks, its first rank
polls, and tells the group, which steps in lockstep, after every step. What a rank can tell from its own step number
needs no order.
"""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from types import FrameType, TracebackType

import numpy as np

from mpitrain.collectives.rma.scoreboard import Scoreboard
from mpitrain.collectives.world.world import World
from mpitrain.errors import RankFailed

STEPS_BETWEEN_BROADCASTS = 10
ORDER_POLL_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Orders:
    """The orders that a rank follows now."""

    save: bool = False
    stop: bool = False
    over: bool = False  # every rank has made its last step


class Control:
    """The orders of rank 0. Collective to create and to free.

    Args:
        world: The ranks.
        synchronous: Whether the method's ranks step in lockstep.
        group: The ranks that form one worker with this one; None where each rank is a worker.
    """

    def __init__(self, world: World, *, synchronous: bool, group: World | None = None) -> None:
        self._world, self._synchronous, self._group = world, synchronous, group
        self._scoreboard = Scoreboard(world, ("saves", "stop", "finished", "over"))
        self._saves, self._stop = 0, False  # ordered, as rank 0 knows and the others have heard
        self._saved = 0  # orders to save that this rank has followed
        self._polled = 0.0

    @property
    def is_stopping(self) -> bool:
        """Whether this rank has received an order to stop."""
        return self._stop

    def order(self, *, save: bool = False, stop: bool = False) -> None:
        """Give an order to all ranks. Local; rank 0 only."""
        assert self._world.rank == 0
        self._saves += save
        self._stop = self._stop or stop
        self._scoreboard.write(saves=self._saves, stop=self._stop)

    def listen(self, step: int) -> Orders:
        """Return the orders for this rank after its step number ``step``.

        Collective at every tenth step if synchronous; otherwise collective over the group at every step, or local.
        """
        if self._synchronous:
            if step % STEPS_BETWEEN_BROADCASTS:
                return Orders()
            orders = self._saves, self._stop
            self._saves, self._stop = self._world.run_on_survivors(lambda comm: comm.bcast(orders))
        elif self._group is None:
            self._poll()
        else:
            if self._group.rank == 0:
                self._poll()
            known = np.array([self._saves, self._stop], np.int64)
            with self._group.waiting("the orders of the group's first rank", lambda: [0]):
                self._group.comm.Bcast(known)
            self._saves, self._stop = int(known[0]), bool(known[1])
        return self._followed()

    def _followed(self, *, over: bool = False) -> Orders:
        """Return the orders that this rank follows now."""
        orders = Orders(self._saves > self._saved, self._stop, over)
        self._saved = self._saves
        return orders

    def _poll(self) -> None:
        """Read the orders of rank 0 if it is time again. Local."""
        now = time.perf_counter()
        if self._world.rank != 0 and now - self._polled >= ORDER_POLL_SECONDS:
            self._polled = now
            self._read_orders()

    def _read_orders(self) -> bool:
        """Read the orders of rank 0; return whether all ranks have made their last step. Local.

        Raises:
            RankFailed: Rank 0 has died.
        """
        require_leader(self._world)
        row = self._scoreboard.read_rank(0)
        self._saves, self._stop = int(row["saves"]), bool(row["stop"])
        return bool(row["over"])

    def report_done(self) -> None:
        """Tell the others that this rank has made its last step. Local."""
        self._scoreboard.write(finished=1)

    def rest(self) -> Orders:
        """Sleep briefly, and return the orders for a rank that has made its last step. Local.

        The ranks of a synchronous method make their last step at the same time; others may be slower.
        """
        if self._synchronous:
            return Orders(over=True)
        if self._world.rank == 0:
            has_finished = self._scoreboard.read()["finished"]
            has_finished[list(self._world.dead)] = True
            over = self._saves == self._saved and bool(has_finished.all())
            self._scoreboard.write(over=over)
        else:
            over = self._read_orders()
        orders = self._followed(over=over)
        if not orders.save and not over:
            time.sleep(ORDER_POLL_SECONDS)
        return orders

    def free(self) -> None:
        """Free the scoreboard. Collective."""
        self._scoreboard.free()


def require_leader(world: World) -> None:
    """Raise if rank 0 has died. Local; after a barrier, on all ranks or on none.

    Raises:
        RankFailed: Rank 0 has died and gives no more orders.
    """
    if 0 in world.dead:
        raise RankFailed("rank 0, which leads the run, died: resume it from its newest checkpoint")


class StopSignal:
    """SIGUSR1 as a request to save a checkpoint and stop: batch systems send it ahead of the time limit.

    A context manager that restores the previous handler on leaving.

    Attributes:
        received: Whether the signal has come.
    """

    def __init__(self) -> None:
        self.received = False
        self._before = signal.signal(signal.SIGUSR1, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def restore(self) -> None:
        """Restore the previous handler."""
        signal.signal(signal.SIGUSR1, self._before)

    def __enter__(self) -> StopSignal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()
