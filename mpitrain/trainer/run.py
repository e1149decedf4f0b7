"""A training run on one rank, and the interface of the hooks that accompany it.

The lead is the first rank alive. A hook overrides the events it wants, reads the run and, on the lead, may end it:

    class StopEarly(Hook):
        def on_evaluation(self, run, point):
            if point.test_accuracy > 0.99:
                run.request_stop()

    train(config, world, hooks=[StopEarly()])
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mpitrain.collectives.world.world import World
from mpitrain.optimizer.distributed import DistributedOptimizer
from mpitrain.trainer.batches import Batches
from mpitrain.trainer.budget import Budget, Calendar
from mpitrain.trainer.clock import Clock
from mpitrain.trainer.counters import Counters, Totals
from mpitrain.trainer.faults import Faults
from mpitrain.trainer.gradient_pass import GradientPass
from mpitrain.trainer.plan import RunPlan
from mpitrain.trainer.step_cpu import StepCPU

SECONDS_BETWEEN_TOTALS = 0.25


@dataclass
class Point:
    """An evaluation, and the state of the run at that time.

    Attributes:
        seconds: The seconds of training.
        step: The number of steps of rank 0.
        gradients, bytes: The total numbers over all ranks.
        epoch: The number of epochs of rank 0.
        consensus_distance: The root mean square distance of the workers' parameters from the evaluated vector. If there
            are many workers, the mean is over some of them.
        elastic_energy: (rho/2)*sum_i ||x_i - c||^2, with the method's elastic coefficient rho, the workers' parameters
            x_i and the evaluated vector c; 0 for methods without an elastic coefficient.
        test_loss: The mean loss over the test set.
        test_accuracy: The accuracy on the test set, from 0 to 1; NaN without classes.
        test_metric: The value of the run's metric (``--metric``).
    """

    seconds: float
    step: int
    gradients: int
    bytes: int
    epoch: float
    consensus_distance: float
    elastic_energy: float = 0.0
    test_loss: float = float("nan")
    test_accuracy: float = float("nan")
    test_metric: float = float("nan")


class Hook:
    """Callbacks for the events of a run. All ranks have the same hooks in the same order."""

    def on_start(self, run: Run) -> None:
        """Act before the first step. Called on all ranks at the same time."""

    def on_step(self, run: Run) -> None:
        """Act after a step of this rank. Called on all ranks, which may be at different steps."""

    def on_totals(self, run: Run, totals: Totals, *, in_full: bool) -> None:
        """Act on the totals of all ranks. Called on the lead a few times a second, at evaluations and at the end.

        Args:
            run: The run.
            totals: The totals.
            in_full: Whether to record details of each worker. True at evaluations and at the end.
        """

    def on_evaluation(self, run: Run, point: Point) -> None:
        """Act on an evaluation. Called on the lead."""

    def on_checkpoint(self, run: Run, path: Path) -> None:
        """Act on a checkpoint that all ranks have written. Called on all ranks at the same time.

        Because a checkpoint is written in the background, the event occurs before the next checkpoint, or at the end.
        """

    def on_lead(self, run: Run) -> None:
        """Act when this rank becomes the lead, because all ranks before it have died."""

    def on_last_step(self, run: Run) -> None:
        """Act after this rank's last step and before the last exchange. Called on all ranks."""

    def on_end(self, run: Run) -> None:
        """Act after the last exchange and before the result is written. Called on all ranks at the same time."""

    def close(self) -> None:
        """Release resources, also after an error. Called on all ranks; Local."""


class Hooks(Hook):
    """A list of hooks that acts as one hook: each event is forwarded to them in order."""

    def __init__(self, hooks: Sequence[Hook]) -> None:
        self._hooks = tuple(hooks)

    def on_start(self, run: Run) -> None:
        """Forward the event."""
        for hook in self._hooks:
            hook.on_start(run)

    def on_step(self, run: Run) -> None:
        """Forward the event."""
        for hook in self._hooks:
            hook.on_step(run)

    def on_totals(self, run: Run, totals: Totals, *, in_full: bool) -> None:
        """Forward the event."""
        for hook in self._hooks:
            hook.on_totals(run, totals, in_full=in_full)

    def on_evaluation(self, run: Run, point: Point) -> None:
        """Forward the event."""
        for hook in self._hooks:
            hook.on_evaluation(run, point)

    def on_checkpoint(self, run: Run, path: Path) -> None:
        """Forward the event."""
        for hook in self._hooks:
            hook.on_checkpoint(run, path)

    def on_lead(self, run: Run) -> None:
        """Forward the event."""
        for hook in self._hooks:
            hook.on_lead(run)

    def on_last_step(self, run: Run) -> None:
        """Forward the event."""
        for hook in self._hooks:
            hook.on_last_step(run)

    def on_end(self, run: Run) -> None:
        """Forward the event."""
        for hook in self._hooks:
            hook.on_end(run)

    def close(self) -> None:
        """Forward the event."""
        for hook in self._hooks:
            hook.close()


