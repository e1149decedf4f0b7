"""Runs of a method in one process, with many workers, a schedule, and gradients from a function.

The method's classes are those that run under mpirun. What a test proves about a method in the simulation therefore
holds under mpirun, too. Only the order of events differs: here the schedule decides it, under mpirun the machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpitrain import kernels
from mpitrain.algorithms.base.iterate_average import Average
from mpitrain.algorithms.base.method import Method
from mpitrain.algorithms.base.replica import ParamGroupSlice, Replica
from mpitrain.algorithms.base.worker import Worker
from mpitrain.kernels import norms
from mpitrain.simulation.communicator import SimulatedCommunicator
from mpitrain.simulation.gradients import Gradient, ahead_of_time
from mpitrain.simulation.schedules import RoundRobin
from mpitrain.simulation.world import SimulatedWorld


@dataclass
class Simulation:
    """Workers of one method in a simulated world.

    Args:
        method: The method and its hyper-parameters.
        world: The workers and their schedule.
        gradient: A function that computes the gradient of a worker. If it has a method ``batch``, this method computes
            the gradients of several workers together.
        start: The initial parameters: (n,) for all workers, or (p, n) with a row for each. State that workers share,
            such as a center, starts from those of worker 0.
        learning_rate: The learning rate eta.
        weight_decay: The weight decay: this multiple of the parameters is added to the gradient.
        momentum: The momentum of the local SGD, for methods that do not make the local update themselves. Checkpoints
            do not contain the velocity of this momentum.
        seed: The seed of the method's random choices.
        layers, fitness: The model's layers and fitness, as in ``Replica``.
        loss: A function ``loss(rank, x)`` that returns the loss of the mini-batch, for methods that need it. The
            default is the norm of the gradient.
        average: A running average of the iterates, which replaces the method's consensus.
    """

    method: Method
    world: SimulatedWorld
    gradient: Gradient
    start: np.ndarray
    learning_rate: float
    weight_decay: float = 0.0
    momentum: float = 0.0
    seed: int = 0
    layers: tuple[slice, ...] = ()
    fitness: Callable[[Any], float] | None = None
    loss: Callable[[int, np.ndarray], float] | None = None
    average: Average | None = None

    def __post_init__(self) -> None:
        starts = np.broadcast_to(self.start, (self.world.size, np.shape(self.start)[-1]))

        def set_up(comm: SimulatedCommunicator) -> Worker:
            x, g = comm.vector(starts.shape[1], starts.dtype), comm.vector(starts.shape[1], starts.dtype)
            x.local[...] = starts[comm.rank]
            comm.barrier()
            replica = Replica(comm, x, g, self.seed, self.layers, self.fitness)
            worker = self.method.worker(replica)
            return worker if self.average is None else self.average.wrap(worker, replica)

        # Set-up is collective and switches workers any number of times: the schedule applies to the steps only.
        schedule, self.world.schedule = self.world.schedule, RoundRobin()
        self.workers = self.world.run(set_up)
        self.world.schedule = schedule

    def run(
        self,
        steps: int,
        after_step: Callable[[Simulation, int], None] | None = None,
        *,
        is_over: Callable[[Worker], bool] = lambda worker: False,
    ) -> Simulation:
        """Run every worker for a number of steps, or until the schedule ends.

        Args:
            steps: The number of steps of each worker.
            after_step: A function that is called with this object and the worker's rank after each step.
            is_over: A function that returns whether a worker has finished. It is called before each step.
        """
        gradients = ahead_of_time(self.gradient, [worker.x.local for worker in self.workers])

        def program(comm: SimulatedCommunicator) -> None:
            worker = self.workers[comm.rank]
            group_slices = self._group_slices(worker)
            update, velocity = (None, None) if self.method.owns_update else self._sgd(worker)
            for step in range(steps):
                if is_over(worker):
                    break
                comm.compute()  # first, so that others end their steps and announce gradients for the same batch
                worker.g.local[...] = gradients(comm.rank, worker.x.local)
                skips = self.method.combines_gradients and not math.isfinite(norms.norm(worker.g.local))
                loss = self._loss(worker) if self.method.needs_loss else None
                found_nonfinite = worker.step(group_slices, update, loss, skips=skips)
                if found_nonfinite and velocity is not None:
                    kernels.keep_finite(velocity)
                if after_step is not None:
                    after_step(self, comm.rank)
                if step + 1 < steps:
                    gradients.announce(comm.rank)
                comm.end_step()

        self.world.run(program)
        return self

    def finalize(self) -> Simulation:
        """Make the last exchange of a run, for every living worker."""

        def program(comm: SimulatedCommunicator) -> None:
            worker = self.workers[comm.rank]
            worker.wait()
            worker.finalize(self._group_slices(worker))

        schedule, self.world.schedule = self.world.schedule, RoundRobin()
        self.world.run(program)
        self.world.schedule = schedule
        return self

    def _group_slices(self, worker: Worker) -> list[ParamGroupSlice]:
        """Return the parameters as one group."""
        return [ParamGroupSlice(slice(0, worker.x.local.size), self.learning_rate, self.weight_decay)]

    def x(self) -> np.ndarray:
        """Return the parameters of all workers, (p, n)."""
        return np.stack([worker.x.local for worker in self.workers])

    def consensus(self, rank: int = 0) -> np.ndarray:
        """Return the consensus (n,), as one worker sees it."""
        out = np.zeros_like(self.workers[rank].x.local)
        self.workers[rank].consensus(out)
        return out

    def _loss(self, worker: Worker) -> float:
        if self.loss is not None:
            return self.loss(worker.comm.rank, worker.x.local)
        return float(np.linalg.norm(worker.g.local))

    def _sgd(self, worker: Worker) -> tuple[Callable[[], object], np.ndarray | None]:
        """Return the local update x <- x - eta*(g + decay*x) and, if it has momentum as torch's SGD, its velocity."""
        x, g, eta, decay = worker.x.local, worker.g.local, self.learning_rate, self.weight_decay
        if self.momentum == 0:
            return lambda: kernels.sgd_step(x, g, eta, decay), None
        v = np.zeros_like(x)
        return lambda: kernels.torch_momentum_step(x, v, g, eta, self.momentum, decay), v
