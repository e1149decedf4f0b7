"""GoSGD: weighted gossip. A worker pushes its parameters, with half its weight, to a random other worker.

    with probability p_ex:  w_i <- w_i/2,  send (x_i, w_i) to a random j
    for each message:       x_j <- (w_j x_j + w x)/(w_j + w),  w_j <- w_j + w

At the start w_i = 1/p. Every exchange keeps the sum of all w_i and of all w_i x_i, including those of unread messages.
No worker waits for another.

Source: Blot, Picard, Cord, Thome, Gossip training for deep learning, 2016, https://arxiv.org/abs/1611.09726,
algorithms 3-4: messages are processed, then the gradient step is made, then perhaps a push (``grad_point="post"``: the
gradient after the exchange).

A mailbox holds the weighted mean of the unread messages and its weight, so that memory does not grow with their number;
the result is that of receiving them one by one.

Deviations: a worker never draws itself. Non-finite elements are left out of a mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from mpitrain import kernels
from mpitrain.algorithms.base.evaluation import mean_of_workers
from mpitrain.algorithms.base.mailbox_state import Inbox
from mpitrain.algorithms.base.method import Interval, Method
from mpitrain.algorithms.base.peers import draw_peer
from mpitrain.algorithms.base.replica import Replica
from mpitrain.algorithms.base.rescaling import PARAMETERS, Parts, mean_of_parts
from mpitrain.algorithms.base.settings import choice, number
from mpitrain.algorithms.base.worker import Worker

WEIGHT = 1
"""The tag that holds the weight of the vector in a mailbox; 0: the mailbox is empty."""


@dataclass(frozen=True)
class GoSGD(Method):
    """Asynchronous gossip by weighted pushes, which conserve the weighted mean.

    It suits slow networks and workers of different speeds, because exchanges are rare and one-sided.

    Args:
        probability: The probability p_ex of a push in a step.
        grad_point: Whether the gradient of a step is computed before (``pre``) or after (``post``) the exchange.
    """

    probability: float = number(0.01, "p_ex, of a push in a step", above=0, high=1)
    grad_point: str = choice("post", "gradient before or after the exchange", ("pre", "post"))

    name: ClassVar[str] = "gosgd"
    summary: ClassVar[str] = "push to a random peer with half the weight; weighted means lose nothing"
    source: ClassVar[str] = "Blot, Picard, Cord, Thome 2016, arXiv 1611.09726"
    communication: ClassVar[str] = "p_ex sent and, on average, p_ex received"
    needs_gradient: ClassVar[bool] = False
    short_run: ClassVar[MappingProxyType[str, Any]] = MappingProxyType({"probability": 0.2})
    metrics: ClassVar[tuple[str, ...]] = ("push_weight",)
    goes_on: ClassVar[str] = "weighted mean sum_i w_i x_i, with the unread messages; mean of the optimizer states"

    @property
    def is_synchronous(self) -> bool:
        """False: no worker waits for another."""
        return False

    def interval(self, size: int) -> Interval:
        """Return 1/p_ex, the mean number of steps between two pushes."""
        return Interval(1 / self.probability, "probability", lambda steps: f"{min(1 / max(steps, 1), 1):.2g} or more")

    def common_start(self, parts: Parts) -> Any:
        """Return sum_i w_i x_i, including the unread messages."""
        names = (PARAMETERS, "push_weight"), ("inbox", "inbox_weight")
        return mean_of_parts((part[vector], float(part[weight])) for part in parts for vector, weight in names)

    def worker(self, replica: Replica) -> GoSGDWorker:
        """Make a worker. Collective."""
        return GoSGDWorker(self, replica)


class GoSGDWorker(Worker):
    """A worker with a push weight w_i; the model holds x_i."""

    persistent: ClassVar[tuple[str, ...]] = ("_rng", "_push_weight", "_inbox")

    def __init__(self, method: GoSGD, replica: Replica) -> None:
        super().__init__(replica)
        x = self.x.local
        self._method = method
        self._rng = np.random.default_rng([replica.seed, self.comm.rank])
        self._push_weight = 1.0 / self.comm.size
        self._boxes = self.comm.mailboxes(x.size, x.dtype)
        self._inbox = Inbox(self.comm, self._boxes, x, WEIGHT, ("inbox", "inbox_weight"))
        kernels.weighted_average(x[:0], x[:0].copy(), 1.0)  # compiled before the first exchange

    def before_update(self) -> None:
        """Exchange if grad_point = pre, which means that the gradient precedes the exchange."""
        if self._method.grad_point == "pre":
            self.exchange()

    def after_update(self) -> None:
        """Exchange if grad_point = post, which means that the exchange precedes the next gradient."""
        if self._method.grad_point == "post":
            self.exchange()

    def exchange(self) -> None:
        """Push with probability p_ex, then read the mailbox. Local."""
        if self.comm.size == 1:
            return
        if self._rng.random() < self._method.probability:
            peer = draw_peer(self.comm, self._rng)
            if peer is not None:
                self.push_to(peer)
        self._boxes.update(self.comm.rank, self._drain)

    def exchange_remaining(self) -> None:
        """Read the mailbox, so that x_i includes all messages that have arrived. Local."""
        self._boxes.update(self.comm.rank, self._drain)

    def push_to(self, peer: int) -> None:
        """Send (x_i, w_i/2), and keep the weight w_i/2. Local."""
        self._push_weight /= 2
        self._boxes.update(peer, self._leave)

    def _leave(self, box: Any, tags: np.ndarray) -> int:
        before, tags[WEIGHT] = float(tags[WEIGHT]), 0.0  # a worker that dies in here leaves an empty mailbox
        weight, n_nonfinite = before + self._push_weight, 0
        if before == 0:
            box[...] = self.x.local
        else:
            n_nonfinite = kernels.weighted_average(box, self.x.local, self._push_weight / weight)
        tags[WEIGHT] = weight
        return n_nonfinite

    def _drain(self, box: Any, tags: np.ndarray) -> int:
        w, tags[WEIGHT] = float(tags[WEIGHT]), 0.0
        if w == 0:
            return 0
        self._push_weight += w
        return kernels.weighted_average(self.x.local, box, w / self._push_weight)

    def consensus(self, out: Any) -> None:
        """Write the mean of all workers' present parameters. Local; exact while no worker makes a step."""
        mean_of_workers(self.comm, self.x, out)

    def metrics(self) -> dict[str, float]:
        """Return the push weight w_i. Local."""
        return {"push_weight": self._push_weight}