@dataclass
class Run:
    """One run on one rank.

    Attributes:
        plan: The options, and the objects created from them.
        world: The ranks.
        folder: The folder of the run; None without one.
        batches: The training data of this rank.
        model: The model to train.
        optimizer: The distributed optimizer of its parameters.
        passes: The forward and backward passes.
        budget, calendar: The end of the run, and the times of evaluations and checkpoints.
        counters: The counters of all ranks.
        clock: The time of training.
        hooks: All hooks.
        faults: The faults to inject on this rank.
        step: The number of steps of this rank.
        steps_before, gradients_before: The amounts by which ``position`` and ``gradients`` exceed ``step``. They are 0,
            except in a run that was continued on another number of ranks.
        compute_seconds: The time that this rank has spent outside exchanges.
        cpu: The CPU time of this rank's steps.
        serving_cpu_before: The ``serving_cpu_seconds`` of the checkpoint from which this run continues.
        serving_cpu_at_start: The CPU time of the thread that serves other nodes at the first step.
        points: The evaluations so far. On the lead only.
        is_stopped: Whether this rank has followed an order to stop.
        is_leader: Whether this rank is the lead: the rank that evaluates, writes the metrics and gives orders.
        is_ending: Whether all ranks have made their last step.
        stopped_by: The number of the signal that has stopped the run early; 0 without one.
        stop_requested: The reason for which a hook has requested the end of the run; empty without a request. On the
            lead only.
        is_complete: Whether the run has used up its budget. Known after the last step.
    """

    plan: RunPlan
    world: World
    folder: Path | None
    batches: Batches
    model: torch.nn.Module
    optimizer: DistributedOptimizer
    passes: GradientPass
    budget: Budget
    calendar: Calendar
    counters: Counters
    clock: Clock
    hooks: Hook
    faults: Faults
    step: int = 0
    steps_before: int = 0
    gradients_before: int = 0
    compute_seconds: float = 0.0
    cpu: StepCPU = field(default_factory=StepCPU)
    serving_cpu_before: float = 0.0
    serving_cpu_at_start: float = 0.0
    points: list[Point] = field(default_factory=list)
    is_leader: bool = False
    is_ending: bool = False
    is_stopped: bool = False
    stopped_by: int = 0
    stop_requested: str = ""
    is_complete: bool = False
    _reported: float = field(default=-1.0, repr=False)

    def __post_init__(self) -> None:
        self.is_leader = self.world.rank == self.world.leader

    def look_for_lead(self) -> None:
        """Become the lead if all ranks before this one have died. Local."""
        if not self.is_leader and self.world.rank == self.world.leader:
            self.is_leader = True
            self.hooks.on_lead(self)

    @property
    def position(self) -> int:
        """The number of steps by which this rank has advanced in its data and in the budget."""
        return self.step + self.steps_before

    @property
    def gradients(self) -> int:
        """The number of gradients that this rank contributes to the total of all ranks."""
        return self.step + self.gradients_before

    @property
    def is_over(self) -> bool:
        """Whether this rank makes no more steps."""
        return self.is_stopped or self.budget.is_over(self.position)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the first parameter group."""
        return float(self.optimizer.param_groups[0]["lr"])

    def request_stop(self, reason: str = "hook") -> None:
        """End the run as if its budget were used up. Local; lead only.

        Args:
            reason: The text that the result contains as ``ended_by``.
        """
        self.stop_requested = self.stop_requested or reason

    def end_step(self, loss: float, began: float, exchange_before: float) -> None:
        """Count a step. Local.

        Args:
            loss: The loss of the mini-batch.
            began: ``time.perf_counter()`` at the beginning of the step.
            exchange_before: The optimizer's ``exchange_seconds`` at the beginning of the step.
        """
        self.step += 1
        exchange = self.optimizer.exchange_seconds - exchange_before
        self.compute_seconds += time.perf_counter() - began - exchange
        self.counters.add_loss(loss)
        self.publish()
        self.look_for_lead()
        if self.is_leader:
            self.report_totals()
        self.cpu.end(self.optimizer.exchange_cpu_seconds, self.optimizer.statistics.n_exchanges)

    def publish(self) -> None:
        """Publish this rank's counters. Local."""
        self.counters.publish(
            step=self.gradients,
            compute=self.compute_seconds,
            exchange=self.optimizer.exchange_seconds,
            cpu=self.cpu_times(),
            statistics=self.optimizer.statistics,
            metrics=self.optimizer.metrics(),
        )

    @property
    def serving_cpu_seconds(self) -> float:
        """The CPU time of the thread that serves other nodes, since the first step."""
        return self.serving_cpu_before + self._cpu_of_thread() - self.serving_cpu_at_start

    def _cpu_of_thread(self) -> float:
        thread = self.world.progress_thread
        return 0.0 if thread is None else thread.cpu_seconds

    def begin_first_step(self) -> None:
        """Start the clock, and count the CPU time of the thread that serves other nodes from now on. Local."""
        self.clock.start()
        self.serving_cpu_at_start = self._cpu_of_thread()

    def cpu_times(self) -> dict[str, float]:
        """Return the CPU seconds of this rank, by the names of counters. Local."""
        times = {"cpu": self.cpu.seconds}
        if self.is_ending:
            times["serving_cpu"] = self.serving_cpu_seconds
            times["gradient_cpu"], times["exchange_cpu"] = self.cpu.undisturbed()
        return times

    def report_totals(self, *, in_full: bool = False) -> None:
        """Pass the totals of all ranks to the hooks, if enough time has passed or if ``in_full``. Local; lead only."""
        seconds = self.clock.seconds
        if in_full or seconds - self._reported >= SECONDS_BETWEEN_TOTALS:
            self._reported = seconds
            self.hooks.on_totals(self, self.counters.totals(), in_full=in_full)
