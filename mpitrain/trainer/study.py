"""A simulated run: a method with any number of workers in one process, under a virtual clock.

The model, the data and the classes of the method are those of a real run; only time is simulated. A gradient takes
``step_seconds``. An exchange takes ``latency``, plus its number of bytes divided by ``bandwidth``. This allows the
study of clusters that are not at hand: a thousand workers, stragglers, slow links. The same seed gives the same run.
torch computes with one thread, unless OMP_NUM_THREADS sets another number.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mpitrain import data
from mpitrain.algorithms.base.peers import alive_ranks
from mpitrain.algorithms.base.worker import Worker
from mpitrain.collectives.world.device import limit_threads
from mpitrain.log import is_terminal, logger
from mpitrain.simulation.compute import ComputeTime
from mpitrain.simulation.engine import Simulation
from mpitrain.simulation.network_time import NetworkTime
from mpitrain.simulation.schedules import ClockSchedule, Until, VirtualTime
from mpitrain.simulation.world import SimulatedWorld
from mpitrain.trainer.batches import build_model, load
from mpitrain.trainer.cluster_config import ClusterConfig
from mpitrain.trainer.evaluation import Evaluator
from mpitrain.trainer.gradients import ModelGradient
from mpitrain.trainer.objective import Objective
from mpitrain.trainer.plan import RunPlan
from mpitrain.trainer.study_config import StudyConfig
from mpitrain.trainer.study_metrics import StudyMetrics

LOSS_MEMORY = 0.95


class OneProcess:
    """A world of one process without MPI, with the attributes that loading data needs."""

    rank, size, local_rank, local_size, node = 0, 1, 0, 1, 0

    def shared_array(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Return an array of zeros."""
        return np.zeros(shape, dtype)

    def node_barrier(self) -> None:
        """Do nothing, because there is no other process."""


@dataclass(frozen=True)
class Laboratory:
    """A simulation, and the objects with which it is measured.

    Attributes:
        simulation: The workers.
        clock: The virtual clock of the workers.
        gradient: The gradients of the model, with the losses of the mini-batches.
        evaluator: The evaluator of vectors on the test set.
        n_train: The number of training samples.
    """

    simulation: Simulation
    clock: ClockSchedule
    gradient: ModelGradient
    evaluator: Evaluator
    n_train: int


def simulate(plan: RunPlan, study: StudyConfig, cluster: ClusterConfig | None = None) -> dict[str, Any]:
    """Simulate a run.

    Args:
        plan: The options that a simulation shares with a real run.
        study: The options of the workers and their virtual time.
        cluster: The options of the network; by default, each worker has its own link.

    Returns:
        The result document.

    Raises:
        UsageError: The data, the model or the folder cannot be used.
    """
    limit_threads(1)  # the mini-batches of one worker are small
    for text in plan.warnings(study.workers):
        logger.warning(text)
    watch = Study(plan, study, _laboratory(plan, study, cluster or ClusterConfig()))
    return watch.run()


def _laboratory(plan: RunPlan, study: StudyConfig, cluster: ClusterConfig) -> Laboratory:
    """Load the data, and build the model and its workers."""
    config, p = plan.config, study.workers
    dataset = load(config, OneProcess())
    samplers = [
        data.Sampler(
            dataset.n_train,
            config.batch_size,
            rank=rank,
            size=p,
            seed=config.seed,
            mode=config.sampling,
            labels=dataset.labels,
        )
        for rank in range(p)
    ]
    objective = Objective(config, dataset)
    model = build_model(config, dataset, objective.n_outputs)
    evaluator = Evaluator(model, dataset, "cpu", objective)
    gradient = ModelGradient(model, dataset, samplers)
    simulation = Simulation(
        plan.method,
        SimulatedWorld(p, nodes=study.nodes_of_workers()),
        gradient,
        gradient.start,
        config.lr,
        config.weight_decay,
        momentum=plan.base_momentum,
        seed=config.seed,
        layers=gradient.layers,
        loss=lambda rank, _: float(gradient.losses[rank]),
        average=plan.average,
    )
    return Laboratory(simulation, clock_of(study, cluster, config.seed), gradient, evaluator, dataset.n_train)


def clock_of(study: StudyConfig, cluster: ClusterConfig, seed: int) -> ClockSchedule:
    """Return the virtual clock of the workers.

    With ``--network private``, each worker has its own link. Otherwise all workers share the network of the cluster.
    """
    if cluster.network == "private":
        return VirtualTime(
            study.step_seconds_of_workers(),
            latency_seconds=study.latency,
            bytes_per_second=study.bandwidth,
            jitter=study.jitter,
            seed=seed,
            starts=study.starts_of_workers(),
        )
    compute = ComputeTime(
        study.step_seconds_of_workers(),
        jitter=study.jitter,
        pauses_per_second=cluster.pauses[0],
        pause_seconds=cluster.pauses[1],
        seed=seed,
    )
    return NetworkTime(
        compute,
        cluster.constants(study.latency, study.bandwidth),
        study.nodes_of_workers(),
        cores=cluster.cores,
        slice_seconds=cluster.time_slice,
        wake_up=cluster.wake_up,
        sharing=cluster.sharing,
        starts=study.starts_of_workers(),
    )


