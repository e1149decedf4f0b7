"""How rank 0 tells the others to save or to stop, without anybody waiting for it.

Ranks of a synchronous method walk in step: they hear of an order at every tenth step, by a broadcast. Ranks of an
asynchronous one do not, and look at a board instead, one-sided, a few times a second. Where such a worker is a group of
ranks its first rank looks, and the group, which walks in step, hears of it after every step. What every rank can tell
from its own step number needs no order.
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
    """What a rank has to do now."""

    save: bool = False
    stop: bool = False
    over: bool = False  # every rank has made its last step


class Control:
    """Rank 0's orders. Collective to create and to free.

    Args:
        world: The ranks.
        synchronous: Whether the method's ranks walk in step.
        group: Those that are one worker with this one; None where each rank is one.
    """

    def __init__(self, world: World, *, synchronous: bool, group: World | None = None) -> None:
        self._world, self._synchronous, self._group = world, synchronous, group
        self._scoreboard = Scoreboard(world, ("saves", "stop", "finished", "over"))
        self._saves, self._stop = 0, False  # ordered, as rank 0 knows and the others have heard
        self._saved = 0  # orders to save that this rank has followed
        self._looked = 0.0

    @property
    def is_stopping(self) -> bool:
        """Whether an order to stop has been given, as far as this rank knows."""
        return self._stop

    def order(self, *, save: bool = False, stop: bool = False) -> None:
        """Give an order to all ranks. Local; rank 0 only."""
        assert self._world.rank == 0
        self._saves += save
        self._stop = self._stop or stop
        self._scoreboard.write(saves=self._saves, stop=self._stop)

    def listen(self, step: int) -> Orders:
        """The orders for this rank, after its step number ``step``.

        Collective at every tenth if synchronous; if not, Collective over the group at every step, or Local.
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
            self._group.comm.Bcast(known)
            self._saves, self._stop = int(known[0]), bool(known[1])
        return self._followed()

    def _followed(self, *, over: bool = False) -> Orders:
        """What has been heard, as orders that this rank follows now."""
        orders = Orders(self._saves > self._saved, self._stop, over)
        self._saved = self._saves
        return orders

    def _poll(self) -> None:
        """What rank 0 has ordered, if it is time to look again. Local."""
        now = time.perf_counter()
        if self._world.rank != 0 and now - self._looked >= ORDER_POLL_SECONDS:
            self._looked = now
            self._update_orders()

    def require_leader(self) -> None:
        """Raise if rank 0 has died. Local; after a barrier, on all ranks or on none.

        Raises:
            RankFailed: It says so.
        """
        if 0 in self._world.dead:
            raise RankFailed("rank 0, which leads the run, died: resume it from its newest checkpoint")

    def _update_orders(self) -> bool:
        """Note what rank 0 has ordered; whether it has said that all have made their last step. Local.

        Raises:
            RankFailed: It will give no more orders.
        """
        self.require_leader()
        row = self._scoreboard.read_rank(0)
        self._saves, self._stop = int(row["saves"]), bool(row["stop"])
        return bool(row["over"])

    def report_done(self) -> None:
        """Tell the others that this rank has made its last step. Local."""
        self._scoreboard.write(finished=1)

    def rest(self) -> Orders:
        """The orders for a rank that has made its last step, a moment later: others may be slower. Local.

        The ranks of a synchronous method make their last step together.
        """
        if self._synchronous:
            return Orders(over=True)
        if self._world.rank == 0:
            has_finished = self._scoreboard.read()["finished"]
            has_finished[list(self._world.dead)] = True
            over = self._saves == self._saved and bool(has_finished.all())
            self._scoreboard.write(over=over)
        else:
            over = self._update_orders()
        orders = self._followed(over=over)
        if not orders.save and not over:
            time.sleep(ORDER_POLL_SECONDS)
        return orders

    def free(self) -> None:
        """Give the memory back. Collective."""
        self._scoreboard.free()


class StopSignal:
    """SIGUSR1 asks for a checkpoint and an end: batch systems send it ahead of the time limit.

    Who enters it puts back what was there before when leaving, however that comes.

    Attributes:
        received: Whether it has come.
    """

    def __init__(self) -> None:
        self.received = False
        self._before = signal.signal(signal.SIGUSR1, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def restore(self) -> None:
        """Put back what was there before."""
        signal.signal(signal.SIGUSR1, self._before)

    def __enter__(self) -> StopSignal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()
