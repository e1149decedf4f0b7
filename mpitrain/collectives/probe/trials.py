"""The ten operations that a pair of ranks tries, each with its check of the bytes that arrive.

An operation moves a pattern, which is compared byte for byte where it arrives, together with the guard bytes around it.

This is the only place where MPI accumulates into device memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from mpitrain.kernels import gpu

SMALL_BYTES = 8
LARGE_BYTES = 16 << 20
INCREMENTS = 20
"""Of a counter, by each rank, to see that none is lost."""

GUARD_BYTES = 64
GUARD = 0x5A
"""The value of bytes that no operation may write, and of those that it has not written yet."""


@dataclass(frozen=True)
class Pair:
    """The communicator of this rank and its peer, and the kind of memory to try."""

    comm: Any
    memory: str

    @property
    def rank(self) -> int:
        """This rank: 0 for the origin, 1 for the target."""
        rank: int = self.comm.Get_rank()
        return rank

    def buffer(self, n_bytes: int) -> Any:
        """Return ``n_bytes`` uint8 of this kind of memory with a guard on each side, all filled with ``GUARD``."""
        n = n_bytes + 2 * GUARD_BYTES
        if self.memory == "host":
            array: Any = np.empty(n, np.uint8)
        else:
            device = gpu.current()
            array = device.zeros(n, np.uint8) if self.memory == "device" else device.page_locked(n, np.uint8)
        self.fill(array, np.full(n, GUARD, np.uint8))
        return array

    def fill(self, array: Any, values: np.ndarray) -> None:
        """Write to this kind of memory, and synchronize so that MPI may read it."""
        gpu.assign(array, values)
        gpu.synchronize(array)


@dataclass(frozen=True)
class Trial:
    """A prepared operation. Collective over the pair.

    Attributes:
        run: A function that performs the operation once.
        is_right: A function that returns whether the bytes on this rank are right after the first run.
        n_transfers: The number of transfers in a run.
    """

    run: Callable[[], None]
    is_right: Callable[[], bool]
    n_transfers: int = 1


Operation = Callable[[Pair, int], Any]
"""A context manager that yields a ``Trial``, for a pair and a number of bytes."""


def inner(memory: Any) -> Any:
    """Return the memory between the guards."""
    return memory[GUARD_BYTES:-GUARD_BYTES]


def pattern(n_bytes: int, dtype: Any = np.uint8) -> np.ndarray:
    """Return values with a prime period, so that displaced bytes are noticed. They are exact in float32."""
    return np.resize(np.arange(1, 252).astype(dtype), n_bytes // np.dtype(dtype).itemsize)


def holds(memory: Any, expected: np.ndarray) -> bool:
    """Return whether the bytes between the guards are as expected, and the guards are unchanged."""
    bytes_here = gpu.to_host(memory)
    outside = np.concatenate([bytes_here[:GUARD_BYTES], bytes_here[-GUARD_BYTES:]])
    return bool((outside == GUARD).all()) and np.array_equal(inner(bytes_here), expected.view(np.uint8))


@contextmanager
def send(pair: Pair, n_bytes: int) -> Iterator[Trial]:
    """Send to the peer, which sends the data back. They arrive in other memory of this rank."""
    from mpi4py import MPI

    here, echo = pair.buffer(n_bytes), pair.buffer(n_bytes)
    if pair.rank == 0:
        pair.fill(inner(here), pattern(n_bytes))

    def run() -> None:
        if pair.rank == 0:
            pair.comm.Send([inner(here), n_bytes, MPI.BYTE], 1)
            pair.comm.Recv([inner(echo), n_bytes, MPI.BYTE], 1)
        else:
            pair.comm.Recv([inner(here), n_bytes, MPI.BYTE], 0)
            pair.comm.Send([inner(here), n_bytes, MPI.BYTE], 0)

    yield Trial(run, lambda: holds(here if pair.rank else echo, pattern(n_bytes)), n_transfers=2)


@contextmanager
def all_reduce(pair: Pair, n_bytes: int) -> Iterator[Trial]:
    """Sum float32 numbers in place."""
    from mpi4py import MPI

    buffer, addend = pair.buffer(n_bytes), pattern(n_bytes, np.float32)
    vector = inner(buffer).view(np.float32)
    pair.fill(vector, addend * (pair.rank + 1))

    def is_right() -> bool:
        right = holds(buffer, addend * 3)
        pair.fill(vector, np.zeros_like(addend))  # repeated sums must not overflow
        return right

    yield Trial(lambda: pair.comm.Allreduce(MPI.IN_PLACE, [vector, MPI.FLOAT]), is_right)


@contextmanager
def create(pair: Pair, n_bytes: int) -> Iterator[Trial]:
    """Create and free a window on existing memory."""
    from mpi4py import MPI

    buffer, bases = pair.buffer(n_bytes), []

    def run() -> None:
        window = MPI.Win.Create(buffer, 1, comm=pair.comm)
        bases.append(window.Get_attr(MPI.WIN_BASE))
        window.Free()

    yield Trial(run, lambda: bases == [gpu.address_of(buffer)])


@contextmanager
def window(pair: Pair, buffer: Any) -> Iterator[Any]:
    """Open a window on memory of both ranks, with one access epoch for its whole life."""
    from mpi4py import MPI

    made = MPI.Win.Create(buffer, 1, comm=pair.comm)
    made.Lock_all(MPI.MODE_NOCHECK)
    pair.comm.Barrier()
    yield made
    pair.comm.Barrier()
    made.Unlock_all()
    made.Free()


def one_sided(
    start: Callable[[Any, list[Any], list[Any]], Any], *, fetches: bool, adds: bool = False
) -> Callable[[Pair, int], Any]:
    """Return the trial of a one-sided operation of rank 0 on the window of rank 1.

    Args:
        start: Called with (window, origin, target). If it returns a request, the request is completed.
        fetches: Whether the bytes move from rank 1 to rank 0, instead of from rank 0 to rank 1.
        adds: Whether the operation adds to float32 numbers.
    """

    @contextmanager
    def operation(pair: Pair, n_bytes: int) -> Iterator[Trial]:
        from mpi4py import MPI

        dtype, datatype = (np.float32, MPI.FLOAT) if adds else (np.uint8, MPI.BYTE)
        moved = pattern(n_bytes, dtype)
        buffer, origin = pair.buffer(n_bytes), pair.buffer(n_bytes)
        if adds:
            pair.fill(inner(buffer).view(dtype), 2 * moved)
        if fetches == bool(pair.rank):
            pair.fill(inner(buffer if fetches else origin).view(dtype), moved)
        n = moved.size
        with window(pair, buffer) as win:

            def run() -> None:
                if pair.rank == 0:
                    request = start(win, [inner(origin).view(dtype), n, datatype], [GUARD_BYTES, n, datatype])
                    if request is not None:
                        request.Wait()
                    win.Flush(1)

            def is_right() -> bool:
                win.Sync()
                destination = 0 if fetches else 1
                arrived = origin if fetches else buffer
                return pair.rank != destination or holds(arrived, 3 * moved if adds else moved)

            yield Trial(run, is_right)

    return operation


@contextmanager
def fetch_and_op(pair: Pair, n_bytes: int) -> Iterator[Trial]:
    """Let both ranks, at once, add 1 to an int64 counter of rank 1 and fetch its value. No increment may be lost."""
    from mpi4py import MPI

    counter, scratch = pair.buffer(n_bytes), pair.buffer(2 * n_bytes)
    pair.fill(inner(counter), np.zeros(n_bytes, np.uint8))
    one, result = inner(scratch)[:n_bytes].view(np.int64), inner(scratch)[n_bytes:].view(np.int64)
    pair.fill(one, np.ones(1, np.int64))
    with window(pair, counter) as win:

        def add() -> None:
            win.Fetch_and_op([one, MPI.INT64_T], [result, MPI.INT64_T], 1, GUARD_BYTES, MPI.SUM)
            win.Flush(1)

        def is_right() -> bool:
            tickets = []
            for _ in range(INCREMENTS):
                add()
                tickets.append(int(gpu.to_host(result)[0]))
            tickets_of_both = sorted(chain.from_iterable(pair.comm.allgather(tickets)))
            win.Sync()
            n = 2 * INCREMENTS + 1  # and the first run
            right = pair.rank == 0 or holds(counter, np.array([n], np.int64))
            return right and tickets_of_both == list(range(1, n))

        yield Trial(lambda: add() if pair.rank == 0 else None, is_right)


@contextmanager
def lock(pair: Pair, n_bytes: int) -> Iterator[Trial]:
    """Lock rank 1's window exclusively. Under the lock, each rank gets a counter, adds 1 and puts it back."""
    from mpi4py import MPI

    counter, scratch = pair.buffer(n_bytes), pair.buffer(n_bytes)
    pair.fill(inner(counter), np.zeros(n_bytes, np.uint8))
    number = inner(scratch).view(np.int64)
    win = MPI.Win.Create(counter, 1, comm=pair.comm)

    def run() -> None:
        if pair.rank == 0:
            win.Lock(1, MPI.LOCK_EXCLUSIVE)
            win.Unlock(1)

    def is_right() -> bool:
        there = [GUARD_BYTES, 1, MPI.INT64_T]
        for _ in range(INCREMENTS):
            win.Lock(1, MPI.LOCK_EXCLUSIVE)
            win.Get([number, 1, MPI.INT64_T], 1, there)
            win.Flush(1)
            pair.fill(number, gpu.to_host(number) + 1)
            win.Put([number, 1, MPI.INT64_T], 1, there)
            win.Unlock(1)
        pair.comm.Barrier()
        if pair.rank == 0:
            return True
        win.Lock(1, MPI.LOCK_SHARED)
        right = holds(counter, np.array([2 * INCREMENTS], np.int64))
        win.Unlock(1)
        return right

    yield Trial(run, is_right)
    pair.comm.Barrier()
    win.Free()


def _accumulate(win: Any, origin: list[Any], target: list[Any]) -> None:
    from mpi4py import MPI

    win.Accumulate(origin, 1, target, MPI.SUM)


BOTH = (SMALL_BYTES, LARGE_BYTES)
TRIALS: dict[str, tuple[Operation, tuple[int, ...]]] = {
    "send": (send, BOTH),
    "all-reduce": (all_reduce, BOTH),
    "window creation": (create, (LARGE_BYTES,)),
    "put": (one_sided(lambda win, origin, target: win.Put(origin, 1, target), fetches=False), BOTH),
    "get": (one_sided(lambda win, origin, target: win.Get(origin, 1, target), fetches=True), BOTH),
    "accumulate": (one_sided(_accumulate, fetches=False, adds=True), BOTH),
    "fetch_and_op": (fetch_and_op, (SMALL_BYTES,)),
    "rput": (one_sided(lambda win, origin, target: win.Rput(origin, 1, target), fetches=False), BOTH),
    "rget": (one_sided(lambda win, origin, target: win.Rget(origin, 1, target), fetches=True), BOTH),
    "lock": (lock, (SMALL_BYTES,)),
}
"""The context manager of each operation, and the sizes at which it is tried."""
