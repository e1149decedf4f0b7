"""EASGD: elastic averaging SGD.

    x_i <- x_i - eta*g_i(x_i) - alpha*(x_i - c)
    c   <- c + alpha*sum_i (x_i - c)

Workers explore on their own and are drawn to a center, which is drawn to them; the center is the model to evaluate.
In step t with tau | t the exchange is made with the parameters at which the gradient was taken (``grad_point="pre"``),
then the local update follows. Unequal rates of worker and center, and Gauss-Seidel orders, are in ``elastic``.

With ``overlap`` the exchange goes on in the background while the worker computes, from a copy of what it held when it
began::

    every tau-th step:    s_i <- x_i, and in the background   E_i = alpha*(s_i - c);   c <- c + E_i
    when that has ended:  x_i <- x_i - E_i      before the local update of the first step that finds it so

The worker's move is at least one and at most tau steps late; the center's is not. What is under way belongs to neither:
sum_i x_i + c - (the E_i under way) is what an exchange leaves unchanged.

Source: Zhang, Choromanska, LeCun, Deep learning with Elastic Averaging SGD, 2015, https://arxiv.org/abs/1412.6651,
eq. 5-6 and algorithm 1.

Deviations: the local update is any torch optimizer's. Its weight decay is computed when it runs, that is from the
parameters after the exchange; the paper's would be from those before it, a difference of eta*decay*E.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mpitrain import kernels
from mpitrain.algorithms.base.method import Replica, setting
from mpitrain.algorithms.elastic.method import AsynchronousCenter, ElasticMethod, ElasticWorker
from mpitrain.collectives.communicator import Started
from mpitrain.errors import UsageError


@dataclass(frozen=True)
class EASGD(ElasticMethod):
    """Elastic averaging SGD, asynchronous unless ``synchronous`` is set. The arguments are ``ElasticMethod``'s.

    Args:
        overlap: Exchange in the background, for slow networks; one vector of memory more. Only for asynchronous
            exchanges in jacobi order.

    Example:
        >>> EASGD(moving_rate=0.9 / 4, period=10).period
        10
    """

    overlap: bool = setting(False, "exchange in the background; the worker's move comes 1 to tau steps late")

    name: ClassVar[str] = "easgd"
    summary: ClassVar[str] = "elastic averaging: workers explore, tied to a center by springs"
    source: ClassVar[str] = "Zhang, Choromanska, LeCun 2015, arXiv 1412.6651"
    communication: ClassVar[str] = "2/tau (center pulled and pushed); synchronous 2(p-1)/(p*tau)"
    needs_gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.overlap and (self.synchronous or self.order != "jacobi"):
            raise UsageError(f"{self.name}: overlap is for asynchronous exchanges in jacobi order: leave it out")

    def worker(self, replica: Replica) -> ElasticWorker:
        """Collective."""
        if self.overlap:
            return OverlappedWorker(self, replica, AsynchronousCenter(replica.comm, replica.x.local))
        return ElasticWorker(self, replica, self.center(replica))


class OverlappedWorker(ElasticWorker):
    """Computes while its exchanges go on in the background.

    Args:
        method: As of any elastic worker.
        replica: What it works on.
        center: Of the workers.
    """

    def __init__(self, method: EASGD, replica: Replica, center: AsynchronousCenter) -> None:
        super().__init__(method, replica, center)
        self._shards = center
        self._moved = np.zeros_like(self._position)  # s_i, then E_i
        self._under_way: Started | None = None
        empty = self._moved[:0]
        c = np.zeros_like(empty, dtype=kernels.accumulator(empty.dtype))
        kernels.elastic_displacement(empty, c, 0.0, 0.0)  # compiled
        kernels.scaled_add(empty, empty.copy(), 0.0)
        kernels.copy(empty, empty.copy())

    def before_update(self) -> None:
        """Take an exchange that has ended, and perhaps begin one."""
        if self._under_way is not None and self._under_way.done:
            self._apply()
        super().before_update()

    def exchange(self) -> None:
        """Begin one; the one before has to have ended. Local."""
        self._apply()
        a_w, a_c = self._rates()
        kernels.copy(self._moved, self._position)
        self._under_way = self.comm.start(lambda: self._shards.displace(self._moved, a_w, a_c))

    def _apply(self) -> None:
        """x_i <- x_i - E_i"""
        if self._under_way is not None:
            self._under_way.wait()
            self._under_way = None
            kernels.scaled_add(self._position, self._moved, -1.0)

    def wait(self) -> None:
        """Nobody is at the center's shards for this worker. What has been exchanged is not taken yet. Local."""
        if self._under_way is not None:
            self._under_way.wait()

    def consensus(self, out: Any) -> None:
        """The center. Local."""
        self.wait()
        super().consensus(out)

    def state(self) -> Iterator[tuple[str, Any]]:
        """The clock, the center, and E_i if it is under way."""
        self.wait()
        yield from super().state()
        if self._under_way is not None:
            yield "under_way", self._moved

    def load(self, state: dict[str, Any]) -> None:
        """Collective."""
        self.wait()
        super().load(state)
        self._under_way = None
        if "under_way" in state:
            kernels.assign(self._moved, state["under_way"])
            self._under_way = self.comm.start(lambda: None)  # the center has it
            self.wait()
