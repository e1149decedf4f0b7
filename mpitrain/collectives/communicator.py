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

        No worker waits for them: collectives raise ``errors.RankFailed``. The memory of a dead worker of the same node
        stays as it is.
        """

    def split(self, color: int) -> Communicator:
        """Create a communicator of the workers that pass the same ``color``, in the order of their ranks. Collective.

        It shares the statistics of this communicator and is freed with it.
        """

    def vector(self, n: int, dtype: Any) -> Vector:
        """Allocate a vector of zeros that peers can read. Collective."""

    def numbers(self, n: int) -> Vector:
        """Allocate a few numbers, float64 zeros that peers can read, always in host memory. Collective."""

    def node_vector(self, n: int, dtype: Any) -> Vector:
        """Allocate a vector of zeros that the workers of a node share and that peers can read. Collective."""

    def publish(self, vector: Vector) -> None:
        """Publish a snapshot of ``vector``; peers see it after the next barrier or gather. Local.

        Vectors in host memory are always visible. For them this only orders writes: a peer that sees a later write also
        sees all earlier ones. A barrier publishes all vectors.
        """

    def read(self, vector: Vector, peer: int, fn: Callable[[Any], object]) -> None:
        """Call ``fn`` with the peer's vector as it is now. Local; not counted as an exchange.

        The vector is not locked: while the peer works, one part of it may be a step newer than another.
        """

    def shared_vector(self, n: int, dtype: Any, rows: int = 1) -> SharedVector:
        """Allocate a vector of zeros sharded over all workers, or ``rows`` that change together. Collective."""

    def mailboxes(self, n: int, dtype: Any, slots: int = 1) -> Mailboxes:
        """Allocate vectors at every worker that others read or change under their locks. Collective."""

    def allreduce(self, vector: Vector, *, mean: bool = False, part: slice | None = None) -> None:
        """Replace every worker's vector by the sum (or mean) of all, with the same bits everywhere. Collective.

        Args:
            vector: (n,) of each worker.
            mean: Whether to divide by the number of workers.
            part: The part of the vector to replace, the same on all workers; by default all of it.
        """

    def slice_of(self, n: int) -> slice:
        """Return this worker's slice of a vector of ``n`` elements, which ``reduce_slices`` gives it. Local.

        The slices of the workers of a node cover the vector.
        """

    def reduce_slices(self, vector: Vector, fn: Callable[[slice, Sequence[Any]], object]) -> None:
        """Call ``fn`` with addends of the sum of all workers' vectors in this worker's slice. Collective.

        Vectors in reach are passed as they are, so that ``fn`` adds them in the same pass in which it uses the sum. The
        vectors must not change meanwhile. On return, all workers of the node have returned from their ``fn``, and each
        sees what the others have written there.

        Args:
            vector: (n,) of each worker.
            fn: Called with parts of ``slice_of(n)``, which together cover it, and for each with 1 to 8 vectors that
                add up to the sum in this part. The vectors are valid during the call only.
        """

    def start_allreduce(self, vector: Vector, *, mean: bool = False) -> Pending:
        """Start a non-blocking all-reduce. Collective, as is ``wait`` of the result.

        The vector must not be used until ``wait`` returns. A worker may have one all-reduce in progress.
        """

    def start(self, fn: Callable[[], object]) -> Started:
        """Start ``fn``, a one-sided exchange, in the background. Local.

        The worker must not use the data of ``fn`` until it has ended. Functions run one after the other.
        """

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until the one-sided operations of others make ``condition()`` true. Local."""

    def broadcast(self, array: Any, root: int = 0) -> None:
        """Copy the root's array to every worker's. Collective."""

    def reduce(self, array: Any, root: int = 0) -> None:
        """Replace the root's array by the sum of all; the arrays of others are left undefined. Collective."""

    def gather(self, values: Sequence[float]) -> np.ndarray:
        """Return a few numbers of each worker to all workers: (size, len(values)) float64. Collective."""

    def barrier(self) -> None:
        """Wait for all workers. Collective."""

    def free(self) -> None:
        """Free everything that was allocated here. Collective."""
