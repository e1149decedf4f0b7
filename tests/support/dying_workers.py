"""Simulated workers of synchronous methods that continue when one of them dies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mpitrain.algorithms.base.replica import Replica
from mpitrain.algorithms.base.surviving import SurvivingWorker
from mpitrain.errors import RankFailed
from mpitrain.simulation.communicator import SimulatedCommunicator
from mpitrain.simulation.engine import Simulation
from mpitrain.simulation.memory import SimulatedVector
from mpitrain.simulation.scheduler import Group


class SimulatedGroup:
    """The living workers of a simulated world; implements ``surviving.Group``.

    Args:
        simulation: The simulation of all workers.
        replica: The replica of this worker.
        groups: The groups that have been formed, by members; the same object for all workers.
    """

    def __init__(self, simulation: Simulation, replica: Replica, groups: dict[tuple[int, ...], tuple[Group, Group]]):
        self._world, self._replica, self._groups = simulation.world, replica, groups
        self._me = replica.comm.rank
        self.members: Sequence[int] = range(replica.comm.size)
        self._agreement = self._communicator(1)

    def _communicator(self, number: int) -> SimulatedCommunicator:
        """Return the communicator of the members: 0 for exchanges, 1 for agreements."""
        scheduler, members = self._world.scheduler, tuple(self.members)
        layout = self._world.communicators[self._me]._layout
        if members not in self._groups:
            self._groups[members] = tuple(scheduler.group(members, layout.nodes) for _ in range(2))
        group = self._groups[members][number]
        return SimulatedCommunicator(scheduler, layout, group, members.index(self._me), self._replica.comm.statistics)

    def agree(self, succeeded: bool) -> bool:
        try:
            return bool(self._agreement.gather([succeeded]).all())
        except RankFailed:
            return False

    def comes_from_death(self, error: Exception) -> bool:
        return isinstance(error, RankFailed)

    def shrink(self, make: Callable[[Replica, Sequence[int]], Any]) -> Any:
        before = self.members
        self.members = [rank for rank in before if rank not in self._world.dead]
        self._agreement, comm = self._communicator(1), self._communicator(0)
        vectors = []
        for vector in (self._replica.x, self._replica.g):
            vectors.append(SimulatedVector([vector.arrays[rank] for rank in self.members], comm.rank))
        replica = Replica(comm, *vectors, self._replica.seed, self._replica.layers, self._replica.fitness)
        return make(replica, [list(before).index(rank) for rank in self.members])


def survivable(simulation: Simulation) -> Simulation:
    """Let the workers of a simulation continue when one dies."""
    groups: dict[tuple[int, ...], tuple[Group, Group]] = {}
    for rank, worker in enumerate(simulation.workers):
        replica = Replica(worker.comm, worker.x, worker.g, simulation.seed, simulation.layers, simulation.fitness)
        group = SimulatedGroup(simulation, replica, groups)
        simulation.workers[rank] = SurvivingWorker(simulation.method, worker, replica, group)
    return simulation


def die_after(victim: int, step: int) -> Callable[[Simulation, int], None]:
    """Return a function for ``Simulation.run`` that kills a worker after a step."""
    made: dict[int, int] = {}

    def after_step(simulation: Simulation, rank: int) -> None:
        made[rank] = made.get(rank, 0) + 1
        if (rank, made[rank]) == (victim, step):
            simulation.world.kill(victim)

    return after_step


def tear(simulation: Simulation, victim: int, n_calls: int, *, name: str = "allreduce") -> None:
    """Let the ``n_calls``-th collective ``name`` kill a worker, finish on some survivors and fail on the others.

    Those on which it fails find garbage in their vector.
    """
    for rank, worker in enumerate(simulation.workers):
        comm, made, original = worker._worker.comm, [0], getattr(worker._worker.comm, name)

        def torn(vector: Any, *args: Any, rank=rank, comm=comm, made=made, original=original, **more: Any) -> Any:
            result = original(vector, *args, **more)
            made[0] += 1
            if made[0] == n_calls:
                if victim not in simulation.world.dead:
                    simulation.world.kill(victim)
                if rank == victim:
                    comm._scheduler.give_way()  # for ever
                if rank % 2 == 0:
                    if hasattr(vector, "local"):
                        vector.local[...] = np.nan
                    raise RankFailed("torn")
            return result

        setattr(comm, name, torn)
