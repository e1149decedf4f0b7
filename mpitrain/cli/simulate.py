"""``mpitrain simulate``: a method with any number of workers in one process, under a virtual clock.

The classes are those that run under mpirun, on a real model and real data; only time is made up. A gradient takes a
worker ``--step-seconds``, an exchange ``--latency`` and its bytes over ``--bandwidth``, so that a cluster that nobody
has can be studied: a thousand workers, stragglers, slow links. The same seed gives the same run. torch computes with
one thread, unless OMP_NUM_THREADS says more.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpitrain.cli import main as cli
from mpitrain.errors import UsageError

if TYPE_CHECKING:
    from mpitrain.simulation.engine import Simulation
    from mpitrain.trainer.config import TrainConfig

EPOCHS = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the sub-command takes."""
    add = parser.add_argument
    add("--algorithm", default="easgd", metavar="NAME", help="see mpitrain algorithms (default: %(default)s)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the algorithm; repeat for more")
    add("--workers", type=int, default=16, help="how many (default: %(default)s)")
    add("--workers-per-node", type=int, metavar="N", help="consecutive ones share a node (default: all on one)")
    add("--data", default="digits", help="as in mpitrain train (default: %(default)s)")
    add("--model", default="mlp", help="as in mpitrain train (default: %(default)s)")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--epochs", type=float, help=f"over all workers together (default: {EPOCHS:g})")
    budget.add_argument("--gradients", type=int, help="over all workers together")
    budget.add_argument("--seconds", type=float, help="of virtual time")
    add("--batch-size", type=int, default=32, help="of each worker (default: %(default)s)")
    add("--lr", type=float, default=0.05, help="learning rate (default: %(default)s)")
    add("--momentum", type=float, help="of the local SGD (default: 0.9, or the algorithm's own)")
    add("--weight-decay", type=float, default=0.0, help="default: 0")
    add("--average", metavar="KIND", help="evaluate an average of the iterates: polyak or moving:RATE (default: none)")
    add("--sampling", choices=("independent", "sharded"), default="independent", help="as in mpitrain train")
    add("--seed", type=int, default=0, help="of everything random (default: 0)")
    add("--step-seconds", type=float, default=0.01, help="of virtual time for a gradient (default: %(default)s)")
    add(
        "--jitter",
        type=float,
        default=0.0,
        help="spread of that time: standard deviation of its logarithm (default: 0)",
    )
    add("--latency", type=float, default=0.0, metavar="SECONDS", help="of an exchange (default: 0)")
    add("--bandwidth", type=float, default=math.inf, metavar="BYTES/S", help="of a worker's link (default: unlimited)")
    add("--straggler", type=cli.straggler, action="append", default=[], metavar="RANK:FACTOR", help="a slower worker")
    add("--death", type=death, action="append", default=[], metavar="RANK:SECONDS", help="when a worker dies")
    add("--evaluations", type=int, default=10, help="on the test set, evenly over the run (default: %(default)s)")
    add("--out", type=Path, metavar="RUN", help="folder for the metrics, for mpitrain report")
    add("--json", action="store_true", help="the result as one JSON document")


def death(text: str) -> tuple[int, float]:
    """``RANK:SECONDS`` as numbers."""
    return cli.rank_and_number(text, "RANK:SECONDS, such as 3:1.5")


def run(args: argparse.Namespace) -> int:
    """Runs the sub-command and returns its exit code."""
    result = simulate(args)
    print(
        f"{result['algorithm']} with {result['workers']} simulated workers: "
        f"test accuracy {result['test_accuracy']:.2%}, test loss {result['test_loss']:.4f} after "
        f"{result['gradients']} gradients in {result['seconds']:.4g} s of virtual time"
    )
    if args.json:
        from mpitrain.trainer.runfolder import to_json

        print(to_json(result))
    return 0


