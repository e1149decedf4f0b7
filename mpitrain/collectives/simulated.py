"""Many workers in one process, in an order that the test (or the study) decides.

Each worker is a greenlet that runs ordinary blocking code: it gives way at the end of a step, when it waits for the
others in a collective, and, when asked for, before it takes a lock. Who goes on is the schedule's decision, so that an
asynchronous run is as reproducible as a synchronous one, and a worker that is k times slower is a number.

Only one worker runs at a time, so a lock is never held across a switch: what is atomic between ranks is atomic here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from greenlet import getcurrent, greenlet

from mpitrain.collectives.blocks import N_TAGS, Block
from mpitrain.collectives.mailboxes import Mailboxes
from mpitrain.collectives.partition import shards
from mpitrain.collectives.schedules import RoundRobin, Schedule
from mpitrain.collectives.shared import LARGEST_SHARD, SharedVector
from mpitrain.collectives.statistics import Statistics

T = TypeVar("T")


class SimulatedWorld:
    """Workers in one process.

    Args:
        size: How many.
        schedule: Who goes on, whenever a worker gives way.
        interleave_locks: Give way before every lock too, so that the visits of two workers to the shards of a vector
            mix as they do between ranks.
        largest_shard: Elements; small ones let a small vector have many shards.
    """

    def __init__(
        self,
        size: int,
        schedule: Schedule | None = None,
        *,
        interleave_locks: bool = False,
        largest_shard: int = LARGEST_SHARD,
    ) -> None:
        if size < 1:
            raise ValueError(f"a world has at least 1 worker, not {size}")
        self.size = size
        self.schedule = schedule or RoundRobin()
        self.interleave_locks = interleave_locks
        self.largest_shard = largest_shard
        self.communicators = [SimulatedCommunicator(self, rank) for rank in range(size)]
        self._hub: greenlet | None = None
        self._waiting: set[int] = set()  # workers inside a collective that others have not reached
        self._collectives: dict[int, list[Any]] = {}
        self._made: dict[int, Any] = {}

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
        self._collectives.clear()
        self._made.clear()
        for communicator in self.communicators:
            communicator.begin()
        results: list[Any] = [None] * self.size
        unfinished = set(range(self.size))

        def body(rank: int) -> Callable[[], None]:
            def run_program() -> None:
                results[rank] = program(self.communicators[rank])
                unfinished.discard(rank)

            return run_program

        workers = [greenlet(body(rank)) for rank in range(self.size)]
        while unfinished:
            ready = sorted(unfinished - self._waiting)
            if not ready:
                raise RuntimeError(
                    f"workers {sorted(self._waiting)} wait in a collective that the others have left or never reach"
                )
            chosen = self.schedule.choose(ready)
            if chosen is None:
                break
            workers[chosen].switch()
        return results

    def give_way(self) -> None:
        """Let the schedule decide who goes on. Called by a worker."""
        if self._hub is not None and getcurrent() is not self._hub:
            self._hub.switch()

    def meet(self, rank: int, number: int, value: T, combine: Callable[[list[T]], Any]) -> Any:
        """A collective: wait until all workers have brought a value, and have what ``combine`` makes of all of them.

        Args:
            rank: The worker that calls.
            number: Its how-manieth collective this is.
            value: What it brings.
            combine: Called once, by whoever comes last, with the values by rank.
        """
        values = self._collectives.setdefault(number, [_ABSENT] * self.size)
        values[rank] = value
        if any(v is _ABSENT for v in values):
            if getcurrent() is self._hub or self._hub is None:
                raise RuntimeError("a collective needs all workers: call it in a program given to SimulatedWorld.run")
            self._waiting.add(rank)
            while number not in self._made:
                self.give_way()
        else:
            self._made[number] = combine(values)
            self._waiting.clear()
            self.schedule.all_met()
        result = self._made[number]
        values[rank] = _GONE
        if all(v is _GONE for v in values):
            del self._made[number], self._collectives[number]
        return result


_ABSENT, _GONE = object(), object()


class SimulatedVector:
    """One array a worker; ``local`` is that of the worker which made it."""

    def __init__(self, arrays: list[np.ndarray], rank: int) -> None:
        self.arrays, self.local = arrays, arrays[rank]


class SimulatedBlocks:
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

    def acquire(self, index: int) -> Block:
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


class SimulatedCommunicator:
    """Implements ``Communicator`` for one simulated worker."""

    def __init__(self, world: SimulatedWorld, rank: int) -> None:
        self.world, self.rank, self.size = world, rank, world.size
        self.statistics = Statistics()
        self.begin()

    def begin(self) -> None:
        """A run begins: all workers count their collectives from 0."""
        self._n_collectives = 0

    def vector(self, n: int, dtype: Any) -> SimulatedVector:
        """A vector of zeros that peers can read. Collective."""
        arrays = self._meet(None, lambda _: [np.zeros(n, dtype) for _ in range(self.size)])
        return SimulatedVector(arrays, self.rank)

    def read(self, vector: Any, peer: int, fn: Callable[[Any], object]) -> None:
        """Call ``fn`` with the peer's vector as it is now. Local; not counted as an exchange."""
        fn(vector.arrays[peer])

    def shared_vector(self, n: int, dtype: Any) -> SharedVector:
        """One vector for all workers, zeros, sharded over them. Collective."""
        parts = shards(n, self.size, self.world.largest_shard)
        blocks = self._blocks([s.owner for s in parts], [s.stop - s.start for s in parts], dtype)
        return SharedVector(blocks, self.rank, self.size, self.statistics)

    def mailboxes(self, n: int, dtype: Any, slots: int = 1) -> Mailboxes:
        """Vectors at every worker that others read or change under their locks. Collective."""
        homes = [rank for rank in range(self.size) for _ in range(slots)]
        return Mailboxes(self._blocks(homes, [n] * len(homes), dtype), self.rank, slots, self.statistics)

    def allreduce(self, vector: Any, *, mean: bool = False) -> None:
        """Replace every worker's vector by the sum (or mean) of all; the same bits everywhere. Collective."""
        n_bytes = vector.local.nbytes
        self.statistics.n_exchanges += 1
        self.statistics.bytes_sent += 2 * (self.size - 1) * n_bytes // self.size
        scale = vector.local.dtype.type(1.0 / self.size if mean else 1.0)

        def add(vectors: list[np.ndarray]) -> None:
            total = vectors[0]
            for other in vectors[1:]:
                total += other
            total *= scale
            for other in vectors[1:]:
                other[...] = total

        self._meet(vector.local, add)

    def broadcast(self, array: Any, root: int = 0) -> None:
        """Copy the root's array to every worker's. Collective."""
        array[...] = self._meet(array, lambda arrays: arrays[root].copy())

    def reduce(self, array: Any, root: int = 0) -> None:
        """Sum every worker's array into the root's. Collective."""
        total = self._meet(array, lambda arrays: sum(arrays[1:], arrays[0].copy()))
        if self.rank == root:
            array[...] = total

    def gather(self, values: Sequence[float]) -> np.ndarray:
        """A few numbers of each worker, to all: (size, len(values)) float64. Collective."""
        gathered: np.ndarray = self._meet(np.array(values, np.float64), np.stack)
        return gathered.copy()

    def barrier(self) -> None:
        """Wait for every worker. Collective."""
        self._meet(None, lambda _: None)

    def end_step(self) -> None:
        """This worker has made a local step: its clock moves on, and others may go first. Local."""
        self.world.schedule.step_made(self.rank)
        self.world.give_way()

    def free(self) -> None:
        """Nothing to give back."""

    def _meet(self, value: Any, combine: Callable[[list[Any]], Any]) -> Any:
        self._n_collectives += 1
        return self.world.meet(self.rank, self._n_collectives, value, combine)

    def _blocks(self, homes: list[int], lengths: list[int], dtype: Any) -> SimulatedBlocks:
        data, tags, versions = self._meet(
            None,
            lambda _: ([np.zeros(n, dtype) for n in lengths], np.zeros((len(lengths), N_TAGS)), [0] * len(lengths)),
        )
        return SimulatedBlocks(self.world, homes, data, tags, versions)
