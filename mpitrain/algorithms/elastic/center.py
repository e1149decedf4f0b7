"""The center of elastic averaging: one shared vector, or a copy at each worker.

An exchange of one worker multiplies the difference x - c by a number. A Gauss-Seidel exchange therefore equals a Jacobi
exchange with other rates (``jacobi_rates``). With these rates a_w and a_c, an exchange does not change a_c*x_i + a_w*c.
If the rates are equal, it does not change x_i + c: what the center gains is what the worker gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

from mpitrain import kernels
from mpitrain.algorithms.base.clipping import Clip
from mpitrain.algorithms.base.nonfinite import replace_nonfinite
from mpitrain.algorithms.base.precision import wide_copy
from mpitrain.algorithms.base.shared_rows import SharedRows
from mpitrain.collectives.communicator import Communicator


class Center(Protocol):
    """The center variable, as one worker sees it."""

    def exchange(self, x: Any, a_w: float, a_c: float) -> None:
        """Make both sides of an exchange, in the order with which the center was created."""

    def pull(self, x: Any, a_w: float) -> None:
        """Make the worker's side: x <- x - a_w*(x - c)."""

    def push(self, x: Any, a_c: float) -> None:
        """Make the center's side: c <- c + a_c*(x - c).

        If all workers exchange at once, add the sum of all workers' a_c*(x - c).
        """

    def read(self, out: Any) -> None:
        """Copy the center to ``out`` (n,). Local."""


class AsynchronousCenter(SharedRows):
    """A center in a shared vector, with which each worker exchanges on its own. Collective to create.

    Args:
        comm: The communicator of the workers.
        start: (n,) the first values; those of worker 0 are used.
        order: The order of an exchange.
        clip: The bound on the displacement of the center by this worker.
    """

    def __init__(self, comm: Communicator, start: Any, order: str = "jacobi", clip: Clip | None = None) -> None:
        super().__init__(comm, {"center": start})
        self._order, self._clip = order, clip
        # Compiled before the first exchange, so that it takes no longer than the others.
        x, c = start[:0].copy(), self.empty_shard(start)
        kernels.elastic_exchange(x, c, 0.0, 0.0)
        if order == "worker_first":
            compile_halves(x, c, x)

    def exchange(self, x: Any, a_w: float, a_c: float) -> None:
        """Make both sides of an exchange in one fused pass over x and c, shard by shard. Local."""
        a_w, a_c = jacobi_rates(self._order, a_w, a_c)
        self.vector.update(self.clipped(x, a_c, lambda part, c: kernels.elastic_exchange(x[part], c, a_w, a_c)))

    def clipped(self, x: Any, a_c: float, visit: Callable[[slice, Any], int]) -> Callable[[slice, Any], int]:
        """Return a function that first limits ||x - c|| to what the bound allows, then calls ``visit``."""
        clip = self._clip
        if clip is None or a_c == 0:
            return visit

        def clipped_visit(part: slice, c: Any) -> int:
            clip.limit(x[part], c, clip.share_of(c, self.vector.n) / abs(a_c))
            return visit(part, c)

        return clipped_visit

    def displace(self, x: Any, a_w: float, a_c: float) -> None:
        """Compute d = x - c, then c <- c + a_c*d, and overwrite ``x`` with a_w*d. Local.

        Args:
            x: (n,) a copy of the worker's parameters.
            a_w: The moving rate of the worker.
            a_c: The moving rate of the center.
        """
        self.vector.update(lambda part, c: kernels.elastic_displacement(x[part], c, a_w, a_c))

    def pull(self, x: Any, a_w: float) -> None:
        """Compute x <- x - a_w*(x - c). Local."""
        self.vector.update(lambda part, c: kernels.elastic_pull(x[part], c, a_w), pushes=False)

    def push(self, x: Any, a_c: float) -> None:
        """Compute c <- c + a_c*(x - c). Local."""
        visit = self.clipped(x, a_c, lambda part, c: kernels.elastic_center(c, x[part], a_c, 1.0))
        self.vector.update(visit, pulls=False)


