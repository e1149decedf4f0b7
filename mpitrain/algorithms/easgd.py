"""EASGD: elastic averaging SGD.

    x_i <- x_i - eta*g_i(x_i) - alpha*(x_i - c)
    c   <- c + alpha*sum_i (x_i - c)

Workers explore on their own and are drawn to a center, which is drawn to them; the center is the model to evaluate.
In step t with tau | t the exchange is made with the parameters at which the gradient was taken (``grad_point="pre"``),
then the local update follows. Unequal rates of worker and center, and Gauss-Seidel orders, are in ``elastic``.

Source: Zhang, Choromanska, LeCun, Deep learning with Elastic Averaging SGD, 2015, https://arxiv.org/abs/1412.6651,
eq. 5-6 and algorithm 1.

Deviations: the local update is any torch optimizer's. Its weight decay is computed when it runs, that is from the
parameters after the exchange; the paper's would be from those before it, a difference of eta*decay*E.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mpitrain.algorithms.elastic import ElasticMethod, ElasticWorker
from mpitrain.algorithms.method import Replica


@dataclass(frozen=True)
class EASGD(ElasticMethod):
    """Elastic averaging SGD, asynchronous unless ``synchronous`` is set. The arguments are ``ElasticMethod``'s.

    Example:
        >>> EASGD(moving_rate=0.9 / 4, period=10).period
        10
    """

    name: ClassVar[str] = "easgd"
    summary: ClassVar[str] = "elastic averaging: workers explore, tied to a center by springs"
    source: ClassVar[str] = "Zhang, Choromanska, LeCun 2015, arXiv 1412.6651"
    communication: ClassVar[str] = "2/tau (center pulled and pushed); synchronous 2(p-1)/(p*tau)"
    needs_gradient: ClassVar[bool] = False

    def worker(self, replica: Replica) -> ElasticWorker:
        """Collective."""
        return ElasticWorker(self, replica, self.center(replica))
