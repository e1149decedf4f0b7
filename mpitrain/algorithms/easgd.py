"""EASGD: elastic averaging SGD.

    x_i <- x_i - eta*g_i(x_i) - alpha*(x_i - c)
    c   <- c + alpha*sum_i (x_i - c)

Workers explore on their own and are drawn to a center, which is drawn to them; the center is the model to evaluate.
In step t with tau | t the exchange is made with the parameters at which the gradient was taken (``grad_point="pre"``),
then the local update follows.

Source: Zhang, Choromanska, LeCun, Deep learning with Elastic Averaging SGD, 2015, https://arxiv.org/abs/1412.6651,
eq. 5-6 and algorithm 1.

Deviations: the local update is any torch optimizer's. Its weight decay is computed when it runs, that is from the
parameters after the exchange; the paper's would be from those before it, a difference of eta*decay*E.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from mpitrain.algorithms.elastic import ElasticMethod
from mpitrain.algorithms.method import PeriodicWorker
from mpitrain.collectives.communicator import Communicator, Vector


@dataclass(frozen=True)
class EASGD(ElasticMethod):
    """Elastic averaging SGD, asynchronous unless ``synchronous`` is set. The arguments are ``ElasticMethod``'s.

    Communication: 2/tau vectors a worker and step.

    Example:
        >>> EASGD(moving_rate=0.9 / 4, period=10).period
        10
    """

    name: ClassVar[str] = "easgd"
    summary: ClassVar[str] = "elastic averaging: workers explore, tied to a center by springs"
    source: ClassVar[str] = "Zhang, Choromanska, LeCun 2015, arXiv 1412.6651"

    def worker(self, comm: Communicator, x: Vector, g: Vector, seed: int = 0) -> EASGDWorker:
        """Collective."""
        return EASGDWorker(self, comm, x, g)


class EASGDWorker(PeriodicWorker):
    """x_i is what the model holds; the center is shared."""

    def __init__(self, method: EASGD, comm: Communicator, x: Vector, g: Vector) -> None:
        super().__init__(method, comm, x, g)
        self._center = method.center(comm, x.local)

    def exchange(self) -> None:
        """x <- x - alpha*(x - c), and the center's side of it."""
        self._center.exchange(self.x.local, self._method.alpha(self.comm.size, self.learning_rate))

    def consensus(self, out: Any) -> None:
        """The center. Local."""
        self._center.read(out)

    def state(self) -> Iterator[tuple[str, Any]]:
        """The clock and the center."""
        yield from super().state()
        yield from self._center.state()

    def load(self, state: dict[str, Any]) -> None:
        """Collective."""
        super().load(state)
        self._center.load(state)
