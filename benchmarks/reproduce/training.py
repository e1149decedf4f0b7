"""Training runs of simulated workers on a cluster with a shared network, observed over gradients, seconds and bytes.

The small vector of the digits classifier stands for a model of ``Cluster.model_bytes``: its messages take the time of
such a model's, it is divided into as many shards, and bytes are counted for such a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.reproduce.digits import Array, MiniBatches, Network
from mpitrain.algorithms.base.method import Method
from mpitrain.collectives.rma.shared_vector import LARGEST_SHARD
from mpitrain.simulation.compute import ComputeTime
from mpitrain.simulation.engine import Simulation
from mpitrain.simulation.network import REQUEST_BYTES
from mpitrain.simulation.network import Network as Links
from mpitrain.simulation.network_time import NetworkTime
from mpitrain.simulation.world import SimulatedWorld

ENDLESS = 10**9


@dataclass(frozen=True)
class Cluster:
    """A cluster with one worker per node; the default is a ResNet-18 on GPUs with 10 Gbit/s Ethernet.

    Attributes:
        step_seconds: The mean duration of a gradient.
        jitter: The standard deviation of the logarithm of this duration.
        stragglers: The fraction of workers, at least one if it is positive, that are slow.
        slowness: The factor by which their gradients take longer.
        latency, overhead: Of a message between nodes, in seconds.
        bandwidth: Of a node's adapter, in bytes per second.
        model_bytes: The size of the model's vector.
        n_shards: The largest number of shards of a center. By default a center has about the shards of the model's
            vector, and every node owns some.
    """

    step_seconds: float = 0.1
    jitter: float = 0.1
    stragglers: float = 0.0
    slowness: float = 3.0
    latency: float = 20e-6
    overhead: float = 5e-6
    bandwidth: float = 1.25e9
    model_bytes: float = 4.7e7
    n_shards: int | None = None

    def compute(self, n_workers: int, seed: int) -> ComputeTime:
        """Return the durations of the workers' gradients; the stragglers are the last workers."""
        means = np.full(n_workers, self.step_seconds)
        means[n_workers - math.ceil(self.stragglers * n_workers) :] *= self.slowness
        return ComputeTime(list(means), jitter=self.jitter, seed=seed)

    def links(self, n: int) -> Links:
        """Return the network, on which a vector of ``n`` float32 takes the time of the model's."""
        scale = 4.0 * n / self.model_bytes
        return Links(
            latency=self.latency,
            overhead=self.overhead,
            bandwidth=self.bandwidth * scale,
            request_bytes=REQUEST_BYTES * scale,
        )

    def world(self, n: int, compute: ComputeTime) -> SimulatedWorld:
        """Return a node for each worker, for vectors of ``n`` float32."""
        n_workers = compute.spent.size
        n_shards = self.n_shards or max(1, math.ceil(self.model_bytes / 4 / LARGEST_SHARD))
        largest = max(1, math.ceil(n / n_shards))
        return SimulatedWorld(
            n_workers,
            NetworkTime(compute, self.links(n), range(n_workers)),
            nodes=range(n_workers),
            largest_shard=largest,
            smallest_shard=1 if self.n_shards is None else largest,
        )


