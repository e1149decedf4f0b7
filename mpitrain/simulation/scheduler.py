"""Workers as greenlets in one process, and the collectives in which they wait for each other.

Each worker runs ordinary blocking code. It gives way at the end of a step, while it waits for others, and, if asked to,
before it acquires a lock. The schedule then decides which worker runs next. An asynchronous run is therefore as
reproducible as a synchronous one, and a worker that is k times slower is a number.

Only one worker runs at a time and none gives way while it holds a lock: an operation that is atomic between ranks is
atomic here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from greenlet import getcurrent, greenlet

from mpitrain.collectives.world.fault_tolerance import require_all
from mpitrain.simulation.schedules import Schedule

T = TypeVar("T")

_ABSENT, _COLLECTED = object(), object()
"""A value that a worker has not contributed yet; one whose worker already has the result."""


@dataclass(eq=False)
class Group:
    """Workers that call collectives with each other. ``Scheduler.group`` makes one.

    Attributes:
        ranks: World ranks of the workers, in the order of their group ranks.
        n_collectives: (size,) the collectives that each worker has called in the current run.
        contributions: The values of each unfinished collective by group rank, keyed by the collective's number.
        results: The result of each collective that not all workers have collected yet.
    """

    ranks: tuple[int, ...]
    n_collectives: list[int] = field(init=False)
    contributions: dict[int, list[Any]] = field(init=False)
    results: dict[int, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all collectives, including those that an interrupted run left unfinished."""
        self.n_collectives = [0] * len(self.ranks)
        self.contributions, self.results = {}, {}


class Scheduler:
    """Runs the workers of a simulated world, one at a time.

    Args:
        size: The number of workers.
        schedule: Decides which worker runs next whenever one gives way.

    Attributes:
        dead: World ranks of the workers that have died.
    """

    def __init__(self, size: int, schedule: Schedule) -> None:
        self.size, self.schedule = size, schedule
        self.dead: frozenset[int] = frozenset()
        self._groups: list[Group] = []
        self._hub: greenlet | None = None
        self._unfinished: set[int] = set()  # workers of the current run
        self._in_collective: set[int] = set()  # workers whose collective others have not reached
        self._conditions: dict[int, Callable[[], bool]] = {}  # what each worker in `wait_until` waits for

    def group(self, ranks: Sequence[int]) -> Group:
        """Return a new group of workers, given by their world ranks."""
        self._groups.append(Group(tuple(ranks)))
        return self._groups[-1]

    def run(self, program: Callable[[int], T]) -> list[T]:
        """Run ``program(rank)`` as every worker, until all have returned or the schedule ends.

        Returns:
            The result of each worker's program; None for workers that did not finish.

        Raises:
            RuntimeError: Every unfinished worker waits for something that no worker will do.
        """
        self._hub = getcurrent()
        # A run ended by its script or by an exception may have left workers in a collective: they no longer exist.
        self._in_collective.clear()
        self._conditions.clear()
        for group in self._groups:
            group.reset()
        results: list[Any] = [None] * self.size
        unfinished = self._unfinished = set(range(self.size)) - self.dead

        def body(rank: int) -> None:
            results[rank] = program(rank)
            unfinished.discard(rank)

        workers = [greenlet(partial(body, rank)) for rank in range(self.size)]
        while unfinished:
            chosen = self.schedule.choose(self._ready(unfinished))
            if chosen is None:
                break
            workers[chosen].switch()
        return results

    def kill(self, rank: int) -> None:
        """End a worker: it never runs again, its memory stays, and workers that wait for it raise ``RankFailed``."""
        self.dead |= {rank}
        self._unfinished.discard(rank)
        self._in_collective.clear()  # every waiting worker runs once more and checks for the dead
        self._conditions.clear()

    def give_way(self) -> None:
        """Let the schedule decide which worker runs next. Called by a worker."""
        if self._hub is not None and getcurrent() is not self._hub:
            self._hub.switch()

    def wait_until(self, rank: int, condition: Callable[[], bool], group: Group) -> None:
        """Let other workers run until the condition holds. Called by a worker.

        Args:
            rank: World rank of the calling worker.
            condition: Becomes true by what other workers do.
            group: The workers that may make it true.

        Raises:
            RankFailed: A worker of the group has died.
        """
        while not condition():
            self._require_worker("only a worker of a program given to SimulatedWorld.run can wait for the others")
            require_all(self.dead.intersection(group.ranks))
            self._conditions[rank] = condition
            self.give_way()

    def exchange(self, group: Group, rank: int, value: T, combine: Callable[[list[T]], Any]) -> Any:
        """Wait until every worker of the group has contributed a value, and return the combined result.

        Args:
            group: The workers that take part.
            rank: Group rank of the calling worker.
            value: Its contribution.
            combine: Called once, by the last worker to arrive, with the values in the order of the group ranks.

        Raises:
            RankFailed: A worker of the group has died.
        """
        group.n_collectives[rank] += 1
        number = group.n_collectives[rank]
        values = group.contributions.setdefault(number, [_ABSENT] * len(group.ranks))
        values[rank] = value
        if any(v is _ABSENT for v in values):
            self._require_worker("a collective needs all workers: call it in a program given to SimulatedWorld.run")
            while number not in group.results:
                require_all(self.dead.intersection(group.ranks))
                self._in_collective.add(group.ranks[rank])
                self.give_way()
        else:
            group.results[number] = combine(values)
            self._in_collective -= set(group.ranks)
            self.schedule.all_met(group.ranks)
        result = group.results[number]
        values[rank] = _COLLECTED
        if all(v is _COLLECTED for v in values):
            del group.results[number], group.contributions[number]
        return result

    def _require_worker(self, message: str) -> None:
        """Raise ``RuntimeError`` unless a worker of a run is calling."""
        if self._hub is None or getcurrent() is self._hub:
            raise RuntimeError(message)

    def _ready(self, unfinished: set[int]) -> list[int]:
        """Return the workers that can run, ascending."""
        for rank, condition in list(self._conditions.items()):
            if condition():
                del self._conditions[rank]
                self.schedule.released(rank)
        ready = sorted(unfinished - self._in_collective - self._conditions.keys())
        if not ready:
            waits = (
                (self._in_collective, "in a collective that the others have left or never reach"),
                (self._conditions, "for a condition that no worker will make true"),
            )
            raise RuntimeError("; ".join(f"workers {sorted(ranks)} wait {what}" for ranks, what in waits if ranks))
        return ready
