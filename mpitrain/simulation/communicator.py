"""Many workers in one process, in an order that the test (or the study) decides.

Each worker is a greenlet that runs ordinary blocking code: it gives way at the end of a step, when it waits for the
others in a collective, and, when asked for, before it takes a lock. Who goes on is the schedule's decision, so that an
asynchronous run is as reproducible as a synchronous one, and a worker that is k times slower is a number.

Only one worker runs at a time, so a lock is never held across a switch: what is atomic between ranks is atomic here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from greenlet import getcurrent, greenlet

from mpitrain.collectives.rma.blocks import N_TAGS, Block, Blocks
from mpitrain.collectives.rma.mailboxes import Mailboxes
from mpitrain.collectives.rma.shared_vector import LARGEST_SHARD, SharedVector
from mpitrain.collectives.topology.partition import shards, split
from mpitrain.collectives.world.background import Started
from mpitrain.collectives.world.fault_tolerance import of_part, require_all
from mpitrain.collectives.world.statistics import Statistics
from mpitrain.simulation.schedules import RoundRobin, Schedule

T = TypeVar("T")


class SimulatedWorld:
    """Workers in one process.

    Args:
        size: How many.
        schedule: Who goes on, whenever a worker gives way.
        interleave_locks: Give way before every lock too, so that the visits of two workers to the shards of a vector
            mix as they do between ranks.
        largest_shard: Elements; small ones let a small vector have many shards.
        nodes: (size,) the node of each worker; all on one when not given.
    """

    def __init__(
        self,
        size: int,
        schedule: Schedule | None = None,
        *,
        interleave_locks: bool = False,
        largest_shard: int = LARGEST_SHARD,
        nodes: Sequence[int] | None = None,
    ) -> None:
        if size < 1:
            raise ValueError(f"a world has at least 1 worker, not {size}")
        self.size = size
        self.schedule = schedule or RoundRobin()
        self.interleave_locks = interleave_locks
        self.largest_shard = largest_shard
        self.nodes = list(nodes) if nodes is not None else [0] * size
        if len(self.nodes) != size:
            raise ValueError(f"{size} workers have {size} nodes, not {len(self.nodes)}")
        self.dead: frozenset[int] = frozenset()
        everybody = Group(tuple(range(size)))
        self.communicators = [SimulatedCommunicator(self, rank, everybody) for rank in range(size)]
        self._hub: greenlet | None = None
        self._unfinished: set[int] = set()  # workers of the present run
        self._waiting: set[int] = set()  # workers inside a collective that others have not reached
        self._conditions: dict[int, Callable[[], bool]] = {}  # of workers that wait for what others do

    def run(self, program: Callable[[SimulatedCommunicator], T]) -> list[T]:
        """Run ``program(communicator)`` for every worker, until all have returned or the schedule is at its end.

        Returns:
            What each worker's program returned; None for those that a finished script left unfinished.

        Raises:
            RuntimeError: When every unfinished worker waits in a collective that some worker will never reach.
        """
        self._hub = getcurrent()
        # A run that a script or an exception ended may have left workers in a collective: they are gone.
        self._waiting.clear()
        self._conditions.clear()
        for communicator in self.communicators:
            communicator.begin()
        results: list[Any] = [None] * self.size
        unfinished = self._unfinished = set(range(self.size)) - self.dead

        def body(rank: int) -> Callable[[], None]:
            def run_program() -> None:
                results[rank] = program(self.communicators[rank])
                unfinished.discard(rank)

            return run_program

        workers = [greenlet(body(rank)) for rank in range(self.size)]
        while unfinished:
            ready = self._ready(unfinished)
            chosen = self.schedule.choose(ready)
            if chosen is None:
                break
            workers[chosen].switch()
        return results

    def _ready(self, unfinished: set[int]) -> list[int]:
        """Who can go on."""
        for rank, condition in list(self._conditions.items()):
            if condition():
                del self._conditions[rank]
                self.schedule.released(rank)
        ready = sorted(unfinished - self._waiting - self._conditions.keys())
        if not ready:
            stuck = [
                f"workers {sorted(ranks)} wait {for_what}"
                for ranks, for_what in (
                    (self._waiting, "in a collective that the others have left or never reach"),
                    (self._conditions, "for something that nobody will do"),
                )
                if ranks
            ]
            raise RuntimeError("; ".join(stuck))
        return ready

    def kill(self, rank: int) -> None:
        """A worker dies: it never runs again, its memory stays, and whoever waits for it gets ``RankFailed``."""
        self.dead |= {rank}
        self._unfinished.discard(rank)
        self._waiting.clear()  # they look again
        self._conditions.clear()

    def give_way(self) -> None:
        """Let the schedule decide who goes on. Called by a worker."""
        if self._hub is not None and getcurrent() is not self._hub:
            self._hub.switch()

    def wait_until(self, rank: int, condition: Callable[[], bool], group: Group) -> None:
        """Let the others go on until the condition holds, or one of the group has died. Called by a worker."""
        while not condition():
            if self._hub is None or getcurrent() is self._hub:
                raise RuntimeError("only a worker of a program given to SimulatedWorld.run can wait for the others")
            require_all(self.dead.intersection(group.ranks))
            self._conditions[rank] = condition
            self.give_way()

    def exchange(self, rank: int, group: Group, number: int, value: T, combine: Callable[[list[T]], Any]) -> Any:
        """A collective: wait until all workers have brought a value, and have what ``combine`` makes of all of them.

        Args:
            rank: The worker that calls.
            group: Those that meet.
            number: Its how-manieth collective of this group this is.
            value: What it brings.
            combine: Called once, by whoever comes last, with the values by rank.

        Raises:
            RankFailed: One of them has died.
        """
        values = group.collectives.setdefault(number, [_ABSENT] * len(group.ranks))
        index = group.ranks.index(rank)
        values[index] = value
        if any(v is _ABSENT for v in values):
            if getcurrent() is self._hub or self._hub is None:
                raise RuntimeError("a collective needs all workers: call it in a program given to SimulatedWorld.run")
            while number not in group.made:
                require_all(self.dead.intersection(group.ranks))
                self._waiting.add(rank)
                self.give_way()
        else:
            group.made[number] = combine(values)
            self._waiting -= set(group.ranks)
            self.schedule.all_met(group.ranks)
        result = group.made[number]
        values[index] = _GONE
        if all(v is _GONE for v in values):
            del group.made[number], group.collectives[number]
        return result


_ABSENT, _GONE = object(), object()


@dataclass(eq=False)
class Group:
    """Workers that have collectives together.

    Attributes:
        ranks: Their ranks in the world, by their rank in the group.
        collectives: What those have brought that are waiting, by the number of the collective.
        made: What came of it, until all have taken it along.
    """

    ranks: tuple[int, ...]
    collectives: dict[int, list[Any]] = field(default_factory=dict)
    made: dict[int, Any] = field(default_factory=dict)


class SimulatedVector:
    """One array a worker; ``local`` is that of the worker which made it."""

    def __init__(self, arrays: list[np.ndarray], rank: int) -> None:
        self.arrays, self.local = arrays, arrays[rank]


class SimulatedBlocks(Blocks):
    """Implements ``Blocks`` in one process, for one worker; all workers share the memory."""

    def __init__(
        self,
        world: SimulatedWorld,
        homes: Sequence[int],
        data: list[np.ndarray],
        tags: np.ndarray,
        versions: list[int],
    ) -> None:
        self.homes, self.lengths = tuple(homes), tuple(block.size for block in data)
        self._world, self._data, self._tags, self._versions = world, data, tags, versions

    def acquire(self, index: int, prefetch: int | None = None, *, encoded: bool = False) -> Block:
        """Have a block as an array; nobody else runs until it is released."""
        if self._world.interleave_locks:
            self._world.give_way()
        return Block(index, self._data[index], self._tags[index], self._versions[index])

    def release(self, block: Block, *, updated: bool) -> None:
        """Count the update."""
        self._versions[block.index] += updated

    def peek_tags(self, index: int, out: np.ndarray) -> None:
        """Copy a block's tags."""
        out[:] = self._tags[index]

    def free(self) -> None:
        """Nothing to give back."""


