"""What a method sees of the other workers, whether they are MPI ranks or simulated in one process.

A method is written against this and nothing else: vectors (anything with NumPy's slicing) and the calls below.
``MPICommunicator`` (``collectives.mpi``) and ``SimulatedCommunicator`` (``simulation.communicator``) implement it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from mpitrain.collectives.rma.mailboxes import Mailboxes
from mpitrain.collectives.rma.shared_vector import SharedVector
from mpitrain.collectives.world.statistics import Statistics


class Vector(Protocol):
    """A vector in memory that peers can read.

    Attributes:
        local: (n,) this worker's own.
    """

    @property
    def local(self) -> Any: ...


class Pending(Protocol):
    """An operation that has begun."""

    def wait(self) -> None:
        """Wait for its end."""


class Started(Pending, Protocol):
    """A local operation that has begun, and of which one can see whether it has ended."""

    @property
    def done(self) -> bool: ...


class Communicator(Protocol):
    """The workers of a run, as one of them sees them.

    Attributes:
        rank: This worker, 0 <= rank < size.
        size: The number of workers, p in the papers.
        nodes: (size,) the node of each worker.
        statistics: What this worker has exchanged.
        dead: Workers that have died, as far as this one knows. Nobody waits for them: collectives raise
            ``errors.RankFailed``. The memory of one of the same node stays as it left it.
    """

    rank: int
    size: int
    nodes: list[int]
    statistics: Statistics

    @property
    def dead(self) -> frozenset[int]: ...

    def split(self, color: int) -> Communicator:
        """A communicator of those workers that give the same ``color``, in the order of their ranks. Collective.

        It counts into the same statistics and is freed with this one.
        """

    def vector(self, n: int, dtype: Any) -> Vector:
        """A vector of zeros that peers can read. Collective."""

    def numbers(self, n: int) -> Vector:
        """A few numbers, float64 zeros in host memory wherever vectors are, that peers can read. Collective."""

    def node_vector(self, n: int, dtype: Any) -> Vector:
        """A vector of zeros that peers can read; the workers of a node have one between them. Collective."""

    def publish(self, vector: Vector) -> None:
        """Let peers read a vector as it is now, after the next barrier or gather. Local.

        In host memory they do anyway, and who sees what is written there after this sees what was written before. A
        barrier publishes all vectors.
        """

    def read(self, vector: Vector, peer: int, fn: Callable[[Any], object]) -> None:
        """Call ``fn`` with the peer's vector as it is now. Local; not counted as an exchange.

        Nothing is locked: while the peer is at work, a part of it can be one step newer than another.
        """

    def shared_vector(self, n: int, dtype: Any, rows: int = 1) -> SharedVector:
        """One vector for all workers, zeros, sharded over them; or ``rows`` of them, changed together. Collective."""

    def mailboxes(self, n: int, dtype: Any, slots: int = 1) -> Mailboxes:
        """Vectors at every worker that others read or change under their locks. Collective."""

    def allreduce(self, vector: Vector, *, mean: bool = False, part: slice | None = None) -> None:
        """Replace every worker's vector by the sum (or mean) of all; the same bits everywhere. Collective.

        Args:
            vector: (n,) of each worker.
            mean: Divide by the number of workers.
            part: Of the vector, the same on all workers; the rest is left alone.
        """

    def slice_of(self, n: int) -> slice:
        """This worker's part of a vector of ``n`` elements; the workers of a node have all of it between them. Local.

        It is what ``reduce_slices`` gives this worker.
        """

    def reduce_slices(self, vector: Vector, fn: Callable[[slice, Sequence[Any]], object]) -> None:
        """Give each worker what adds up to the sum of all workers' vectors in its part. Collective.

        Where it can be read where it lies, nothing has been added up yet, so that whoever uses the sum can add in the
        same pass. The vectors must stay as they are. When this returns, every worker of the node has returned from its
        ``fn``, and sees what all have written in it.

        Args:
            vector: (n,) of each worker.
            fn: Called with parts of ``slice_of(n)``, all of it in the end, and for each with 1 to 8 vectors of that
                part, which are lent for that call.
        """

    def start_allreduce(self, vector: Vector, *, mean: bool = False) -> Pending:
        """Begin to replace every worker's vector by the sum (or mean) of all. Collective, as ``wait`` is.

        The vector must be left alone until ``wait``; a worker may have one such operation under way.
        """

    def start(self, fn: Callable[[], object]) -> Started:
        """Begin ``fn``, which exchanges something by itself, in the background. Local.

        Until it has ended the worker touches nothing that ``fn`` touches. Functions run one after the other.
        """

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until something that others do, one-sided, makes ``condition()`` true. Local."""

    def broadcast(self, array: Any, root: int = 0) -> None:
        """Copy the root's array to every worker's. Collective."""

    def reduce(self, array: Any, root: int = 0) -> None:
        """Sum every worker's array into the root's; the others' are spent. Collective."""

    def gather(self, values: Sequence[float]) -> np.ndarray:
        """A few numbers of each worker, to all: (size, len(values)) float64. Collective."""

    def barrier(self) -> None:
        """Wait for every worker. Collective."""

    def free(self) -> None:
        """Give back everything that was made here. Collective."""
