"""The one-sided operations that are measured side by side.

Three sets of them. The first two are calls of one rank, the origin, at the memory of the last rank, the target; every
transfer and every atomic operation is followed by the flush that makes it complete on both sides:

    Calls      no data, or 8 bytes: an MPI call that does nothing, flush, fetch_and_op, compare_and_swap, exclusive
               lock and unlock, and our own lock, taken and given back: on one node two compare-and-swaps of the CPU,
               between nodes two of MPI's
    Transfers  put, get and accumulate (sum of float32), and the same in the origin's own memory: a copy, a sum
    Exchanges  the elastic exchange with the center, which all ranks make at once: those of candidates.py, and the same
               in pieces

MPI_Win_allocate lets MPI choose the memory, on one node a segment that all ranks map; MPI_Win_create exposes memory
that the process has already, such as NumPy's. Of both there is a window here; only the target's part of it has bytes.

In pieces, as codes do it that hold no flat vector or that send it in small messages; each piece is locked, fetched,
changed, put back and unlocked, on windows of MPI_Win_allocate, which are the faster ones:

    chunks of 1,000  elements, all in one window (the unit of BlueFog's one-sided transfers)
    40 windows       one for each of 40 tensors of equal size, which take turns to live at each rank

All vectors hold zeros, so that no sum overflows however often it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from mpi4py import MPI

from benchmarks.micro.candidates import RATE, REFERENCES, Candidates
from mpitrain.collectives.rma.locks import LockTable
from mpitrain.collectives.rma.window import Window
from mpitrain.collectives.topology.partition import split, visiting_order
from mpitrain.collectives.world.world import World
from mpitrain.kernels import elastic_exchange, scaled_add

KINDS = ("Allocate", "Create")
ORIGIN = 0

CHUNK = 1000
TENSORS = 40
CHUNKS_NAME, TENSORS_NAME = f"chunks of {CHUNK:,}", f"{TENSORS} windows"

EXCHANGES = ("local pass", "exchange", *(f"Get/Put, {kind}" for kind in KINDS))
"""Those of the candidates that are measured here too."""


class Operations(Protocol):
    """A set of operations that are measured together.

    Attributes:
        operations: By name; called by the origin, or by all ranks at once.
        references: What an operation is compared with, another one of them.
    """

    operations: dict[str, Callable[[], object]]
    references: dict[str, str]

    def free(self) -> None:
        """Free the memory. Collective."""


class Windows:
    """MPI windows that are freed together. Collective to use.

    Args:
        world: The ranks.
    """

    def __init__(self, world: World) -> None:
        self._comm = world.comm
        self._open: list[MPI.Win] = []
        self._locked: list[MPI.Win] = []
        self._exposed: list[np.ndarray] = []

    def make(self, kind: str, n_bytes: int, *, locked: bool = False) -> MPI.Win:
        """Create a window of zeros.

        Args:
            kind: One of ``KINDS``.
            n_bytes: On this rank.
            locked: Whether every rank begins an epoch that lasts until the end, with shared locks of all.
        """
        if kind == "Allocate":
            window = MPI.Win.Allocate(n_bytes, 1, comm=self._comm)
            if n_bytes:
                memory: Any = window.tomemory()
                np.frombuffer(memory, np.uint8)[:] = 0
        else:
            self._exposed.append(np.full(n_bytes, 0, np.uint8))
            window = MPI.Win.Create(self._exposed[-1], 1, comm=self._comm)
        self._open.append(window)
        if locked:
            window.Lock_all()
            self._locked.append(window)
        return window

    def free(self) -> None:
        """Free the memory."""
        for window in self._locked:
            window.Unlock_all()
        for window in self._open:
            window.Free()
        self._exposed.clear()


class Calls:
    """Calls whose cost does not depend on the vector. Collective to create and to free; the operations are Local.

    Args:
        world: The ranks, two or more.
    """

    def __init__(self, world: World) -> None:
        self._windows = Windows(world)
        self._target = world.size - 1
        self._one, self._expected, self._found = (np.full(1, k, np.int64) for k in (1, 0, 0))
        self._locks = LockTable(world, [0] * self._target + [1])
        self.operations: dict[str, Callable[[], object]] = {"empty call": world.comm.Get_size}
        self.references = {"our lock": "compare_and_swap, Allocate"}
        n_bytes = 8 if world.rank == self._target else 0
        for kind in KINDS:
            self._add(kind, self._windows.make(kind, n_bytes, locked=True), self._windows.make(kind, n_bytes))
        self.operations["our lock"] = self._lock_as_we_do

    def _add(self, kind: str, window: MPI.Win, unlocked: MPI.Win) -> None:
        target = self._target

        def fetch_and_op() -> None:
            window.Fetch_and_op(self._one, self._found, target)
            window.Flush(target)

        def compare_and_swap() -> None:
            window.Compare_and_swap(self._one, self._expected, self._found, target)
            window.Flush(target)

        def lock_and_unlock() -> None:
            unlocked.Lock(target, MPI.LOCK_EXCLUSIVE)
            unlocked.Unlock(target)

        self.operations[f"flush, {kind}"] = lambda: window.Flush(target)
        self.operations[f"fetch_and_op, {kind}"] = fetch_and_op
        self.operations[f"compare_and_swap, {kind}"] = compare_and_swap
        self.operations[f"lock/unlock, {kind}"] = lock_and_unlock
        self.references[f"flush, {kind}"] = "empty call"
        self.references |= {f"{name}, {kind}": f"flush, {kind}" for name in ("fetch_and_op", "compare_and_swap")}
        self.references[f"lock/unlock, {kind}"] = "our lock"

    def _lock_as_we_do(self) -> None:
        version, _ = self._locks.acquire(self._target, 0)
        self._locks.release(self._target, 0, version, updated=True)

    def free(self) -> None:
        """Free the memory. Collective."""
        self.operations.clear()
        self._locks.free()
        self._windows.free()


class Transfers:
    """Transfers of a vector between origin and target. Collective to create and to free; the operations are Local.

    Args:
        world: The ranks, two or more.
        n: Elements, float32.

    Attributes:
        data: (n,) float32, the origin's: what is put, what is added, where what is fetched goes. 0 elements elsewhere.
    """

    def __init__(self, world: World, n: int) -> None:
        self._windows = Windows(world)
        self._target = world.size - 1
        n_here = n if world.rank == ORIGIN else 0
        self.data = np.full(n_here, 0, np.float32)  # full touches the pages
        self._own = Window(world, n_here, np.float32)  # in the same kind of memory as what MPI allocates
        own, data = self._own.local, self.data
        self.operations: dict[str, Callable[[], object]] = {
            "local copy": lambda: np.copyto(own, data),
            "local sum": lambda: scaled_add(own, data, 1.0),
        }
        self.references: dict[str, str] = {}
        for kind in KINDS:
            n_bytes = 4 * n if world.rank == self._target else 0
            self._add(kind, self._windows.make(kind, n_bytes, locked=True))

    def _add(self, kind: str, window: MPI.Win) -> None:
        data, target = self.data, self._target

        def put() -> None:
            window.Put(data, target)
            window.Flush(target)

        def get() -> None:
            window.Get(data, target)
            window.Flush(target)

        def accumulate() -> None:
            window.Accumulate(data, target, op=MPI.SUM)
            window.Flush(target)

        self.operations |= {f"put, {kind}": put, f"get, {kind}": get, f"accumulate, {kind}": accumulate}
        self.references |= {f"{name}, {kind}": "local copy" for name in ("put", "get")}
        self.references[f"accumulate, {kind}"] = "local sum"

    def free(self) -> None:
        """Free the memory. Collective."""
        self.operations.clear()
        self._windows.free()
        self._own.free()


@dataclass(frozen=True)
class Piece:
    """The part of a vector that is exchanged under one lock.

    Attributes:
        part: Where it lies in the vector.
        home: The rank in whose memory it is.
        window: In which window.
        at: Its first element there.
    """

    part: slice
    home: int
    window: int = 0
    at: int = 0

    @property
    def size(self) -> int:
        """The number of elements."""
        return self.part.stop - self.part.start


def chunks(n: int, n_ranks: int, length: int = CHUNK) -> list[Piece]:
    """Split a vector of ``n`` elements into chunks in one window; the last chunk of each rank's share is shorter."""
    return [
        Piece(slice(start, min(start + length, share.stop)), home, at=start - share.start)
        for home, share in enumerate(split(n, n_ranks))
        for start in range(share.start, share.stop, length)
    ]


