"""One of the two ranks in which MPI's operations are tried (``probe.runner`` starts them and reads its files).

    mpirun -n 2 python -m mpitrain.collectives.probe.child FOLDER MEMORY OPERATION [OPERATION ...]

An operation is tried at 8 bytes and at 16 MiB where it has a size. The first time it moves a pattern, which is compared
byte for byte where it arrives, the bytes around it included; then it is timed. Each rank appends what it finds to
``FOLDER/rank-R.jsonl``, one line an operation, before any rank begins the next one: whoever dies leaves what was found
so far, and what comes next in the order is what killed it. An exception ends the pair too, because nobody knows in
which state MPI is afterwards.

This is the only place where MPI accumulates into device memory.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from mpitrain.kernels import gpu

SMALL_BYTES = 8
LARGE_BYTES = 16 << 20
REPEATS = {SMALL_BYTES: 100, LARGE_BYTES: 5}
INCREMENTS = 20
"""Of a counter, by each rank, to see that none is lost."""

GUARD_BYTES = 64
GUARD = 0x5A
"""What stands on both sides of what an operation may write, and where nothing has arrived yet."""

SEGMENTS = ("dev/shm/mpich_shm_", "dev/shm/sm_segment.")
"""MPICH's and Open MPI's; each world has its own."""

ABANDONED_SECONDS = 120.0
"""A rank that has made no progress for so long ends itself: who started it may have been killed."""


@dataclass(frozen=True)
class Pair:
    """This rank, its peer, and the memory that is tried."""

    comm: Any
    memory: str

    @property
    def rank(self) -> int:
        """0 acts, 1 is acted upon."""
        rank: int = self.comm.Get_rank()
        return rank

    def buffer(self, n_bytes: int) -> Any:
        """Memory of the kind, uint8, of ``n_bytes`` between guards, all of it ``GUARD``."""
        n = n_bytes + 2 * GUARD_BYTES
        if self.memory == "host":
            array: Any = np.empty(n, np.uint8)
        else:
            device = gpu.current()
            array = device.zeros(n, np.uint8) if self.memory == "device" else device.page_locked(n, np.uint8)
        self.fill(array, np.full(n, GUARD, np.uint8))
        return array

    def fill(self, array: Any, values: np.ndarray) -> None:
        """Write into memory of the kind; MPI may read it at once."""
        gpu.assign(array, values)
        gpu.synchronize(array)


@dataclass(frozen=True)
class Trial:
    """An operation that is ready to be made: Collective over the pair.

    Attributes:
        turn: Makes it.
        is_right: Whether the bytes on this rank are right after the first turn.
        n_transfers: In a turn.
    """

    turn: Callable[[], None]
    is_right: Callable[[], bool]
    n_transfers: int = 1


Operation = Callable[[Pair, int], Any]
"""A context of a ``Trial``, of a pair and a number of bytes."""


def inner(memory: Any) -> Any:
    """What lies between the guards."""
    return memory[GUARD_BYTES:-GUARD_BYTES]


def pattern(n_bytes: int, dtype: Any = np.uint8) -> np.ndarray:
    """Values with a prime period, so that nothing that is misplaced fits; exact in float32."""
    return np.resize(np.arange(1, 252).astype(dtype), n_bytes // np.dtype(dtype).itemsize)


def holds(memory: Any, expected: np.ndarray) -> bool:
    """Whether the bytes between the guards are these, and the guards untouched."""
    bytes_here = gpu.to_host(memory)
    outside = np.concatenate([bytes_here[:GUARD_BYTES], bytes_here[-GUARD_BYTES:]])
    return bool((outside == GUARD).all()) and np.array_equal(inner(bytes_here), expected.view(np.uint8))


@contextmanager
def send(pair: Pair, n_bytes: int) -> Iterator[Trial]:
    """To the peer, and from there back into other memory."""
    from mpi4py import MPI

    here, echo = pair.buffer(n_bytes), pair.buffer(n_bytes)
    if pair.rank == 0:
        pair.fill(inner(here), pattern(n_bytes))

    def turn() -> None:
        if pair.rank == 0:
            pair.comm.Send([inner(here), n_bytes, MPI.BYTE], 1)
            pair.comm.Recv([inner(echo), n_bytes, MPI.BYTE], 1)
        else:
            pair.comm.Recv([inner(here), n_bytes, MPI.BYTE], 0)
            pair.comm.Send([inner(here), n_bytes, MPI.BYTE], 0)

    yield Trial(turn, lambda: holds(here if pair.rank else echo, pattern(n_bytes)), n_transfers=2)


@contextmanager
def all_reduce(pair: Pair, n_bytes: int) -> Iterator[Trial]:
    """Sum of float32, in place."""
    from mpi4py import MPI

    buffer, addend = pair.buffer(n_bytes), pattern(n_bytes, np.float32)
    vector = inner(buffer).view(np.float32)
    pair.fill(vector, addend * (pair.rank + 1))

    def is_right() -> bool:
        right = holds(buffer, addend * 3)
        pair.fill(vector, np.zeros_like(addend))  # what is added up again and again does not overflow
        return right

    yield Trial(lambda: pair.comm.Allreduce(MPI.IN_PLACE, [vector, MPI.FLOAT]), is_right)


@contextmanager
def create(pair: Pair, n_bytes: int) -> Iterator[Trial]:
    """A window on memory that exists, and its end."""
    from mpi4py import MPI

    buffer, bases = pair.buffer(n_bytes), []

    def turn() -> None:
        window = MPI.Win.Create(buffer, 1, comm=pair.comm)
        bases.append(window.Get_attr(MPI.WIN_BASE))
        window.Free()

    yield Trial(turn, lambda: bases == [gpu.address_of(buffer)])


@contextmanager
def window(pair: Pair, buffer: Any) -> Iterator[Any]:
    """A window on memory of both ranks, with an epoch that spans its life, as this package has them."""
    from mpi4py import MPI

    made = MPI.Win.Create(buffer, 1, comm=pair.comm)
    made.Lock_all(MPI.MODE_NOCHECK)
    pair.comm.Barrier()
    yield made
    pair.comm.Barrier()
    made.Unlock_all()
    made.Free()


def visit(
    begin: Callable[[Any, list[Any], list[Any]], Any], *, fetches: bool, adds: bool = False
) -> Callable[[Pair, int], Any]:
    """An operation of rank 0 on the window of rank 1.

    Args:
        begin: Begins it: (window, origin, target); what it returns is waited for.
        fetches: The bytes come to rank 0; else they go to rank 1.
        adds: It adds to float32 numbers.
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

            def turn() -> None:
                if pair.rank == 0:
                    request = begin(win, [inner(origin).view(dtype), n, datatype], [GUARD_BYTES, n, datatype])
                    if request is not None:
                        request.Wait()
                    win.Flush(1)

            def is_right() -> bool:
                win.Sync()
                destination = 0 if fetches else 1
                arrived = origin if fetches else buffer
                return pair.rank != destination or holds(arrived, 3 * moved if adds else moved)

            yield Trial(turn, is_right)

    return operation


