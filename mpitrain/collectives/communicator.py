"""The interface of a method to the other workers, whether they are MPI ranks or simulated in one process.

A method uses only vectors (any array with NumPy's slicing) and the calls below. ``MPICommunicator``
(``collectives.mpi``) and ``SimulatedCommunicator`` (``simulation.communicator``) implement it.
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
        local: (n,) this worker's own array.
    """

    @property
    def local(self) -> Any:
        """This worker's own array, (n,)."""


class Pending(Protocol):
    """An operation in progress."""

    def wait(self) -> None:
        """Wait for the end of the operation."""


class Started(Pending, Protocol):
    """A background operation of this worker."""

    @property
    def done(self) -> bool:
        """Whether the operation has ended. Local."""


class Communicator(Protocol):
    """The workers of a run, as seen by one of them.

    Attributes:
        rank: This worker, 0 <= rank < size.
        size: The number of workers, p in the papers.
        nodes: (size,) the node of each worker.
        statistics: The counters of this worker's exchanges.
    """

    rank: int
    size: int
    nodes: list[int]
    statistics: Statistics

    @property
    def dead(self) -> frozenset[int]:
        """The workers known to have died. Local.

        Collectives raise ``errors.RankFailed`` instead of waiting for them. The memory of a dead worker can still be
        read while another worker of its node lives.
        """

    def split(self, color: int) -> Communicator:
        """Create a communicator of the workers that pass the same ``color``, in the order of their ranks. Collective.

        It shares the statistics of this communicator and is freed with it.
        """

    def vector(self, n: int, dtype: Any) -> Vector:
        """Allocate a vector of zeros that peers can read. Collective."""

    def numbers(self, n: int) -> Vector:
        """Allocate a few float64 zeros that peers can read, always in host memory. Collective."""

    def node_vector(self, n: int, dtype: Any) -> Vector:
        """Allocate a vector of zeros that the workers of a node share and that peers can read. Collective."""

    def publish(self, vector: Vector) -> None:
        """Publish a snapshot of ``vector``; peers see it after the next barrier or gather. Local.

        Vectors in host memory are always visible. For them, this call only orders writes: a peer that sees a later
        write also sees all earlier writes. A barrier publishes all vectors.
        """

    def read(self, vector: Vector, peer: int, fn: Callable[[Any], object]) -> None:
        """Call ``fn`` with the peer's present vector, unless it is lost. Local; not counted as an exchange.

        A vector is lost if all workers of its node are dead.

        The vector is not locked. If the peer changes it meanwhile, one part may be a step newer than another part.
        """

    def shared_vector(self, n: int, dtype: Any, rows: int = 1) -> SharedVector:
        """Allocate a vector of zeros, divided into shards, or ``rows`` such vectors, updated together. Collective."""

    def mailboxes(self, n: int, dtype: Any, slots: int = 1) -> Mailboxes:
        """Allocate ``slots`` vectors at every worker, each with a lock that guards every access to it. Collective."""

    def allreduce(self, vector: Vector, *, mean: bool = False, part: slice | None = None) -> None:
        """Replace every worker's vector by the sum (or mean) of all, with the same bits everywhere. Collective.

        Args:
            vector: (n,) the vector.
            mean: Whether to divide by the number of workers.
            part: The part of the vector to replace, the same on all workers; by default all of it.
        """

    def slice_of(self, n: int) -> slice:
        """Return the slice of a vector of ``n`` elements that this worker receives from ``reduce_slices``. Local.

        The slices of the workers of a node cover the vector.
        """

    def reduce_slices(self, vector: Vector, fn: Callable[[slice, Sequence[Any]], object]) -> None:
        """Call ``fn`` with vectors that add up to the sum of all workers' vectors in this worker's slice. Collective.

        ``fn`` can add the vectors in the same pass in which it uses their sum. Meanwhile, the workers' vectors must not
        change. When this call returns, all workers of the node have finished their ``fn``, and their results are
        visible.

        Args:
            vector: (n,) the vector.
            fn: Called once or more, with a part of ``slice_of(n)`` and a list of 1 to 8 vectors that add up to the sum
                in this part. The parts cover the slice. The vectors are valid only during the call.
        """

    def start_allreduce(self, vector: Vector, *, mean: bool = False) -> Pending:
        """Start a non-blocking all-reduce. Collective, as is ``wait`` of the result.

        The vector must not be used until ``wait`` returns. A worker may have one all-reduce in progress.
        """

    def start(self, fn: Callable[[], object]) -> Started:
        """Start a one-sided exchange ``fn`` in the background. Local.

        The worker must not use the data of ``fn`` until ``fn`` has ended. Several functions run one after the other.
        """

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until one-sided operations of other workers make ``condition()`` true. Local."""

    def broadcast(self, array: Any, root: int = 0) -> None:
        """Copy the root's array to the array of every worker. Collective."""

    def reduce(self, array: Any, root: int = 0) -> None:
        """Replace the root's array by the sum of all arrays; the other arrays become undefined. Collective."""

    def gather(self, values: Sequence[float]) -> np.ndarray:
        """Return a few numbers of each worker to all workers: (size, len(values)) float64. Collective."""

    def barrier(self) -> None:
        """Wait for all workers. Collective."""

    def free(self) -> None:
        """Free everything that this communicator has allocated. Collective."""