def tensors(n: int, n_ranks: int, most: int = TENSORS) -> list[Piece]:
    """Split a vector of ``n`` elements into at most ``most`` tensors, each with a window of its own at one rank."""
    parts = [part for part in split(n, most) if part.start < part.stop]
    return [Piece(part, k % n_ranks, window=k) for k, part in enumerate(parts)]


class InPieces:
    """The elastic exchange, one piece at a time. Collective to create and to free.

    Args:
        world: The ranks.
        x: (n,) float32, this rank's vector.
        pieces: Of the vector.
    """

    def __init__(self, world: World, x: np.ndarray, pieces: Sequence[Piece]) -> None:
        self._windows = Windows(world)
        n_here = [0] * (1 + max(piece.window for piece in pieces))
        for piece in pieces:
            n_here[piece.window] += piece.size * (piece.home == world.rank)
        windows = [self._windows.make("Allocate", 4 * n) for n in n_here]
        staged = np.full(max(piece.size for piece in pieces), 0, np.float32)
        self._steps = [
            (windows[piece.window], piece.home, 4 * piece.at, x[piece.part], staged[: piece.size])
            for piece in (pieces[k] for k in visiting_order(len(pieces), world.rank, world.size))
        ]

    def exchange(self) -> None:
        """Exchange the whole vector. Local."""
        for window, home, at, x, c in self._steps:
            window.Lock(home, MPI.LOCK_EXCLUSIVE)
            window.Get(c, home, at)
            window.Flush(home)
            elastic_exchange(x, c, RATE, RATE)
            window.Put(c, home, at)
            window.Unlock(home)

    def free(self) -> None:
        """Free the memory. Collective."""
        self._steps.clear()
        self._windows.free()


class Exchanges:
    """The elastic exchange with a center. Collective to create and to free; all ranks call the operations at once.

    Args:
        world: The ranks.
        n: Elements, float32.
        in_pieces: Whether the exchanges in pieces are among them.
    """

    def __init__(self, world: World, n: int, *, in_pieces: bool) -> None:
        self._candidates = Candidates(world, n, with_gloo=False)
        self._made: list[Any] = [self._candidates]
        self.operations = {name: self._candidates.operations[name] for name in EXCHANGES}
        self.references = {name: REFERENCES[name] for name in EXCHANGES if name in REFERENCES}
        if in_pieces:
            x = Window(world, n, np.float32)
            self._made.append(x)
            for name, pieces in ((CHUNKS_NAME, chunks(n, world.size)), (TENSORS_NAME, tensors(n, world.size))):
                emulation = InPieces(world, x.local, pieces)
                self._made.append(emulation)
                self.operations[name] = emulation.exchange
                self.references[name] = "exchange"

    def free(self) -> None:
        """Free the memory. Collective."""
        self.operations.clear()
        for made in reversed(self._made):
            made.free()
