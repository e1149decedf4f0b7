"""The hook by which rank 0 leads a run: it decides when all ranks save and stop, and all ranks follow."""

from __future__ import annotations

import time

from mpitrain.collectives.world.watchdog import Waiting
from mpitrain.trainer.checkpoints import Checkpoints
from mpitrain.trainer.control import Control, Orders, StopSignal, require_leader
from mpitrain.trainer.run import Hook, Run

PROGRESS_POLL_SECONDS = 1.0
"""Between two looks of a rank that has made its last step at the steps of the others."""


class Commands(Hook):
    """Orders to save and to stop, given by rank 0 and followed by all ranks.

    Args:
        control: The way from rank 0 to the others.
        stop_signal: The request of a batch system to save and stop.
        checkpoints: The hook that saves.
    """

    def __init__(self, control: Control, stop_signal: StopSignal, checkpoints: Checkpoints) -> None:
        self._control, self._stop_signal, self._checkpoints = control, stop_signal, checkpoints
        self._is_interrupted = False  # on rank 0: the signal has ended the run

    def on_step(self, run: Run) -> None:
        """Give orders on rank 0, and follow them. Collective if the method is synchronous."""
        if run.is_leader:
            self._lead(run)
        orders = self._control.listen(run.step)
        # Ranks in lockstep know by themselves when to save; the others wait for rank 0's order.
        if orders.save or (run.plan.method.is_synchronous and self._checkpoints.is_due(run)):
            self._checkpoints.save(run)
        run.is_stopped = orders.stop

    def _lead(self, run: Run) -> None:
        """Give the orders that follow from the signal, the budget and the calendar. Local; rank 0 only."""
        now = time.perf_counter()
        if self._stop_signal.received:
            self._interrupt(run)
        elif run.stop_requested or run.budget.is_over_for_all(
            run.clock.seconds, now, lambda: run.counters.totals().gradients
        ):
            self._control.order(stop=True)
        elif not run.plan.method.is_synchronous and self._checkpoints.is_due(run):
            self._control.order(save=True)

    def _interrupt(self, run: Run) -> None:
        """Order all ranks to save and stop. Local; rank 0 only."""
        if not self._control.is_stopping:
            self._is_interrupted = True
            self._control.order(save=run.folder is not None, stop=True)

    def on_last_step(self, run: Run) -> None:
        """Wait until every rank has made its last step; rank 0 keeps giving orders. Collective."""
        self._control.report_done()
        with run.world.waiting("the last steps of the others") as wait:
            self._rest(run, wait)
        run.optimizer.wait()
        run.world.barrier()
        require_leader(run.world)
        run.clock.stop()
        part = self._is_interrupted, run.budget.is_over(run.step)
        parts = run.world.run_on_survivors(lambda comm: comm.allgather(part))
        was_interrupted = any(interrupted for interrupted, _ in parts)
        run.is_complete = not was_interrupted or all(is_over for _, is_over in parts)

    def _rest(self, run: Run, wait: Waiting) -> None:
        """Follow orders until every rank has made its last step. Collective."""
        orders, gradients, polled = Orders(), -1, 0.0
        while not orders.over:
            if run.is_leader and self._stop_signal.received:
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
        """Free the control: no more orders are given. Collective."""
        # While ranks wait in a barrier, they answer requests at once: rank 0 may still evaluate the end.
        run.world.barrier()
        self._control.free()