@dataclass(frozen=True)
class Curve:
    """A run seen through its consensus: what training evaluates.

    Attributes:
        gradients, seconds, gigabytes: (points,) the cost so far: gradients of all workers, virtual time, bytes sent by
            all workers.
        loss: (points,) the training loss.
        error: (points,) the test error.
        computing: The fraction of the workers' time that gradients take.
    """

    gradients: Array
    seconds: Array
    gigabytes: Array
    loss: Array
    error: Array
    computing: float

    def to(self, loss: float) -> tuple[float, float, float]:
        """Return seconds, gradients and gigabytes to the first point with at most this loss; infinity if none has."""
        reached = np.flatnonzero(self.loss <= loss)
        if not reached.size:
            return math.inf, math.inf, math.inf
        k = reached[0]
        return float(self.seconds[k]), float(self.gradients[k]), float(self.gigabytes[k])


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Return the pointwise mean of runs of equal length."""
    names = ("gradients", "seconds", "gigabytes", "loss", "error")
    means = {name: np.mean([getattr(curve, name) for curve in curves], axis=0) for name in names}
    return replace(curves[0], **means, computing=float(np.mean([curve.computing for curve in curves])))


class Watch:
    """The observer of a run: evaluates the consensus every ``every`` gradients of all workers."""

    def __init__(
        self,
        network: Network,
        cluster: Cluster,
        every: int,
        target: float | None,
        longest_seconds: float,
        after_step: Callable[[Simulation, int], object],
    ) -> None:
        self._after_step = after_step
        self._network, self._every = network, every
        self._target, self._longest_seconds = target, longest_seconds
        self._scale = cluster.model_bytes / (4.0 * network.n)
        self.n_gradients, self._due = 0, 0
        self.rows: list[tuple[float, ...]] = []
        self.is_over = False

    def observe(self, simulation: Simulation, rank: int) -> None:
        """Count a gradient, and evaluate if it is time to."""
        self._after_step(simulation, rank)
        self.n_gradients += 1
        if self.n_gradients >= self._due:
            self._due = self.n_gradients - self.n_gradients % self._every + self._every
            self.evaluate(simulation, rank)

    def evaluate(self, simulation: Simulation, rank: int = 0) -> None:
        """Evaluate the consensus as a worker sees it, in no time."""
        clock = simulation.world.schedule
        assert isinstance(clock, NetworkTime)
        with clock.paused(), np.errstate(all="ignore"):
            x = simulation.consensus(rank)
            loss, error = self._network.loss(x), self._network.error(x)
        sent = sum(comm.statistics.bytes_sent for comm in simulation.world.communicators)
        self.rows.append((self.n_gradients, float(clock.clocks[rank]), sent * self._scale / 1e9, loss, error))
        self.is_over |= self._target is not None and loss <= self._target
        self.is_over |= bool(clock.clocks[rank] > self._longest_seconds)


def train(
    network: Network,
    method: Method,
    learning_rate: float,
    n_workers: int,
    n_gradients: int,
    *,
    cluster: Cluster | None = None,
    seed: int = 0,
    points: int = 40,
    batch_size: int = 16,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    decay: Sequence[tuple[float, float]] = (),
    target: float | None = None,
    longest_seconds: float = math.inf,
    parts: Sequence[np.ndarray] | None = None,
    start: np.ndarray | None = None,
    fitness: Callable[[np.ndarray], float] | None = None,
    layers: tuple[slice, ...] = (),
    after_step: Callable[[Simulation, int], object] = lambda simulation, rank: None,
    at_end: Callable[[Simulation], object] = lambda simulation: None,
) -> Curve:
    """Train with simulated workers and return what their consensus does over time.

    Args:
        network: The model and its data.
        method: The method.
        learning_rate: Of every worker.
        n_workers: The number of workers p.
        n_gradients: The gradients of all workers in total.
        cluster: The machines; by default those of ``Cluster``.
        seed: Of the start, the mini-batches, the times and the method.
        points: The number of evaluations.
        batch_size, parts: See ``MiniBatches``.
        momentum, weight_decay, fitness, layers: See ``Simulation``.
        decay: Pairs (fraction of the gradients, factor of the learning rate from then on), ascending.
        target: The loss at which the run may end.
        longest_seconds: The virtual time at which the run may end.
        start: The initial parameters, by default random ones of ``seed``.
        after_step: A function that is called with the simulation and the worker's rank after each step.
        at_end: A function that is called with the finished simulation.
    """
    machines = cluster or Cluster()
    compute = machines.compute(n_workers, seed)
    world = machines.world(network.n, compute)
    batches = MiniBatches(network, n_workers, batch_size=batch_size, seed=seed, parts=parts)
    simulation = Simulation(
        method,
        world,
        batches,
        network.start(seed) if start is None else start,
        learning_rate,
        weight_decay=weight_decay,
        momentum=momentum,
        seed=seed,
        fitness=fitness,
        layers=layers,
        loss=batches.loss,
    )
    watch = Watch(network, machines, max(1, n_gradients // points), target, longest_seconds, after_step)
    watch.evaluate(simulation)
    phases = [*decay, (1.0, 1.0)]
    factor, begin = 1.0, 0
    with np.errstate(all="ignore"):  # what diverges may overflow
        for fraction, following in phases:
            end = round(fraction * n_gradients)
            simulation.learning_rate = learning_rate * factor
            _phase(simulation, watch, (end - begin) // n_workers, end)
            factor, begin = following, end
    clock = world.schedule
    assert isinstance(clock, NetworkTime)
    at_end(simulation)
    rows = np.array(watch.rows).T
    return Curve(*rows, computing=float(compute.spent.sum() / clock.clocks.sum()))


def _phase(simulation: Simulation, watch: Watch, steps: int, end: int) -> None:
    """Run until ``end`` gradients of all workers: synchronous workers ``steps`` steps each, others while it lasts."""
    if simulation.method.is_synchronous:
        # All workers of a collective leave together: the first to look decides for the step.
        verdicts: dict[int, bool] = {}
        simulation.run(steps, watch.observe, is_over=lambda w: verdicts.setdefault(w.t, watch.is_over))
    else:
        simulation.run(ENDLESS, watch.observe, is_over=lambda w: watch.n_gradients >= end or watch.is_over)
