"""EASGD: elastic averaging SGD.

    x_i <- x_i - eta*g_i(x_i) - alpha*(x_i - c)
    c   <- c + alpha*sum_i (x_i - c)

Workers explore on their own and are drawn to a center, which is drawn to them; the center is evaluated. In step t with
tau | t the exchange uses the parameters at which the gradient was taken (``grad_point="pre"``), then the local update
follows. Unequal rates of worker and center and Gauss-Seidel orders are described in ``elastic.method``.

With ``overlap`` the exchange runs in the background while the worker computes. It uses a copy of the worker's
parameters::

    every tau-th step:    s_i <- x_i, and in the background   E_i = alpha*(s_i - c);   c <- c + E_i
    when that has ended:  x_i <- x_i - E_i      before the local update of the next step

The worker's move is one to tau steps late; the center's is not. An exchange leaves sum_i x_i + c - (the E_i that the
workers have not subtracted yet) unchanged.

Source: Zhang, Choromanska, LeCun, Deep learning with Elastic Averaging SGD, 2015, https://arxiv.org/abs/1412.6651,
eq. 5-6 and algorithm 1.

Deviations: the local update is any torch optimizer's. It computes weight decay from the parameters after the exchange;
the paper would use those before it. The difference is eta*decay*E.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mpitrain import kernels
from mpitrain.algorithms.base.replica import Replica
from mpitrain.algorithms.base.settings import boolean
from mpitrain.algorithms.base.state import State
from mpitrain.algorithms.elastic.center import AsynchronousCenter
from mpitrain.algorithms.elastic.method import ElasticMethod, ElasticWorker
from mpitrain.collectives.communicator import Communicator, Started
from mpitrain.errors import UsageError


@dataclass(frozen=True)
class EASGD(ElasticMethod):
    """Elastic averaging SGD, asynchronous unless ``synchronous`` is set.

    The arguments are those of ``ElasticMethod``, and:

    Args:
        overlap: Whether to exchange in the background, for slow networks. This needs one more vector of memory. It is
            only possible for asynchronous exchanges in jacobi order.

    Example:
        >>> EASGD(moving_rate=0.9 / 4, period=10).period
        10
    """

    overlap: bool = boolean(False, "exchange in the background; the worker's move comes 1 to tau steps late")

    name: ClassVar[str] = "easgd"
    summary: ClassVar[str] = "elastic averaging: workers explore, tied to a center by springs"
    source: ClassVar[str] = "Zhang, Choromanska, LeCun 2015, arXiv 1412.6651"
    communication: ClassVar[str] = "2/tau (center pulled and pushed); synchronous 2(p-1)/(p*tau)"
    needs_gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.overlap and (self.synchronous or self.order != "jacobi"):
            raise UsageError(f"{self.name}: overlap is for asynchronous exchanges in jacobi order: leave it out")
        if self.overlap and self.clip_displacement is not None:
            raise UsageError(f"{self.name}: overlap moves the worker too late to clip it: leave out clip_displacement")

    def worker(self, replica: Replica) -> ElasticWorker:
        """Make a worker. Collective."""
        if self.overlap:
            return OverlappedWorker(self, replica, AsynchronousCenter(replica.comm, replica.x.local))
        return ElasticWorker(self, replica, self.center(replica))


class OverlappedWorker(ElasticWorker):
    """A worker whose exchanges run in the background.

    Args:
        method: The hyper-parameters.
        replica: The vectors and the communicator to work with.
        center: The center.
    """

    persistent: ClassVar[tuple[str, ...]] = ("_background",)

    def __init__(self, method: EASGD, replica: Replica, center: AsynchronousCenter) -> None:
        super().__init__(method, replica, center)
        self._background = BackgroundExchange(self.comm, center, self._position)

    def before_update(self) -> None:
        """Subtract the displacement of a completed exchange; start the next exchange if it is due."""
        started = self._background.started
        if started is not None and started.done:
            self._background.apply()
        super().before_update()

    def exchange(self) -> None:
        """Start an exchange, after the previous exchange has ended. Local."""
        self._background.start(*self._rates())

    def _exchange_at_rest(self) -> None:
        """Exchange in the background, and make the worker's move when it is there. Local."""
        self.exchange()
        self._background.apply()

    def wait(self) -> None:
        """Wait until the background exchange has updated the center. The worker's own side follows later. Local."""
        self._background.wait()

    def consensus(self, out: Any) -> None:
        """Write the center. Local."""
        self.wait()
        super().consensus(out)


class BackgroundExchange:
    """An elastic exchange in the background, one at a time.

    Args:
        comm: The communicator of the workers.
        center: The center.
        position: (n,) the worker's x_i.

    Attributes:
        started: The exchange that has not been applied yet; None if there is none.
    """

    def __init__(self, comm: Communicator, center: AsynchronousCenter, position: Any) -> None:
        self._comm, self._center, self._position = comm, center, position
        self._moved = np.zeros_like(position)  # s_i, then E_i
        self.started: Started | None = None
        empty = self._moved[:0]
        kernels.elastic_displacement(empty, center.empty_shard(position), 0.0, 0.0)  # compiled
        kernels.scaled_add(empty, empty.copy(), 0.0)
        kernels.copy(empty, empty.copy())

    def start(self, a_w: float, a_c: float) -> None:
        """Copy s_i <- x_i; in the background, compute E_i = a_w*(s_i - c) and c <- c + a_c*(s_i - c). Local."""
        self.apply()
        kernels.copy(self._moved, self._position)
        self.started = self._comm.start(lambda: self._center.displace(self._moved, a_w, a_c))

    def apply(self) -> None:
        """Compute x_i <- x_i - E_i, if there is an exchange. Local; waits for the end of the exchange."""
        if self.started is not None:
            self.started.wait()
            self.started = None
            kernels.scaled_add(self._position, self._moved, -1.0)

    def wait(self) -> None:
        """Wait for the end of the exchange. Local."""
        if self.started is not None:
            self.started.wait()

    def state(self) -> Iterator[tuple[str, Any]]:
        """Yield E_i if it has not been applied yet. Local; waits for the end of the exchange."""
        self.wait()
        if self.started is not None:
            yield "under_way", self._moved

    def load(self, state: State) -> None:
        """Restore an exchange that the center has applied, but the worker has not. Local."""
        self.wait()
        self.started = None
        if "under_way" in state:
            kernels.assign(self._moved, state["under_way"])
            self.started = self._comm.start(lambda: None)
            self.wait()