@contextmanager
def fetch_and_op(pair: Pair, n_bytes: int) -> Iterator[Trial]:
    """Adds 1 to a counter of rank 1 (int64) and tells what it was; both ranks do it at once: none is lost."""
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
            n = 2 * INCREMENTS + 1  # and the first turn
            right = pair.rank == 0 or holds(counter, np.array([n], np.int64))
            return right and tickets_of_both == list(range(1, n))

        yield Trial(lambda: add() if pair.rank == 0 else None, is_right)


@contextmanager
def lock(pair: Pair, n_bytes: int) -> Iterator[Trial]:
    """Exclusive, of rank 1's window; under it both ranks get a counter, add 1 and put it back."""
    from mpi4py import MPI

    counter, scratch = pair.buffer(n_bytes), pair.buffer(n_bytes)
    pair.fill(inner(counter), np.zeros(n_bytes, np.uint8))
    number = inner(scratch).view(np.int64)
    win = MPI.Win.Create(counter, 1, comm=pair.comm)

    def turn() -> None:
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

    yield Trial(turn, is_right)
    pair.comm.Barrier()
    win.Free()


def _accumulate(win: Any, origin: list[Any], target: list[Any]) -> None:
    from mpi4py import MPI

    win.Accumulate(origin, 1, target, MPI.SUM)


