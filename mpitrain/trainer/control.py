"""Orders of the lead to save or to stop, and requests of any rank to stop, sent without blocking.

The lead is the first rank alive. If the lead dies, the next rank alive becomes the lead and adopts its orders.

Ranks of a synchronous method agree on the orders in a small all-reduce. They do so about ten times a second, but at
most once per step and at least once in ten steps. Ranks of an asynchronous method instead read the orders fifty times a
second from a scoreboard: one-sided memory to which the lead writes. If a worker is a group of ranks, only its first
rank reads the scoreboard; it broadcasts the orders to the group after every step. If a rank can tell from its own step
number what to do, no order is given.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from mpitrain.collectives.rma.scoreboard import Scoreboard
from mpitrain.collectives.world.survivor_collectives import maximum
from mpitrain.collectives.world.world import World

MAX_STEPS_BETWEEN_AGREEMENTS = 10
SECONDS_BETWEEN_AGREEMENTS = 0.1
ORDER_POLL_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Orders:
    """The orders that are in force on a rank."""

    save: bool = False
    stop: bool = False
    over: bool = False  # every rank has made its last step
    signal: int = 0  # asks ranks in lockstep to save and stop


class Control:
    """The transmission of orders from the lead to all ranks. Collective to create and to free.

    Args:
        world: The ranks.
        synchronous: Whether the method is synchronous.
        group: The ranks that form one worker with this rank; None if each rank is a worker.
    """

    def __init__(self, world: World, *, synchronous: bool, group: World | None = None) -> None:
        self._world, self._synchronous, self._group = world, synchronous, group
        self._scoreboard = Scoreboard(world, ("saves", "stop", "finished", "over", "signal"))
        self._saves, self._stop = 0, False  # ordered, as this rank knows
        self._saved = 0  # orders to save that this rank has followed
        self._polled = 0.0
        self._signal = 0
        self._agreed_at: tuple[int, float] | None = None  # the step and the time of the last agreement
        self._next_agreement = 0

    @property
    def is_stopping(self) -> bool:
        """Whether this rank has received an order to stop."""
        return self._stop

    @property
    def signal(self) -> int:
        """The number of a signal that a rank has reported; 0 without one. Local; lead only."""
        return max(self._signal, int(self._scoreboard.read_rank(self._world.rank)["signal"]))

    def report_signal(self, number: int) -> None:
        """Tell the lead that this rank has received a signal. Local; repeat the call, because the lead may change."""
        self._signal = number
        if not self._synchronous:
            self._scoreboard.write_to(self._world.leader, signal=number)

    def order(self, *, save: bool = False, stop: bool = False) -> None:
        """Give an order to all ranks. Local; lead only."""
        self._saves += save
        self._stop = self._stop or stop
        self._scoreboard.write(saves=self._saves, stop=self._stop)

    def take_lead(self) -> None:
        """Adopt the orders of the leads that have died. Local."""
        self._read_orders()
        self._scoreboard.write(saves=self._saves, stop=self._stop)

    def listen(self, step: int) -> Orders:
        """Return the orders for this rank after its step number ``step``.

        For synchronous methods, the call is Collective at certain steps, which are the same on all ranks. For other
        methods, it is Collective over the replica group, or Local without a group.
        """
        if self._synchronous:
            return Orders() if step < self._next_agreement else self._agree(step)
        if self._group is None:
            self._poll()
        else:
            if self._group.rank == 0:
                self._poll()
            known = np.array([self._saves, self._stop], np.int64)
            with self._group.waiting("the orders of the group's first rank", lambda: [0]):
                self._group.comm.Bcast(known)
            self._saves, self._stop = int(known[0]), bool(known[1])
        return self._followed()

    def _agree(self, step: int) -> Orders:
        """Agree with all ranks on the orders, and on the step of the next agreement. Collective."""
        mine = self._saves, self._stop, self._signal, -self._steps_until_next(step)
        self._saves, stop, signal, negative = maximum(self._world, mine)
        self._stop = bool(stop)
        self._next_agreement = step - negative
        self._agreed_at = step, time.perf_counter()
        return self._followed(signal=signal)

    def _steps_until_next(self, step: int) -> int:
        """Return how many steps fit between two agreements, at the pace since the last one."""
        if self._agreed_at is None:
            return 1
        before, began = self._agreed_at
        step_seconds = (time.perf_counter() - began) / max(step - before, 1)
        return max(min(int(SECONDS_BETWEEN_AGREEMENTS / max(step_seconds, 1e-9)), MAX_STEPS_BETWEEN_AGREEMENTS), 1)

    def _followed(self, *, over: bool = False, signal: int = 0) -> Orders:
        """Return the orders that this rank follows now."""
        orders = Orders(self._saves > self._saved, self._stop, over, signal)
        self._saved = self._saves
        return orders

    def _poll(self) -> None:
        """Read the orders of the lead if it is time again. Local."""
        now = time.perf_counter()
        if now - self._polled >= ORDER_POLL_SECONDS:
            self._polled = now
            if self._world.rank != self._world.leader or self._world.dead:
                self._read_orders()

    def _read_orders(self) -> bool:
        """Read the orders of the lead and of those before it; return whether all ranks have made their last step.

        Local. The orders of a dead rank stay in the memory of its node. If that is lost, other ranks may still know
        orders that this one has not read: each rank repeats the orders that it knows, and after a death, all are read.
        """
        before, over = (self._saves, self._stop), False
        for rank in range(self._world.size if self._world.dead else self._world.leader + 1):
            row = self._scoreboard.read_rank(rank)
            self._saves, self._stop = max(self._saves, int(row["saves"])), self._stop or bool(row["stop"])
            over = over or bool(row["over"])
        if (self._saves, self._stop) != before:
            self._scoreboard.write(saves=self._saves, stop=self._stop)
        return over

    def report_done(self) -> None:
        """Tell the others that this rank has made its last step. Local."""
        self._scoreboard.write(finished=1)

    def rest(self) -> Orders:
        """Sleep briefly, and return the orders for a rank that has made its last step. Local.

        Ranks of an asynchronous method make their last step at different times. Until all of them have made it, each
        rank still follows orders.
        """
        if self._synchronous:
            return Orders(over=True)
        if self._world.rank == self._world.leader:
            if self._world.dead:
                self._read_orders()
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
