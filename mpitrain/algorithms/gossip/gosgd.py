"""GoSGD: gossip that loses nothing. A worker pushes its parameters, with half its weight, to a random other.

    with probability p_ex:  w_i <- w_i/2,  send (x_i, w_i) to a random j
    for what has come:      x_j <- (w_j x_j + w x)/(w_j + w),  w_j <- w_j + w

At first w_i = 1/p. The sum of all w_i, and of all w_i x_i, is kept by every exchange, if what is on its way is counted.
Nobody waits for anybody.

Source: Blot, Picard, Cord, Thome, Gossip training for deep learning, 2016, https://arxiv.org/abs/1611.09726,
algorithms 3-4: messages are processed, then comes the gradient step, then perhaps a push (``grad_point="post"``: the
gradient after the exchange).

A mailbox holds the weighted mean of what came, and its weight, so that memory does not grow with the messages that a
worker has not yet looked at; the result is that of taking them one by one.

Deviations: a worker never draws itself. Elements that are not finite are left out of a mean.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from mpitrain import kernels
from mpitrain.algorithms.base.evaluation import mean_of_workers
from mpitrain.algorithms.base.method import Method, Replica, Worker, setting
from mpitrain.algorithms.base.peers import draw_peer

WEIGHT = 1
"""The tag of a mailbox with the weight of what lies in it; 0: it is empty."""


@dataclass(frozen=True)
class GoSGD(Method):
    """Gossip by weighted push, asynchronous.

    For workers of uneven speed on a slow network: an exchange is rare, one-sided, and keeps the weighted mean.

    Args:
        probability: p_ex, of a push in a step.
        grad_point: ``pre``: the gradient of a step is taken before the exchange; ``post``: after it.
    """

    probability: float = setting(0.01, "p_ex, of a push in a step", above=0, high=1)
    grad_point: str = setting("post", "gradient before or after the exchange", choices=("pre", "post"))

    name: ClassVar[str] = "gosgd"
    summary: ClassVar[str] = "push to a random peer with half the weight; weighted means lose nothing"
    source: ClassVar[str] = "Blot, Picard, Cord, Thome 2016, arXiv 1611.09726"
    communication: ClassVar[str] = "p_ex sent and, on average, p_ex received"
    needs_gradient: ClassVar[bool] = False
    short_run: ClassVar[MappingProxyType[str, Any]] = MappingProxyType({"probability": 0.2})
    metrics: ClassVar[tuple[str, ...]] = ("push_weight",)

    @property
    def is_synchronous(self) -> bool:
        """Nobody waits for anybody."""
        return False

    def worker(self, replica: Replica) -> GoSGDWorker:
        """Collective."""
        return GoSGDWorker(self, replica)


class GoSGDWorker(Worker):
    """x_i is what the model holds."""

    def __init__(self, method: GoSGD, replica: Replica) -> None:
        super().__init__(replica)
        x = self.x.local
        self._method = method
        self._rng = np.random.default_rng([replica.seed, self.comm.rank])
        self._w = 1.0 / self.comm.size
        self._boxes = self.comm.mailboxes(x.size, x.dtype)
        kernels.weighted_average(x[:0], x[:0].copy(), 1.0)  # compiled before the first exchange

    def before_update(self) -> None:
        """grad_point = pre: the gradient was taken before this exchange."""
        if self._method.grad_point == "pre":
            self.exchange()

    def after_update(self) -> None:
        """grad_point = post: the next gradient is taken after this exchange."""
        if self._method.grad_point == "post":
            self.exchange()

    def exchange(self) -> None:
        """Perhaps push, and take what has come. Local."""
        if self.comm.size == 1:
            return
        if self._rng.random() < self._method.probability:
            peer = draw_peer(self.comm, self._rng)
            if peer is not None:
                self.push_to(peer)
        self._boxes.update(self.comm.rank, self._drain)

    def push_to(self, peer: int) -> None:
        """Send (x_i, w_i/2), keep w_i/2. Local."""
        self._w /= 2
        self._boxes.update(peer, self._leave)

    def _leave(self, box: Any, tags: np.ndarray) -> int:
        before, tags[WEIGHT] = float(tags[WEIGHT]), 0.0  # meanwhile: who dies in here leaves an empty mailbox
        weight, n_nonfinite = before + self._w, 0
        if before == 0:
            box[...] = self.x.local
        else:
            n_nonfinite = kernels.weighted_average(box, self.x.local, self._w / weight)
        tags[WEIGHT] = weight
        return n_nonfinite

    def _drain(self, box: Any, tags: np.ndarray) -> int:
        w, tags[WEIGHT] = float(tags[WEIGHT]), 0.0
        if w == 0:
            return 0
        self._w += w
        return kernels.weighted_average(self.x.local, box, w / self._w)

    def consensus(self, out: Any) -> None:
        """The mean of all workers as they are now. Local: exact while they rest, between their steps otherwise."""
        mean_of_workers(self.comm, self.x, out)

    def metrics(self) -> dict[str, float]:
        """The weight w."""
        return {"push_weight": self._w}

    def state(self) -> Iterator[tuple[str, Any]]:
        """The clock, the random state, the weight and what lies in this worker's mailbox."""
        yield from super().state()
        yield "rng", json.dumps(self._rng.bit_generator.state)
        yield "push_weight", self._w
        inbox, weight = np.zeros_like(self.x.local), np.zeros(1)

        def copy(box: Any, tags: np.ndarray) -> None:
            weight[0] = tags[WEIGHT]
            if weight[0]:
                inbox[...] = box

        self._boxes.read(self.comm.rank, copy)
        yield "inbox", inbox
        yield "inbox_weight", float(weight[0])

    def load(self, state: dict[str, Any]) -> None:
        """Collective."""
        super().load(state)
        self._rng.bit_generator.state = json.loads(state["rng"])
        self._w = float(state["push_weight"])

        def fill(box: Any, tags: np.ndarray) -> None:
            kernels.assign(box, state["inbox"])
            tags[WEIGHT] = state["inbox_weight"]

        self._boxes.update(self.comm.rank, fill)
        self.comm.barrier()
