"""A rank's replica of the model: parameters and gradients as vectors, and the worker that exchanges them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mpitrain.algorithms.base.iterate_average import Average
from mpitrain.algorithms.base.method import Method
from mpitrain.algorithms.base.replica import Replica
from mpitrain.algorithms.base.surviving import SurvivingWorker
from mpitrain.algorithms.base.worker import Worker
from mpitrain.collectives.mpi import MPICommunicator
from mpitrain.collectives.world.world import World
from mpitrain.optimizer.exchange import EarlyGradients, ExchangeBoundary
from mpitrain.optimizer.flat import FlatParameters, for_each_state_tensor
from mpitrain.optimizer.foreign_writes import ForeignWrites
from mpitrain.optimizer.fused_sgd import is_plain_sgd
from mpitrain.optimizer.layout import FlatLayout
from mpitrain.optimizer.replica_group import ReplicaGroup
from mpitrain.optimizer.survivors import Survivors


@dataclass(frozen=True)
class ReplicaOptions:
    """The options of a replica; see ``DistributedOptimizer``."""

    seed: int
    average: Average | None
    replica_size: int
    wire: str
    fitness: Callable[[], float] | None
    on_failure: str = "stop"


@dataclass(frozen=True)
class LocalReplica:
    """This rank's copy of the model and its worker.

    Attributes:
        comm: The communicator of all ranks.
        group: The ranks that form one worker with this rank, and their vectors.
        flat: The model's parameters and gradients, which live in the vectors of the group.
        boundary: The boundary between the work of torch and the work of the worker.
        worker: The worker of the method.
        size: The number of ranks in the group.
        fuses_update: Whether fused kernels make the local update instead of the base optimizer.
        survivors: The living ranks, if the method is synchronous and continues after a death; else None.
        foreign_writes: The check for direct changes of shared parameters; None if each worker has its own parameters.
    """

    comm: MPICommunicator
    group: ReplicaGroup
    flat: FlatParameters
    boundary: ExchangeBoundary
    worker: Worker
    size: int
    fuses_update: bool
    foreign_writes: ForeignWrites | None
    survivors: Survivors | None = None

    @property
    def members(self) -> Sequence[int]:
        """The ranks that take part in the steps: all of them, or the survivors after a death."""
        return range(self.comm.size) if self.survivors is None else self.survivors.members

    @property
    def node_shared(self) -> bool:
        """Whether the workers of a node share one vector of parameters."""
        return self.foreign_writes is not None

    @classmethod
    def make(
        cls,
        base: torch.optim.Optimizer,
        model: torch.nn.Module,
        method: Method,
        *,
        layout: FlatLayout,
        world: World,
        options: ReplicaOptions,
    ) -> LocalReplica:
        """Move the parameters into a vector, set them to those of rank 0, and create the worker. Collective."""
        size = options.replica_size
        device = world.gpu if size == 1 and not method.on_host else None
        comm = MPICommunicator(world, on_host=device is None, wire=options.wire)
        for_each_state_tensor(model, comm.broadcast)
        fuses = device is None and not method.owns_update and is_plain_sgd(base) and layout.may_be_fused
        node_shared = fuses and method.shares_parameters and size == 1
        group = ReplicaGroup(comm, size, layout.n, layout.dtype, node_shared=node_shared)
        flat = FlatParameters(layout, group.x.local, group.g.local)
        boundary = ExchangeBoundary(flat, device)
        fitness = None if options.fitness is None else _fitness_of_vectors(options.fitness, flat)

        survivors: Survivors | None = None

        def make_worker(workers: MPICommunicator) -> Worker:
            nonlocal survivors
            replica = Replica(workers, group.x, group.g, options.seed, layout.layers, fitness, node_shared=node_shared)
            if options.on_failure == "continue" and method.is_synchronous and comm.size > 1:
                survivors = Survivors(workers, replica, options.wire)
                return SurvivingWorker(method, survivors.start(method.worker), replica, survivors)
            worker = method.worker(replica)
            return worker if options.average is None else options.average.wrap(worker, replica)

        with boundary.exchanging():
            comm.barrier()
            worker = group.worker(make_worker, method.metrics)
        if method.takes_gradients_early and size == 1 and not flat.staged:
            early = EarlyGradients(worker, boundary)
            flat.watch_gradients(early.ready, early.complete)
        foreign_writes = ForeignWrites(model, layout, group.x.local) if node_shared else None
        fuses = fuses and not node_shared
        return cls(comm, group, flat, boundary, worker, size, fuses, foreign_writes, survivors)

    def close(self, vector: Any) -> None:
        """Move the parameters back into ordinary memory, and free the shared memory. Collective.

        Args:
            vector: (n,) the values for the parameters, in the same memory as the worker's vectors.
        """
        with self.boundary.exchanging():
            self.flat.detach(vector)
            self.comm.barrier_of_survivors()
            if self.survivors is not None:
                self.survivors.close()
            self.group.close()
            self.comm.free()


def _fitness_of_vectors(fitness: Callable[[], float], flat: FlatParameters) -> Callable[[np.ndarray], float]:
    """Return the fitness of parameters (n,), computed by a function of the model."""

    def fitness_of(vector: np.ndarray) -> float:
        with flat.swapped_parameters(vector):
            return float(fitness())

    return fitness_of