class SynchronousCenter:
    """A center of which every worker holds a copy. Collective to create.

    In an exchange, an all-reduce computes s = sum_i x_i, from which every worker updates its copy. All copies have the
    same bits.

    Args:
        comm: The communicator of the workers.
        start: (n,) the first values; those of worker 0 are used.
        order: The order of an exchange.
        clip: The bound on the displacement of the center by this worker.
    """

    persistent: ClassVar[tuple[str, ...]] = ("_center",)

    def __init__(self, comm: Communicator, start: Any, order: str = "jacobi", clip: Clip | None = None) -> None:
        self._comm, self._order, self._clip = comm, order, clip
        self._kernel = kernels.elastic_sync_center_first if order == "center_first" else kernels.elastic_sync
        self._center = wide_copy(start)
        self._s = comm.vector(start.size, self._center.dtype)
        comm.broadcast(self._center)
        x, c, s = start[:0].copy(), self._center[:0], self._s.local[:0]
        self._kernel(x, c, s, 0.0, 0.0, 1.0)  # compiled before the first exchange
        kernels.receive(s, x)
        if order == "worker_first":
            compile_halves(x, c, s)

    def exchange(self, x: Any, a_w: float, a_c: float) -> None:
        """Make both sides of an exchange in one fused pass. Collective."""
        if self._order == "worker_first":  # s after the workers' moves is (1 - a_w)*s + a_w*p*c
            a_w, a_c = jacobi_rates(self._order, a_w, a_c)
        self._limit(x, a_c)
        self._sum(x)
        self._count(self._kernel(x, self._center, self._s.local, a_w, a_c, float(self._comm.size)))

    def pull(self, x: Any, a_w: float) -> None:
        """Compute x <- x - a_w*(x - c). Local."""
        self._count(kernels.elastic_pull(x, self._center, a_w))

    def push(self, x: Any, a_c: float) -> None:
        """Compute c <- c + a_c*(s - p*c). Collective."""
        self._limit(x, a_c)
        self._sum(x)
        self._count(kernels.elastic_center(self._center, self._s.local, a_c, float(self._comm.size)))

    def read(self, out: Any) -> None:
        """Copy the center to ``out`` (n,). Local."""
        kernels.copy(out, self._center)

    def _limit(self, x: Any, a_c: float) -> None:
        """Limit ||x - c|| to what moves the center by its bound. Local."""
        if self._clip is not None and a_c != 0:
            self._clip.limit(x, self._center, self._clip.bound / abs(a_c))

    def _sum(self, x: Any) -> None:
        """Compute s <- sum_i x_i; c replaces non-finite elements of x_i, so that they pull no worker. Collective."""
        n_nonfinite = kernels.receive(self._s.local, x)
        if n_nonfinite:
            kernels.copy(self._s.local, x)
            replace_nonfinite(self._s.local, self._center)
            self._count(n_nonfinite)
        self._comm.allreduce(self._s)

    def _count(self, n_nonfinite: int) -> None:
        self._comm.statistics.n_nonfinite += n_nonfinite


def jacobi_rates(order: str, a_w: float, a_c: float) -> tuple[float, float]:
    """Return the rates with which a Jacobi exchange of one worker equals one in ``order`` with a_w and a_c.

    center_first:  x - c_new = (1 - a_c)*(x - c)   so the worker's rate is a_w*(1 - a_c)
    worker_first:  x_new - c = (1 - a_w)*(x - c)   so the center's rate is a_c*(1 - a_w)
    """
    if order == "center_first":
        return a_w * (1 - a_c), a_c
    if order == "worker_first":
        return a_w, a_c * (1 - a_w)
    return a_w, a_c


def compile_halves(x: Any, c: Any, s: Any) -> None:
    """Compile the kernels for the worker's side and for the center's side of an exchange. All arrays are empty."""
    kernels.elastic_pull(x, c, 0.0)
    kernels.elastic_center(c, s, 0.0, 1.0)