def simulate(args: argparse.Namespace) -> dict[str, Any]:
    """Simulates what the options ask for.

    Returns:
        The result document.

    Raises:
        UsageError: What is wrong with the options.
    """
    config = _config(args)
    from mpitrain import data, models
    from mpitrain.collectives.world.device import limit_threads
    from mpitrain.simulation.engine import Simulation
    from mpitrain.simulation.schedules import Until, VirtualTime
    from mpitrain.simulation.world import SimulatedWorld
    from mpitrain.trainer.config import average_of, method_of, warnings_of
    from mpitrain.trainer.gradients import ModelGradient

    limit_threads(1)  # the mini-batches of one worker are small
    method, p = method_of(config), args.workers
    for text in warnings_of(config, p):
        print(f"mpitrain: warning: {text}", file=sys.stderr)
    dataset = data.load(config.data, world=_Alone(), sampling=config.sampling)
    samplers = [
        data.Sampler(dataset.n_train, config.batch_size, rank=rank, size=p, seed=config.seed, mode=config.sampling)
        for rank in range(p)
    ]
    model = models.build(config.model, shape=dataset.shape, n_classes=dataset.n_classes, seed=config.seed)
    study = Study(args, model, dataset)
    gradient = ModelGradient(model, dataset, samplers)
    clock = VirtualTime(
        _step_seconds(args),
        latency_seconds=args.latency,
        bytes_per_second=args.bandwidth,
        jitter=args.jitter,
        seed=config.seed,
    )
    nodes = None if args.workers_per_node is None else [rank // args.workers_per_node for rank in range(p)]
    simulation = Simulation(
        method,
        SimulatedWorld(p, nodes=nodes),
        gradient,
        gradient.start,
        config.lr,
        config.weight_decay,
        momentum=_momentum(config, owned=method.owns_update),
        seed=config.seed,
        layers=gradient.layers,
        loss=lambda rank, _: float(gradient.losses[rank]),
        average=average_of(config),
    )
    simulation.world.schedule = Until(clock, study.is_over)
    study.begin(simulation, clock, gradient, config)
    simulation.run(study.most_steps, study.step_made)
    return study.end(config)


class Study:
    """What is looked at while a simulation goes on.

    Args:
        args: The options.
        model: Copied for the evaluations.
        dataset: With the test set.
    """

    def __init__(self, args: argparse.Namespace, model: Any, dataset: Any) -> None:
        from mpitrain.trainer.evaluation import Evaluator

        self._args, self._dataset = args, dataset
        self._deaths = dict(args.death)
        self._evaluator = Evaluator(model, dataset, "cpu")
        epochs = EPOCHS if args.epochs is None else args.epochs
        self._budget: int | None = args.gradients
        if self._budget is None and args.seconds is None:
            self._budget = max(round(epochs * dataset.n_train / args.batch_size), 1)
        self.most_steps = sys.maxsize
        self._gradients = 0
        self._losses = math.nan
        self._evaluated = 0
        self.points: list[dict[str, float]] = []

    def begin(self, simulation: Simulation, clock: Any, gradient: Any, config: TrainConfig) -> None:
        """Know what is simulated, and evaluate its start."""
        from tqdm import tqdm

        self._simulation, self._clock, self._gradient = simulation, clock, gradient
        self._metrics = _Metrics(self._args.out, simulation, config) if self._args.out is not None else None
        self._bar = tqdm(total=100, unit="%", leave=False, disable=not sys.stderr.isatty())
        self._vector = np.zeros_like(gradient.start)
        self._evaluate()

    def is_over(self) -> bool:
        """Whether the budget is used up."""
        return self._share() >= 1

    def step_made(self, simulation: Simulation, rank: int) -> None:
        """A worker has made a step, perhaps its last."""
        self._gradients += 1
        if self._clock.clocks[rank] >= self._deaths.get(rank, math.inf):  # as this step began
            simulation.world.kill(rank)
        loss = float(self._gradient.losses[rank])
        memory = min(0.95, 1 - 1 / self._gradients)
        self._losses = loss if self._gradients == 1 else memory * self._losses + (1 - memory) * loss
        share = self._share()
        self._bar.update(int(100 * share) - self._bar.n)
        if share * self._args.evaluations >= self._evaluated and share < 1:
            self._evaluate()

    def end(self, config: TrainConfig) -> dict[str, Any]:
        """Evaluate the end; returns the result document."""
        from mpitrain.trainer.config import method_of

        for rank in self._alive():
            self._simulation.workers[rank].finalize()
        self._evaluate()
        self._bar.close()
        statistics = [comm.statistics for comm in self._simulation.world.communicators]
        method, last = method_of(config), self.points[-1]
        document = {
            "algorithm": method.name,
            "settings": method.settings(),
            "workers": len(statistics),
            "ranks": len(statistics),
            "data": config.data,
            "model": config.model,
            "test_accuracy": last["test_accuracy"],
            "test_loss": last["test_loss"],
            "train_loss": self._losses,
            "seconds": last["seconds"],
            "gradients": self._gradients,
            "died": sorted(self._simulation.world.dead),
            "steps_of_workers": [worker.t for worker in self._simulation.workers],
            "bytes_sent": sum(s.bytes_sent for s in statistics),
            "exchanges": sum(s.n_exchanges for s in statistics),
            "n_nonfinite": sum(s.n_nonfinite for s in statistics),
            "staleness": np.sum([s.staleness for s in statistics], axis=0).tolist(),
            "evaluation": self.points,
            "virtual": True,
        }
        if self._metrics is not None:
            self._metrics.write(document)
        return document

    def _share(self) -> float:
        """Of the budget that is used up."""
        if self._budget is not None:
            return self._gradients / self._budget
        return self._seconds() / float(self._args.seconds)

    def _alive(self) -> list[int]:
        from mpitrain.algorithms.base.peers import alive_ranks

        return alive_ranks(self._simulation.world.communicators[0])

    def _seconds(self) -> float:
        """That all workers who live have made."""
        clocks = self._clock.clocks
        return float((clocks[self._alive()] if self._deaths else clocks).min())

    def _evaluate(self) -> None:
        simulation = self._simulation
        workers = [simulation.workers[rank] for rank in self._alive()]
        workers[0].consensus(self._vector)
        loss, accuracy = self._evaluator.evaluate(self._vector)
        squares = [float(np.sum((worker.x.local - self._vector) ** 2)) for worker in workers]
        self._evaluated += 1
        point = {
            "seconds": self._seconds(),
            "gradients": self._gradients,
            "step": workers[0].t,
            "bytes": sum(comm.statistics.bytes_sent for comm in simulation.world.communicators),
            "epoch": self._gradients * self._args.batch_size / self._dataset.n_train,
            "consensus_distance": math.sqrt(float(np.mean(squares))),
            "test_loss": loss,
            "test_accuracy": accuracy,
        }
        self.points.append(point)
        if self._metrics is not None:
            self._metrics.evaluated(point, self._losses)


class _Metrics:
    """The folder of a simulated run, in the form of a real one."""

    def __init__(self, folder: Path, simulation: Simulation, config: TrainConfig) -> None:
        from mpitrain.records.metrics import MetricsWriter
        from mpitrain.trainer import runfolder
        from mpitrain.trainer.recorder import tables

        if (folder / "config.json").exists():
            raise UsageError(f"{folder} already holds a run: choose another --out")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--out {folder} cannot be used ({error.strerror}): choose another folder") from error
        self._folder, self._simulation, self._names = folder, simulation, simulation.method.metrics
        document = {"config": config.to_json(), "algorithm": config.algorithm, "versions": runfolder.versions()}
        runfolder.write_json(folder / "config.json", {**document, "settings": simulation.method.settings()})
        self._writer = MetricsWriter(folder / "metrics.h5", tables(simulation.world.size, self._names))

    def evaluated(self, point: Mapping[str, float], loss: float) -> None:
        """Store an evaluation."""
        seconds = {"seconds": point["seconds"]}
        workers = self._simulation.workers
        statistics = [worker.comm.statistics for worker in workers]
        at = {name: point[name] for name in ("seconds", "step", "gradients", "bytes")}
        measured = {name: point[name] for name in ("epoch", "test_loss", "test_accuracy")}
        self._writer.append("evaluation", **at, **measured)
        distance = point["consensus_distance"]
        coefficient = self._simulation.method.elastic_coefficient(len(workers), self._simulation.learning_rate)
        energy = coefficient / 2 * len(workers) * distance**2
        exchanges = sum(s.n_exchanges for s in statistics)
        spread = {"consensus_distance": distance, "elastic_energy": energy}
        self._writer.append("progress", **at, **spread, loss=loss, exchanges=exchanges)
        updates, moves = ([getattr(s, name) for s in statistics] for name in ("staleness", "staleness_distance"))
        self._writer.append("staleness", **seconds, histogram=np.sum(updates, 0), distance=np.sum(moves, 0))
        if self._names:
            metrics = [worker.metrics() for worker in workers]
            self._writer.append("method", **seconds, **{name: [of[name] for of in metrics] for name in self._names})

    def write(self, document: dict[str, Any]) -> None:
        """Close the tables and write the result."""
        from mpitrain.trainer import runfolder

        self._writer.close()
        runfolder.write_json(self._folder / "result.json", document)


class _Alone:
    """What loading data needs of a world, without MPI."""

    rank, size, local_rank, local_size, node = 0, 1, 0, 1, 0

    def shared_array(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """One array of zeros."""
        return np.zeros(shape, dtype)

    def node_barrier(self) -> None:
        """There is nobody to wait for."""


def _config(args: argparse.Namespace) -> TrainConfig:
    """The options that a simulation has in common with a run.

    Raises:
        UsageError: Whatever is wrong with these or the others.
    """
    from mpitrain.trainer.config import TrainConfig, method_of

    for name, above in (("workers", 0), ("step_seconds", 0), ("bandwidth", 0), ("evaluations", 0)):
        if not getattr(args, name) > above:
            raise UsageError(f"--{name.replace('_', '-')} must be more than {above}, not {getattr(args, name):g}")
    for name in ("latency", "jitter"):
        if not 0 <= getattr(args, name) < math.inf:
            raise UsageError(f"--{name} must be 0 or more, not {getattr(args, name):g}")
    for name in ("epochs", "gradients", "seconds", "workers_per_node"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"--{name.replace('_', '-')} must be more than 0, not {value:g}")
    for rank, factor in args.straggler:
        if not (0 <= rank < args.workers and 1 <= factor < math.inf):
            raise UsageError(
                f"--straggler {rank}:{factor:g} must be a worker from 0 to {args.workers - 1} and a factor of 1 or more"
            )
    for rank, seconds in args.death:
        if not (0 <= rank < args.workers and 0 <= seconds < math.inf):
            raise UsageError(
                f"--death {rank}:{seconds:g} must be a worker from 0 to {args.workers - 1} and a time of 0 or more"
            )
    if len({rank for rank, _ in args.death}) == args.workers:
        raise UsageError("--death must leave a worker alive")
    common = {field.name for field in dataclasses.fields(TrainConfig)} & vars(args).keys()
    shared = {name: getattr(args, name) for name in common - {"epochs", "gradients", "straggler", "out"}}
    config = TrainConfig(settings=cli.settings_of(args.set), **shared)
    method_of(config)
    return config


def _step_seconds(args: argparse.Namespace) -> list[float]:
    seconds = [float(args.step_seconds)] * args.workers
    for rank, factor in args.straggler:
        seconds[rank] *= factor
    return seconds


def _momentum(config: TrainConfig, *, owned: bool) -> float:
    from mpitrain.trainer.loop import DEFAULT_MOMENTUM

    if owned:
        return 0.0
    return DEFAULT_MOMENTUM if config.momentum is None else config.momentum
