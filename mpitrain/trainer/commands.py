"""The hook by which the first rank alive, the lead, decides when all ranks save and stop."""

from __future__ import annotations

import time

from mpitrain.collectives.world.survivor_collectives import gather
from mpitrain.collectives.world.watchdog import Waiting
from mpitrain.trainer.checkpoints import Checkpoints
from mpitrain.trainer.control import Control, Orders
from mpitrain.trainer.run import Hook, Run
from mpitrain.trainer.stop_signal import StopSignal

PROGRESS_POLL_SECONDS = 1.0
"""Between two looks of a rank that has made its last step at the steps of the others."""


class Commands(Hook):
    """The hook by which the lead orders all ranks to save or to stop.

    Args:
        control: The transmission of orders from the lead to the ranks, and of signals from any rank to the lead.
        stop_signal: The signal by which a batch system or a user requests to save and stop.
        checkpoints: The hook that saves.
    """

    def __init__(self, control: Control, stop_signal: StopSignal, checkpoints: Checkpoints) -> None:
        self._gives_orders = True
        self._control, self._stop_signal, self._checkpoints = control, stop_signal, checkpoints
        self._interrupted_by = 0  # the signal that has ended the run, as the lead knows, and as ranks in lockstep agree

    def on_step(self, run: Run) -> None:
        """Give orders if this rank is the lead, and follow the orders. Collective if the method is synchronous."""
        if self._stop_signal.number:
            self._control.report_signal(self._stop_signal.number)
        if run.is_leader:
            self._lead(run)
        orders = self._control.listen(run.step)
        if orders.signal and not self._interrupted_by:
            self._interrupted_by = orders.signal
            orders = Orders(save=run.folder is not None, stop=True)
        # Ranks in lockstep know by themselves when to save; the others wait for rank 0's order.
        if orders.save or (run.plan.method.is_synchronous and self._checkpoints.is_due(run)):
            self._checkpoints.save(run)
        run.is_stopped = orders.stop

    def _lead(self, run: Run) -> None:
        """Give the orders that follow from a signal, the budget and the calendar. Local; lead only."""
        now = time.perf_counter()
        if not run.plan.method.is_synchronous and self._control.signal:
            self._interrupt(run)
        elif run.stop_requested or run.budget.is_over_for_all(
            run.clock.seconds, now, lambda: run.counters.totals().gradients
        ):
            self._control.order(stop=True)
        elif not run.plan.method.is_synchronous and self._checkpoints.is_due(run):
            self._control.order(save=True)

    def _interrupt(self, run: Run) -> None:
        """Order all ranks to save and stop. Local; lead only."""
        if not self._control.is_stopping:
            self._interrupted_by = self._control.signal
            self._control.order(save=run.folder is not None, stop=True)

    def on_lead(self, run: Run) -> None:
        """Adopt the orders of the leads that have died."""
        if self._gives_orders:
            self._control.take_lead()

    def on_last_step(self, run: Run) -> None:
        """Wait until every rank has made its last step. Meanwhile the lead may give orders. Collective."""
        self._control.report_done()
        with run.world.waiting("the last steps of the others") as wait:
            self._rest(run, wait)
        run.optimizer.wait()
        run.world.barrier()
        run.clock.stop()
        found = gather(run.world, [self._interrupted_by, run.budget.is_over(run.position)])
        signals, is_over = found.T
        run.is_complete = not signals.any() or bool(is_over.all())
        run.stopped_by = 0 if run.is_complete else int(signals.max())

    def _rest(self, run: Run, wait: Waiting) -> None:
        """Follow orders until every rank has made its last step. Collective."""
        orders, gradients, polled = Orders(), -1, 0.0
        while not orders.over:
            run.look_for_lead()
            if self._stop_signal.number:
                self._control.report_signal(self._stop_signal.number)
            if run.is_leader and not run.plan.method.is_synchronous and self._control.signal:
                self._interrupt(run)
            orders = self._control.rest()
            if orders.save:
                self._checkpoints.save(run)
            elif run.is_leader:
                run.report_totals()
            now = time.perf_counter()
            if now - polled >= PROGRESS_POLL_SECONDS:
                before, gradients, polled = gradients, run.counters.totals().gradients, now
                if gradients != before:
                    wait.restart()

    def on_end(self, run: Run) -> None:
        """Free ``control``, because there are no more orders. Collective."""
        # While ranks wait in a barrier, they answer requests at once: the lead may still evaluate the end.
        run.world.barrier()
        self._gives_orders = False
        self._control.free()