BOTH = (SMALL_BYTES, LARGE_BYTES)
OPERATIONS: dict[str, tuple[Operation, tuple[int, ...]]] = {
    "send": (send, BOTH),
    "all-reduce": (all_reduce, BOTH),
    "window creation": (create, (LARGE_BYTES,)),
    "put": (visit(lambda win, origin, target: win.Put(origin, 1, target), fetches=False), BOTH),
    "get": (visit(lambda win, origin, target: win.Get(origin, 1, target), fetches=True), BOTH),
    "accumulate": (visit(_accumulate, fetches=False, adds=True), BOTH),
    "fetch_and_op": (fetch_and_op, (SMALL_BYTES,)),
    "rput": (visit(lambda win, origin, target: win.Rput(origin, 1, target), fetches=False), BOTH),
    "rget": (visit(lambda win, origin, target: win.Rget(origin, 1, target), fetches=True), BOTH),
    "lock": (lock, (SMALL_BYTES,)),
}
"""How each is tried, and at which sizes."""


def tried(pair: Pair, operation: Operation, sizes: Sequence[int]) -> dict[str, Any]:
    """What an operation does and costs. Collective.

    Returns:
        ``verdict``, and by rank 0 ``latency_us`` (of the smallest size) and ``gb_per_s`` where there are two sizes;
        medians.
    """
    right, seconds = True, {}
    for n_bytes in sizes:
        with operation(pair, n_bytes) as trial:
            trial.turn()
            pair.comm.Barrier()
            right = trial.is_right() and right
            pair.comm.Barrier()
            times = []
            for _ in range(REPEATS[n_bytes]):
                start = time.perf_counter()
                trial.turn()
                times.append((time.perf_counter() - start) / trial.n_transfers)
            pair.comm.Barrier()
        seconds[n_bytes] = float(np.median(times))
    found: dict[str, Any] = {"verdict": "ok" if right else "wrong"}
    if pair.rank == 0:
        found["latency_us"] = seconds[sizes[0]] * 1e6
        if len(sizes) > 1:
            found["gb_per_s"] = sizes[-1] / seconds[sizes[-1]] / 1e9
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Tries the operations named by the command line, and ends at the first exception."""
    folder, memory, *names = sys.argv[1:] if arguments is None else arguments
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))  # a crash leaves nothing
    (Path(folder) / f"{os.getpid()}.pid").touch()
    faulthandler.dump_traceback_later(ABANDONED_SECONDS, exit=True)
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    with (Path(folder) / f"rank-{comm.Get_rank()}.jsonl").open("a", buffering=1) as file:

        def say(**record: Any) -> None:
            file.write(json.dumps(record) + "\n")
            faulthandler.dump_traceback_later(ABANDONED_SECONDS, exit=True)

        if comm.Get_size() != 2:
            say(problem=f"mpirun started 2 ranks, but MPI sees a world of {comm.Get_size()}: they do not match")
            return 1
        try:
            if memory != "host":
                _take_gpu(comm.Get_rank())
        except Exception as error:
            say(problem=_first_line(error))
            os._exit(1)  # the other rank may wait for this one: the launcher ends it
        comm.Barrier()
        say(ready=True, segments=_segments())
        pair = Pair(comm, memory)
        for name in names:
            try:
                comm.Barrier()  # both have written what came before
                say(operation=name, **tried(pair, *OPERATIONS[name]))
            except Exception as error:
                say(operation=name, verdict="error", detail=_first_line(error))
                os._exit(1)
    return 0


def _take_gpu(rank: int) -> None:
    """The GPU of this rank: one for each where there are several. MPI has started before, as it does in a run."""
    import cupy

    index = rank % cupy.cuda.runtime.getDeviceCount()
    cupy.cuda.Device(index).use()
    gpu.use(index)


def _segments() -> list[str]:
    """Files of shared memory by which MPI connects the two ranks. Who is killed leaves them behind."""
    mapped = {line.partition("/")[2] for line in Path("/proc/self/maps").read_text().splitlines()}
    return sorted(f"/{path}" for path in mapped if path.startswith(SEGMENTS) and not path.endswith(" (deleted)"))


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