class Study:
    """A simulation with its budget, evaluations and result.

    Args:
        plan: The options shared with a real run.
        study: The options of the simulation.
        laboratory: The simulation.
    """

    def __init__(self, plan: RunPlan, study: StudyConfig, laboratory: Laboratory) -> None:
        self._plan, self._study, self._laboratory = plan, study, laboratory
        self._simulation, self._clock = laboratory.simulation, laboratory.clock
        config = plan.config
        self._budget: int | None = None  # gradients; None: seconds
        if config.gradients is not None:
            self._budget = config.gradients
        elif study.seconds is None:
            assert config.epochs is not None
            self._budget = max(round(config.epochs * laboratory.n_train / config.batch_size), 1)
        self._last_step: float = math.inf if self._budget is None else -(-self._budget // study.workers)
        self._n_begun = 0  # steps that some worker has begun
        self._deaths = dict(study.death)
        self._gradients, self._loss, self._n_evaluated = 0, math.nan, 0
        self._points: list[dict[str, float]] = []
        self._vector = np.zeros_like(laboratory.gradient.start)
        self._metrics = None if config.out is None else StudyMetrics(Path(config.out), self._simulation, config)

    def run(self) -> dict[str, Any]:
        """Simulate until the budget is used up; return the result document."""
        if self._budget is not None:
            n_workers = self._study.workers
            for text in self._plan.budget_warnings(n_workers, self._budget / n_workers):
                logger.warning(text)
        with tqdm(total=100, unit="%", leave=False, disable=not is_terminal(sys.stderr)) as bar:

            def after_step(simulation: Simulation, rank: int) -> None:
                self._count_step(rank)
                bar.update(int(100 * self._used_fraction()) - bar.n)

            self._evaluate()
            if self._plan.method.is_synchronous:  # all workers make the same number of steps
                self._simulation.world.schedule = self._clock
                self._simulation.run(sys.maxsize, after_step, is_over=self._has_ended)
            else:
                self._simulation.world.schedule = Until(self._clock, lambda: self._used_fraction() >= 1)
                self._simulation.run(sys.maxsize, after_step)
            self._simulation.finalize()
            self._evaluate()
        document = self._result()
        if self._metrics is not None:
            self._metrics.write(document)
        return document

    def _count_step(self, rank: int) -> None:
        """Count a worker's step, which may be its last, and evaluate if it is time."""
        self._gradients += 1
        if self._clock.clocks[rank] >= self._deaths.get(rank, math.inf):  # at the beginning of this step
            self._simulation.world.kill(rank)
        loss = float(self._laboratory.gradient.losses[rank])
        memory = min(LOSS_MEMORY, 1 - 1 / self._gradients)
        self._loss = loss if self._gradients == 1 else memory * self._loss + (1 - memory) * loss
        used = self._used_fraction()
        if used * self._study.evaluations >= self._n_evaluated and used < 1:
            self._evaluate()

    def _has_ended(self, worker: Worker) -> bool:
        """Return whether a worker of a synchronous method makes no more steps: no other has begun another one."""
        if self._budget is None and self._used_fraction() >= 1:
            self._last_step = min(self._last_step, self._n_begun)
        if worker.t >= self._last_step:
            return True
        self._n_begun = max(self._n_begun, worker.t + 1)
        return False

    def _used_fraction(self) -> float:
        """Return the fraction of the budget that is used up."""
        if self._budget is not None:
            return self._gradients / self._budget
        assert self._study.seconds is not None
        return self._seconds() / self._study.seconds

    def _alive(self) -> list[int]:
        return alive_ranks(self._simulation.world.communicators[0])

    def _seconds(self) -> float:
        """Return the virtual time that all living workers have reached."""
        clocks = self._clock.clocks
        return float((clocks[self._alive()] if self._deaths else clocks).min())

    def _evaluate(self) -> None:
        with self._clock.paused():
            self._append_point()

    def _append_point(self) -> None:
        simulation, config = self._simulation, self._plan.config
        workers = [simulation.workers[rank] for rank in self._alive()]
        workers[0].consensus(self._vector)
        loss, accuracy, _ = self._laboratory.evaluator.evaluate(self._vector)
        squares = [float(np.sum((worker.x.local - self._vector) ** 2)) for worker in workers]
        self._n_evaluated += 1
        point = {
            "seconds": self._seconds(),
            "gradients": self._gradients,
            "step": workers[0].t,
            "bytes": sum(comm.statistics.bytes_sent for comm in simulation.world.communicators),
            "epoch": self._gradients * config.batch_size / self._laboratory.n_train,
            "consensus_distance": math.sqrt(float(np.mean(squares))),
            "test_loss": loss,
            "test_accuracy": accuracy,
        }
        self._points.append(point)
        if self._metrics is not None:
            self._metrics.add_evaluation(point, self._loss)

    def _result(self) -> dict[str, Any]:
        """Return the result document."""
        statistics = [comm.statistics for comm in self._simulation.world.communicators]
        plan, last = self._plan, self._points[-1]
        return {
            "algorithm": plan.method.name,
            "settings": plan.method.settings(),
            "workers": len(statistics),
            "ranks": len(statistics),
            "data": plan.config.data,
            "model": plan.config.model,
            "test_accuracy": last["test_accuracy"],
            "test_loss": last["test_loss"],
            "train_loss": self._loss,
            "seconds": last["seconds"],
            "gradients": self._gradients,
            "died": sorted(self._simulation.world.dead),
            "steps_of_workers": [worker.t for worker in self._simulation.workers],
            "bytes_sent": sum(s.bytes_sent for s in statistics),
            "exchanges": sum(s.n_exchanges for s in statistics),
            "n_nonfinite": sum(s.n_nonfinite for s in statistics),
            "staleness": np.sum([s.staleness for s in statistics], axis=0).tolist(),
            "evaluation": self._points,
            "virtual": True,
        }
