"""Workers as greenlets in one process, and the collectives in which they wait for each other.

Each worker runs ordinary blocking code. It gives way at the end of a step, while it waits for others, and, if
``interleave_locks`` is set, before it acquires a lock. The schedule then decides which worker runs next. An
asynchronous run is therefore as reproducible as a synchronous one, and a number suffices to make a worker k times
slower.

Only one worker runs at a time, and none gives way while it holds a lock. An operation that is atomic between ranks is
therefore atomic here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from greenlet import getcurrent, greenlet

from mpitrain.collectives.world.fault_tolerance import require_all
from mpitrain.simulation.schedules import Ready, Schedule, Watched

T = TypeVar("T")


@dataclass(eq=False)
class OpenCollective:
    """A collective in progress.

    Attributes:
        values: The contribution of each worker, by its rank in the group.
        n_absent: The number of workers that have not contributed yet.
        n_present: The number of workers that have not received the result yet.
        result: The combined value, once all have contributed.
    """

    values: list[Any]
    n_absent: int
    n_present: int
    result: Any = None


@dataclass(eq=False)
class Group:
    """The workers of a communicator. ``Scheduler.group`` creates a group.

    Attributes:
        ranks: The world ranks of the workers, in the order of their group ranks.
        nodes: The node of each worker.
        ranks_of_nodes: The group ranks on each node, ascending.
        n_collectives: (size,) the number of collectives that each worker has called in the current run.
        open: The collectives in progress, by their number in the order of calls.
    """

    ranks: tuple[int, ...]
    nodes: list[int]
    ranks_of_nodes: dict[int, list[int]] = field(init=False)
    n_collectives: list[int] = field(init=False)
    open: dict[int, OpenCollective] = field(init=False)

    def __post_init__(self) -> None:
        self.ranks_of_nodes = {}
        for rank, node in enumerate(self.nodes):
            self.ranks_of_nodes.setdefault(node, []).append(rank)
        self.reset()

    def reset(self) -> None:
        """Discard all collectives in progress, at the beginning of a run."""
        self.n_collectives = [0] * len(self.ranks)
        self.open = {}


class Scheduler:
    """The scheduler of a simulated world. It runs one worker at a time.

    Args:
        size: The number of workers.
        schedule: The schedule, which chooses the next worker whenever a worker gives way.

    Attributes:
        dead: The world ranks of the workers that have died.
        n_locked: The number of locks that the running worker holds. No other worker runs while it holds one.
    """

    def __init__(self, size: int, schedule: Schedule) -> None:
        self.size, self.schedule = size, schedule
        self.dead: frozenset[int] = frozenset()
        self.n_locked = 0
        self._groups: list[Group] = []
        self._hub: greenlet | None = None
        self._unfinished: set[int] = set()  # workers of the current run
        self._ready = Ready(size)
        self._in_collective: set[int] = set()  # workers whose collective others have not reached
        self._conditions: dict[int, Callable[[], bool]] = {}  # what each worker in `wait_until` waits for
        self._polled: set[int] = set()  # workers whose condition is checked at every turn
        self._watchers: dict[Watched, set[int]] = {}  # workers whose condition is checked when a block changes
        self._reading: set[Watched] | None = None  # blocks that the condition being checked has read

    def group(self, ranks: Sequence[int], nodes: Sequence[int]) -> Group:
        """Return a new group of workers, from their world ranks in ascending order and the nodes of all world ranks."""
        self._groups.append(Group(tuple(ranks), [nodes[rank] for rank in ranks]))
        return self._groups[-1]

    def run(self, program: Callable[[int], T]) -> list[T]:
        """Run ``program(rank)`` for every worker, until all have returned or the schedule ends the run.

        Returns:
            The result of each worker's program; None for a worker that has not finished.

        Raises:
            RuntimeError: Deadlock: all unfinished workers wait for each other.
        """
        self._hub = getcurrent()
        # A run ended by its script or by an exception may have left workers in a collective: they no longer exist.
        self.n_locked = 0
        for group in self._groups:
            group.reset()
        results: list[Any] = [None] * self.size
        unfinished = self._unfinished = set(range(self.size)) - self.dead
        self._ready = Ready(self.size)
        self._wake_all()

        def body(rank: int) -> None:
            results[rank] = program(rank)
            unfinished.discard(rank)
            self._ready.discard(rank)

        workers = [greenlet(partial(body, rank)) for rank in range(self.size)]
        while unfinished:
            self._release()
            chosen = self.schedule.choose(self._ready)
            if chosen is None:
                break
            workers[chosen].switch()
        return results

    def kill(self, rank: int) -> None:
        """Let a worker die: it never runs again. Workers that wait for it raise ``RankFailed``. Its memory stays."""
        self.dead |= {rank}
        self._unfinished.discard(rank)
        self._ready.discard(rank)
        self._wake_all()  # every waiting worker runs once more and checks for the dead

    def give_way(self) -> None:
        """Let the schedule choose the worker that runs next. Called by a worker."""
        if self._hub is not None and getcurrent() is not self._hub:
            self._hub.switch()

    def wait_until(self, rank: int, condition: Callable[[], bool], group: Group) -> None:
        """Let other workers run until the condition holds. Called by a worker.

        Args:
            rank: The world rank of the calling worker.
            condition: A condition that other workers can make true.
            group: The workers that may make it true.

        Raises:
            RankFailed: A worker of the group has died.
        """
        while not condition():
            self._require_worker("only a worker of a program given to SimulatedWorld.run can wait for the others")
            self._require_alive(group)
            self._conditions[rank] = condition
            self._ready.discard(rank)
            self._watch(rank)
            self.give_way()

    def read(self, block: Watched) -> None:
        """Note that a block is read.

        If a condition reads it, the condition is checked again after the block has changed.
        """
        if self._reading is not None:
            self._reading.add(block)

    def changed(self, block: Watched) -> None:
        """Note that a block has changed. Conditions that depend on it are checked before the next worker runs."""
        if self._watchers:
            self._polled |= self._watchers.pop(block, set())

    def exchange(
        self,
        group: Group,
        rank: int,
        value: T,
        combine: Callable[[list[T]], Any],
        kind: str = "set-up",
        n_bytes: int = 0,
    ) -> Any:
        """Wait until every worker of the group has contributed a value, and return the combined result.

        Args:
            group: The workers that take part.
            rank: The group rank of the calling worker.
            value: The contribution of this worker.
            combine: A function that computes the result from the values in the order of the group ranks. The last
                worker to arrive calls it once.
            kind, n_bytes: See ``Schedule.all_met``.

        Raises:
            RankFailed: A worker of the group has died.
        """
        group.n_collectives[rank] += 1
        number = group.n_collectives[rank]
        size = len(group.ranks)
        collective = group.open.get(number)
        if collective is None:
            collective = group.open[number] = OpenCollective([None] * size, size, size)
        collective.values[rank] = value
        collective.n_absent -= 1
        if collective.n_absent:
            self._require_worker("a collective needs all workers: call it in a program given to SimulatedWorld.run")
            self._wait_for(collective, group, rank)
        else:
            collective.result, collective.values = combine(collective.values), []
            waiting = self._in_collective.intersection(group.ranks)
            self._in_collective -= waiting
            self._ready.add(waiting)
            self.schedule.all_met(group.ranks, kind, n_bytes)
        collective.n_present -= 1
        if not collective.n_present:
            del group.open[number]
        return collective.result

    def _wait_for(self, collective: OpenCollective, group: Group, rank: int) -> None:
        """Let other workers run until all of the group have contributed."""
        while collective.n_absent:
            self._require_alive(group)
            self._in_collective.add(group.ranks[rank])
            self._ready.discard(group.ranks[rank])
            self.give_way()

    def _require_alive(self, group: Group) -> None:
        """Raise ``RankFailed`` if a worker of the group has died."""
        if self.dead:
            require_all(self.dead.intersection(group.ranks))

    def _require_worker(self, message: str) -> None:
        """Raise ``RuntimeError`` unless a worker of a run is calling."""
        if self._hub is None or getcurrent() is self._hub:
            raise RuntimeError(message)

    def _wake_all(self) -> None:
        """Let every unfinished worker run, also those that wait."""
        self._in_collective.clear()
        self._conditions.clear()
        self._polled.clear()
        self._watchers.clear()
        self._ready.add(self._unfinished)
        self.schedule.ready_again(self._unfinished)

    def _watch(self, rank: int) -> bool:
        """Note the blocks on which the condition of a waiting worker depends; return whether it holds."""
        self._reading = set()
        try:
            holds = self._conditions[rank]()
        finally:
            blocks, self._reading = self._reading, None
        if blocks and not holds:
            self._polled.discard(rank)
            for block in blocks:
                self._watchers.setdefault(block, set()).add(rank)
        else:
            self._polled.add(rank)
        return holds

    def _release(self) -> None:
        """Make the workers ready whose condition has become true.

        Raises:
            RuntimeError: No worker is ready.
        """
        for rank in sorted(self._polled):
            if rank not in self._conditions:
                self._polled.discard(rank)
            elif self._watch(rank):
                del self._conditions[rank]
                self._polled.discard(rank)
                self._ready.add((rank,))
                self.schedule.released(rank)
        if not len(self._ready):
            waits = (
                (self._in_collective, "in a collective that the others have left or never reach"),
                (self._conditions, "for a condition that no worker will make true"),
            )
            raise RuntimeError("; ".join(f"workers {sorted(ranks)} wait {what}" for ranks, what in waits if ranks))
