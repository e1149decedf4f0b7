"""The training loop behind ``mpitrain train`` and the benchmark harness.

Every rank runs it; no rank waits for another unless the method does. The clock of a run does not include what rank 0
spends on evaluating, nor what all spend on checkpoints.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpitrain import data, models
from mpitrain.collectives.world.device import share_cores
from mpitrain.collectives.world.world import World
from mpitrain.errors import UsageError
from mpitrain.optimizer.distributed import DistributedOptimizer
from mpitrain.optimizer.replica_group import check_replica_size
from mpitrain.records import checkpoint
from mpitrain.trainer import runfolder, runlock
from mpitrain.trainer.batches import Batches
from mpitrain.trainer.budget import Budget
from mpitrain.trainer.compiler import do_without_compiler
from mpitrain.trainer.config import TrainConfig, average_of, method_of, warnings_of
from mpitrain.trainer.control import Control, Orders, StopSignal
from mpitrain.trainer.evaluation import Evaluator, Point, evaluate_deferred
from mpitrain.trainer.progress import Progress
from mpitrain.trainer.recorder import Recorder

DEFAULT_MOMENTUM = 0.9


def train(
    config: TrainConfig, world: World, *, resume: Path | None = None, dataset: data.Dataset | None = None
) -> dict[str, Any]:
    """Run what ``config`` asks for. Collective.

    Args:
        config: The same on all ranks.
        world: The ranks.
        resume: The folder of a run to continue from its newest checkpoint.
        dataset: What ``config.data`` names, when it has been loaded already: several runs of one process share it.

    Returns:
        The result document (of ``RUN/result.json``), on every rank; without ``test_accuracy`` when the run was stopped
        by SIGUSR1 before its end.

    Raises:
        UsageError: What is wrong with the configuration or the data, on the ranks that see it.
        RankFailed: A rank has died without which the others cannot go on.
    """
    folder = resume or (None if config.out is None else Path(config.out))
    # From here on: a signal must not end a rank that is still loading its data, or one that writes its last checkpoint.
    with StopSignal() as stop_signal, world.translated_errors(), runlock.held(folder, world):
        run = Trainer(config, world, stop_signal, resume, dataset)
        try:
            return run.train()
        finally:
            run.recorder.close()


class Trainer:
    """One run. Collective to make; the arguments are those of ``train``, and what asks for an end."""

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        stop_signal: StopSignal,
        resume: Path | None = None,
        dataset: data.Dataset | None = None,
    ) -> None:
        self.config, self.world, self.stop_signal = config, world, stop_signal
        self.method = method_of(config)
        if config.straggler is not None and not 0 <= config.straggler[0] < world.size:
            raise UsageError(f"--straggler names rank {config.straggler[0]}: there are ranks 0 to {world.size - 1}")
        check_replica_size(config.replica_size, world)
        share_cores(world.cores)
        self.batches = Batches(config, world, dataset)
        of = self.batches.dataset
        self.model = models.build(config.model, shape=of.shape, n_classes=of.n_classes, seed=config.seed)
        self.model.to(world.device)
        self.evaluator = Evaluator(self.model, of, world.device)
        self.folder = resume or runfolder.create(config, self.method.settings(), world)
        torch.manual_seed(config.seed * 100_003 + world.rank)  # dropout: each rank its own
        do_without_compiler()
        base = torch.optim.SGD(
            self.model.parameters(), lr=config.lr, momentum=self._base_momentum(), weight_decay=config.weight_decay
        )
        self.optimizer = DistributedOptimizer(
            base,
            self.model,
            self.method,
            world=world,
            seed=config.seed,
            average=average_of(config),
            replica_size=config.replica_size,
            wire=config.wire,
        )
        self.step = 0
        self.compute_seconds = 0.0
        self.seconds_before = 0.0  # of the run that is continued
        self.points: list[Point] = []
        self.has_evaluated_end = False  # the last of the points is the run's end, with all that was handed over
        self.snapshots: list[np.ndarray] = []  # of the last of them, which are not evaluated yet
        self.saved_at: int | None = None  # the step of the newest checkpoint
        loss = self._load(resume) if resume is not None else float("nan")
        continue_from = self.seconds_before if resume else None
        self.recorder = Recorder(world, self.folder, config.batch_size, self.method.metrics, continue_from)
        self._report_step(loss)
        self.control = Control(world, synchronous=self.method.is_synchronous, group=self.optimizer.group)
        self.interrupted = False  # known to rank 0: SIGUSR1 has ended the run
        self.budget = Budget(
            config,
            steps_per_epoch=self.batches.steps_per_epoch,
            n_ranks=world.size,
            synchronous=self.method.is_synchronous,
        )
        if resume is not None:
            runfolder.reopen(resume, config, world)

    # ---- the loop -------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        """Train until the budget is used up or SIGUSR1 comes; evaluate and write the result. Collective; once."""
        self.recorder.progress = self._progress()
        self.model.train()
        self.world.barrier()
        self._began, self._paused = time.perf_counter(), 0.0
        self._last_evaluation = self._seconds()
        if not self.points:
            self._evaluate()
        stopped = False
        while not stopped and not self.budget.is_over(self.step):
            self._make_step()
            if self.world.rank == 0:
                self._lead()
            orders = self.control.listen(self.step)
            # Ranks that walk in step know by themselves when to save; the others wait for rank 0's order.
            if orders.save or (self.method.is_synchronous and self._save_is_due()):
                self._save()
            stopped = orders.stop
        self._wait_for_the_others()
        seconds = self._seconds()
        mine = not self.interrupted if self.budget.steps is None else self.budget.is_over(self.step)
        part = mine, self.step != self.saved_at
        parts = self.world.run_on_survivors(lambda comm: comm.allgather(part))
        complete = all(is_over for is_over, _ in parts)
        has_moved = any(moved for _, moved in parts)
        result = self._conclude(seconds, complete=complete, save=complete and has_moved)
        self.control.free()
        self.recorder.free()
        self.optimizer.close()
        return result

    def _make_step(self) -> None:
        began, exchanged = time.perf_counter(), self.optimizer.exchange_seconds
        x, y = self.batches.draw(self.step)
        self.optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(self.model(x), y)
        loss.backward()
        value = float(loss.detach())
        if self.config.straggler is not None and self.config.straggler[0] == self.world.rank:
            time.sleep((self.config.straggler[1] - 1) * (time.perf_counter() - began))
        self.optimizer.step(loss)
        self.step += 1
        self.has_evaluated_end = False
        self.compute_seconds += time.perf_counter() - began - (self.optimizer.exchange_seconds - exchanged)
        self._report_step(value)

    def _report_step(self, loss: float) -> None:
        """Show the others how far this rank is. Local."""
        self.recorder.step_made(
            self.step,
            loss,
            self.compute_seconds,
            self.optimizer.exchange_seconds,
            self.optimizer.statistics,
            self.optimizer.metrics(),
        )

    def _lead(self) -> None:
        """What only rank 0 does after its step. Local."""
        seconds = self._seconds()
        self._record(seconds)
        if self.budget.evaluates(self.step, seconds - self._last_evaluation):
            self._evaluate()
        if self.stop_signal.received:
            self._interrupt()
        elif self.budget.is_over_for_all(seconds, time.perf_counter(), lambda: self.recorder.totals().gradients):
            self.control.order(stop=True)
        elif not self.method.is_synchronous and self._save_is_due():
            self.control.order(save=True)

    def _interrupt(self) -> None:
        """SIGUSR1 has come: all ranks save and stop. Local; rank 0 only."""
        if not self.control.is_stopping:
            self.interrupted = True
            self.control.order(save=self.folder is not None, stop=True)

    def _wait_for_the_others(self) -> None:
        """Until every rank has made its last step; meanwhile rank 0 leads on. Collective."""
        self.control.report_done()
        orders = Orders()
        while not orders.over:
            if self.world.rank == 0 and self.stop_signal.received:
                self._interrupt()
            orders = self.control.rest()
            if orders.save:
                self._save()
            elif self.world.rank == 0:
                self._record(self._seconds())
        self.optimizer.wait()
        self.world.barrier()
        self.control.require_leader()

    def _conclude(self, seconds: float, *, complete: bool, save: bool) -> dict[str, Any]:
        """Evaluate the end, save it if it is not saved yet, and write down what came out. Collective."""
        saves = save and self.folder is not None and self.config.checkpoint_every != 0
        # As it is before the handing over: with a longer budget it goes on as if it had not come to an end here.
        state = self._state(self._seconds()) if saves else None
        if complete:
            self._hand_over()
        if self.world.rank == 0:
            self._record(seconds, now=True)
            if complete:
                self._evaluate_end(seconds)
        if complete and self.config.defer_evaluation:
            pending = self.points[len(self.points) - len(self.snapshots) :]
            evaluate_deferred(pending, self.snapshots, self.evaluator, self.world)
            self.snapshots.clear()
            for point in pending:
                self.recorder.evaluated(point)
        if state is not None:
            self._write(state)
        document: dict[str, Any] = {}
        if self.world.rank == 0:
            document = self._result(seconds, complete=complete)
            if complete and self.folder is not None:
                runfolder.write_json(self.folder / "result.json", document)
        result: dict[str, Any] = self.world.run_on_survivors(lambda comm: comm.bcast(document))
        self.control.require_leader()
        return result

    def _hand_over(self) -> None:
        """What no exchange has taken is in the center. Collective."""
        self.world.barrier()  # the center is not being saved any more
        self.optimizer.finalize()
        self._report_step(self.recorder.loss)
        self.world.barrier()

    def _seconds(self) -> float:
        """Of training so far."""
        return self.seconds_before + time.perf_counter() - self._began - self._paused

    def _save_is_due(self) -> bool:
        return self.folder is not None and self.budget.saves(self.step)

    def _record(self, seconds: float, *, now: bool = False) -> None:
        """Show and store how far all ranks are. Local; rank 0 only."""
        learning_rate = self.optimizer.param_groups[0]["lr"]
        self.recorder.record(seconds, self.step, learning_rate, now=now)

    # ---- what is found --------------------------------------------------------------------------------------------

    def _evaluate(self, seconds: float | None = None, *, last: bool = False) -> None:
        """Rank 0 looks at what the method evaluates now; its clock stands still meanwhile. Local."""
        if self.world.rank != 0:
            return
        began = time.perf_counter()
        self._last_evaluation = self._seconds() if seconds is None else seconds
        self._record(self._last_evaluation, now=True)
        totals, vector = self.recorder.totals(), self.optimizer.consensus_vector()
        distance, energy = self.optimizer.spread(vector)
        point = Point(
            seconds=self._last_evaluation,
            step=self.step,
            gradients=totals.gradients,
            bytes=totals.bytes,
            epoch=self.step / self.batches.steps_per_epoch,
            consensus_distance=distance,
            elastic_energy=energy,
        )
        self.points.append(point)
        if self.config.defer_evaluation:
            self.snapshots.append(vector.copy())
        else:
            point.test_loss, point.test_accuracy = self.evaluator.evaluate(vector)
            self.recorder.evaluated(point)
            if self.recorder.progress is not None and self.step:
                self.recorder.progress.say(
                    f"epoch {point.epoch:6.1f}  {point.seconds:7.1f} s  test loss {point.test_loss:.4f}  "
                    f"test accuracy {point.test_accuracy:.2%}",
                    last=last,
                )
        self._paused += time.perf_counter() - began

    def _evaluate_end(self, seconds: float) -> None:
        """The same when nobody trains any more, and what is found is exact. Local; rank 0 only."""
        if self.points and self.points[-1].gradients == self.recorder.totals().gradients:
            if self.has_evaluated_end:
                return
            self.points.pop()  # of the same steps, some of which had not been handed over
            if self.snapshots:
                self.snapshots.pop()
        self._evaluate(seconds, last=True)
        self.has_evaluated_end = True

    def _result(self, seconds: float, *, complete: bool) -> dict[str, Any]:
        """The result document, of what rank 0 knows. Local."""
        totals = self.recorder.totals()
        document: dict[str, Any] = {
            "algorithm": self.method.name,
            "settings": self.method.settings(),
            "warnings": warnings_of(self.config, self.world.size // self.config.replica_size),
            "data": self.config.data,
            "model": self.config.model,
            "ranks": self.world.size,
            "died": sorted(self.world.dead),
            "workers": self.world.size // self.config.replica_size,
            "replica_size": self.config.replica_size,
            "wire": self.config.wire,
            "complete": complete,
        }
        if complete:
            document |= {"test_accuracy": self.points[-1].test_accuracy, "test_loss": self.points[-1].test_loss}
        return document | {
            "train_loss": totals.loss,
            "seconds": seconds,
            "steps": self.step,
            "steps_of_ranks": totals.steps_of_ranks,
            "gradients": totals.gradients,
            "bytes_sent": totals.bytes,
            "n_nonfinite": totals.n_nonfinite,
            "samples_per_second": totals.gradients * self.config.batch_size / max(seconds, 1e-9),
            "shares": totals.shares,
            "parameters": self.optimizer.n_parameters,
            "evaluation": [vars(point) for point in self.points],
            "out": None if self.folder is None else str(self.folder),
            "world": self.world.describe(),
            "versions": runfolder.versions(),
        }

    def _progress(self) -> Progress:
        """The bar of what has to be done."""
        return Progress(
            self.method.name,
            gradients=self.budget.gradients,
            seconds=self.budget.seconds,
            done=self.step * self.world.size if self.budget.gradients else self.seconds_before,
            show=self.world.rank == 0 and not self.config.quiet,
        )

    def _base_momentum(self) -> float:
        if self.method.owns_update:
            return 0.0
        return DEFAULT_MOMENTUM if self.config.momentum is None else self.config.momentum

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """All ranks stop for a moment and write their parts. Collective."""
        began = time.perf_counter()
        seconds = self._seconds()
        self.optimizer.wait()
        self.world.barrier()
        self.control.require_leader()
        self._write(self._state(seconds))
        self._paused += time.perf_counter() - began

    def _state(self, seconds: float) -> dict[str, Any]:
        """This rank's part of a checkpoint, without what has been evaluated. Local; between two barriers."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "buffers": dict(self.model.named_buffers()),
            "step": self.step,
            "loss": self.recorder.loss,
            "seconds": seconds,
            "compute_seconds": self.compute_seconds,
            "exchange_seconds": self.optimizer.exchange_seconds,
            "statistics": self.optimizer.statistics.numbers(),
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.world.device) if self.world.device != "cpu" else None,
            "augment_rng": self.batches.rng.get_state(),
        }

    def _write(self, state: dict[str, Any]) -> None:
        """Write this rank's part, with what has been evaluated so far. Collective."""
        assert self.folder is not None
        number = self.world.run_on_survivors(lambda comm: int(comm.bcast(self.step)))
        state |= {
            "points": [vars(point) for point in self.points],
            "snapshots": self.snapshots,
            "has_evaluated_end": self.has_evaluated_end,
        }
        checkpoint.save(self.folder / "checkpoints", number, state, self.world)
        self.saved_at = self.step

    def _load(self, run: Path) -> float:
        """Continue from the newest checkpoint; returns the running mean of the loss. Collective."""
        state = checkpoint.load_newest(run / "checkpoints", self.world)
        # A rank that had died begins as the twin of another, with a copy of its part.
        self.optimizer.load_state_dict({**state["optimizer"], "rank": self.world.rank})
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                buffer.copy_(state["buffers"][name])
        self.step = self.saved_at = state["step"]
        self.seconds_before, self.compute_seconds = state["seconds"], state["compute_seconds"]
        self.optimizer.exchange_seconds = state["exchange_seconds"]
        vars(self.optimizer.statistics).update(state["statistics"])
        torch.set_rng_state(state["torch_rng"])
        if self.world.device != "cpu" and state.get("cuda_rng") is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.world.device)
        self.batches.rng.set_state(state["augment_rng"])
        self.points = [Point(**point) for point in state["points"]]
        self.snapshots = state.get("snapshots", [])
        self.has_evaluated_end = state.get("has_evaluated_end", False)
        return float(state["loss"])