@dataclass(frozen=True)
class SimulatedPending:
    """An operation that has begun.

    Attributes:
        finish: Wait for its end.
    """

    wait: Callable[[], None]


class SimulatedCommunicator:
    """Implements ``Communicator`` for one simulated worker.

    Args:
        world: Where it lives.
        rank: In the group.
        group: The workers it communicates with.
        statistics: What it counts into; a new one when not given.
    """

    def __init__(self, world: SimulatedWorld, rank: int, group: Group, statistics: Statistics | None = None) -> None:
        self.world, self.rank, self.size = world, rank, len(group.ranks)
        self.nodes = [world.nodes[member] for member in group.ranks]
        self.statistics = statistics or Statistics()
        self._group = group
        self._parts: list[SimulatedCommunicator] = []
        self._n_collectives = 0
        self._counted = 0, 0  # exchanges and bytes up to the last step

    def begin(self) -> None:
        """A run begins: all workers count their collectives from 0."""
        self._n_collectives = 0
        self._group.collectives.clear()
        self._group.made.clear()
        for part in self._parts:
            part.begin()

    def split(self, color: int) -> SimulatedCommunicator:
        """A communicator of those workers that give the same ``color``. Collective."""

        def make(colors: list[int]) -> dict[int, Group]:
            ranks = self._group.ranks
            return {
                color: Group(tuple(rank for rank, other in zip(ranks, colors, strict=True) if other == color))
                for color in set(colors)
            }

        group: Group = self._exchange(color, make)[color]
        part = SimulatedCommunicator(self.world, group.ranks.index(self._rank), group, self.statistics)
        self._parts.append(part)
        return part

    @property
    def dead(self) -> frozenset[int]:
        """Workers that have died. Local."""
        return of_part(self.world.dead, self._group.ranks)

    @property
    def _rank(self) -> int:
        """In the world."""
        return self._group.ranks[self.rank]

    def vector(self, n: int, dtype: Any) -> SimulatedVector:
        """A vector of zeros that peers can read. Collective."""
        arrays = self._exchange(None, lambda _: [np.zeros(n, dtype) for _ in range(self.size)])
        return SimulatedVector(arrays, self.rank)

    def numbers(self, n: int) -> SimulatedVector:
        """A few numbers that peers can read. Collective."""
        return self.vector(n, np.float64)

    def node_vector(self, n: int, dtype: Any) -> SimulatedVector:
        """A vector of zeros that peers can read; the workers of a node have one between them. Collective."""
        node_of = dict(zip(range(self.size), self.nodes, strict=True))
        arrays = self._exchange(None, lambda _: {node: np.zeros(n, dtype) for node in set(self.nodes)})
        return SimulatedVector([arrays[node_of[rank]] for rank in range(self.size)], self.rank)

    def publish(self, vector: Any) -> None:
        """Peers see a vector as it is. Local."""

    def read(self, vector: Any, peer: int, fn: Callable[[Any], object]) -> None:
        """Call ``fn`` with the peer's vector as it is now. Local; not counted as an exchange."""
        fn(vector.arrays[peer])

    def shared_vector(self, n: int, dtype: Any, rows: int = 1) -> SharedVector:
        """One vector for all workers, zeros, sharded over them; or several, changed together. Collective."""
        parts = shards(n, self.size, self.world.largest_shard)
        blocks = self._blocks([s.owner for s in parts], [rows * s.size for s in parts], dtype)
        return SharedVector(blocks, self.rank, self.size, self.statistics, rows)

    def mailboxes(self, n: int, dtype: Any, slots: int = 1) -> Mailboxes:
        """Vectors at every worker that others read or change under their locks. Collective."""
        homes = [rank for rank in range(self.size) for _ in range(slots)]
        return Mailboxes(self._blocks(homes, [n] * len(homes), dtype), self.rank, slots, self.statistics)

    def allreduce(self, vector: Any, *, mean: bool = False, part: slice | None = None) -> None:
        """Replace every worker's vector by the sum (or mean) of all; the same bits everywhere. Collective."""
        mine = vector.local if part is None else vector.local[part]
        n_bytes = mine.nbytes
        self.statistics.n_exchanges += 1
        self.statistics.bytes_sent += 2 * (self.size - 1) * n_bytes // self.size
        scale = mine.dtype.type(1.0 / self.size if mean else 1.0)

        def add(vectors: list[np.ndarray]) -> None:
            total = vectors[0]
            for other in vectors[1:]:
                total += other
            total *= scale
            for other in vectors[1:]:
                other[...] = total

        self._exchange(mine, add)

    def slice_of(self, n: int) -> slice:
        """This worker's part of a vector of ``n`` elements. Local."""
        neighbours = [rank for rank, node in enumerate(self.nodes) if node == self.nodes[self.rank]]
        return split(n, len(neighbours))[neighbours.index(self.rank)]

    def reduce_slices(self, vector: Any, fn: Callable[[slice, Sequence[Any]], object]) -> None:
        """Give each worker what adds up to the sum of all workers' vectors in its part. Collective."""
        self.statistics.n_exchanges += 1
        self.statistics.bytes_sent += 2 * (self.size - 1) * vector.local.nbytes // self.size
        total = self._exchange(vector.local, lambda vectors: sum(vectors[1:], vectors[0].copy()))
        mine = self.slice_of(vector.local.size)
        fn(mine, [total[mine].copy()])
        self.barrier()

    def start_allreduce(self, vector: Any, *, mean: bool = False) -> SimulatedPending:
        """Begin an all-reduce. Collective. It is made when all have come to its end, from the vectors left alone."""
        return SimulatedPending(lambda: self.allreduce(vector, mean=mean))

    def start(self, fn: Callable[[], object]) -> Started:
        """Do ``fn``; that it has been done is seen at the worker's next step. Local."""
        fn()
        return Started()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until something that others do makes ``condition()`` true. Local."""
        self.world.wait_until(self._rank, condition, self._group)

    def broadcast(self, array: Any, root: int = 0) -> None:
        """Copy the root's array to every worker's. Collective."""
        array[...] = self._exchange(array, lambda arrays: arrays[root].copy())

    def reduce(self, array: Any, root: int = 0) -> None:
        """Sum every worker's array into the root's. Collective."""
        total = self._exchange(array, lambda arrays: sum(arrays[1:], arrays[0].copy()))
        if self.rank == root:
            array[...] = total

    def gather(self, values: Sequence[float]) -> np.ndarray:
        """A few numbers of each worker, to all: (size, len(values)) float64. Collective."""
        gathered: np.ndarray = self._exchange(np.array(values, np.float64), np.stack)
        return gathered.copy()

    def barrier(self) -> None:
        """Wait for every worker. Collective."""
        self._exchange(None, lambda _: None)

    def end_step(self) -> None:
        """This worker has made a local step: its clock moves on, and others may go first. Local."""
        exchanges, sent = self.statistics.n_exchanges, self.statistics.bytes_sent
        self.world.schedule.step_made(self._rank, exchanges - self._counted[0], sent - self._counted[1])
        self._counted = exchanges, sent
        self.world.give_way()

    def free(self) -> None:
        """Nothing to give back."""

    def _exchange(self, value: Any, combine: Callable[[list[Any]], Any]) -> Any:
        self._n_collectives += 1
        return self.world.exchange(self._rank, self._group, self._n_collectives, value, combine)

    def _blocks(self, homes: list[int], lengths: list[int], dtype: Any) -> SimulatedBlocks:
        data, tags, versions = self._exchange(
            None,
            lambda _: ([np.zeros(n, dtype) for n in lengths], np.zeros((len(lengths), N_TAGS)), [0] * len(lengths)),
        )
        return SimulatedBlocks(self.world, homes, data, tags, versions)
