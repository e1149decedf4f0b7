"""Many workers in one process, which run in an order that a test or a study chooses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from mpitrain.collectives.rma.shared_vector import LARGEST_SHARD, SMALLEST_SHARD
from mpitrain.simulation.communicator import SimulatedCommunicator
from mpitrain.simulation.peer_memory import Layout
from mpitrain.simulation.scheduler import Scheduler
from mpitrain.simulation.schedules import RoundRobin, Schedule

T = TypeVar("T")


class SimulatedWorld:
    """Workers in one process, each with a communicator.

    Args:
        size: The number of workers.
        schedule: The schedule, which chooses the next worker whenever a worker gives way; by default round robin.
        interleave_locks, largest_shard, smallest_shard: See ``Layout``.
        nodes: (size,) the node of each worker; by default all workers share a node.

    Attributes:
        communicators: The communicator of each worker, by rank.
        scheduler: The scheduler that runs the workers.
    """

    def __init__(
        self,
        size: int,
        schedule: Schedule | None = None,
        *,
        interleave_locks: bool = False,
        largest_shard: int = LARGEST_SHARD,
        smallest_shard: int = SMALLEST_SHARD,
        nodes: Sequence[int] | None = None,
    ) -> None:
        if size < 1:
            raise ValueError(f"a world has at least 1 worker, not {size}")
        if nodes is not None and len(nodes) != size:
            raise ValueError(f"{size} workers have {size} nodes, not {len(nodes)}")
        layout = Layout(tuple([0] * size if nodes is None else nodes), largest_shard, smallest_shard, interleave_locks)
        self.size = size
        self.scheduler = Scheduler(size, schedule or RoundRobin())
        everyone = self.scheduler.group(range(size), layout.nodes)
        self.communicators = [SimulatedCommunicator(self.scheduler, layout, everyone, rank) for rank in range(size)]

    @property
    def schedule(self) -> Schedule:
        """The schedule, which may be replaced between two runs."""
        return self.scheduler.schedule

    @schedule.setter
    def schedule(self, schedule: Schedule) -> None:
        self.scheduler.schedule = schedule

    @property
    def dead(self) -> frozenset[int]:
        """Ranks of the workers that have died."""
        return self.scheduler.dead

    def run(self, program: Callable[[SimulatedCommunicator], T]) -> list[T]:
        """Run ``program(communicator)`` for every worker, until all have returned or the schedule ends the run.

        Returns:
            The result of each worker's program; None for a worker that has not finished.

        Raises:
            RuntimeError: Deadlock: all unfinished workers wait for each other.
        """
        return self.scheduler.run(lambda rank: program(self.communicators[rank]))

    def kill(self, rank: int) -> None:
        """Let a worker die: it never runs again. Workers that wait for it raise ``RankFailed``. Its memory stays."""
        self.scheduler.kill(rank)
