"""Gossiping SGD: workers average with a random peer instead of with everybody.

    pull:  x_i <- (x_i + x_j)/2                     j uniform among the others; x_j itself is not changed
    push:  x_i goes to a random j, which averages:  x_j <- (x_j + sum of what came)/(1 + how many came)

then the local update. Both are one-sided here. Pull reads what j published last (a double buffer: never half of one
step and half of the next). Push adds x_i to the mailbox of j, which keeps a sum and a count, so that its memory does
not grow with the messages that j has not yet looked at.

Source: Jin, Yuan, Iandola, Keutzer, How to scale distributed deep learning?, 2016, https://arxiv.org/abs/1611.04581,
section 3. The paper leaves open how a receiver weighs several messages: the count rule above is ours.

The mean of all workers, which is what is evaluated, is preserved in expectation only.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mpitrain import kernels
from mpitrain.algorithms.base.evaluation import mean_of_workers
from mpitrain.algorithms.base.method import Method, PeriodicWorker, Replica, setting
from mpitrain.algorithms.base.peers import draw_peer

COUNT = 1
"""The tag of a mailbox that counts the vectors summed in it."""


@dataclass(frozen=True)
class GossipSGD(Method):
    """Gossip by pull or push, asynchronous.

    Args:
        direction: ``pull`` or ``push``.
        period: tau, local steps between two exchanges of a worker.
        grad_point: ``pre``: the gradient of a step with an exchange is taken before it; ``post``: after it.
    """

    direction: str = setting("pull", "who moves a vector: the receiver or the sender", choices=("pull", "push"))
    period: int = setting(1, "tau, local steps between exchanges", low=1)
    grad_point: str = setting("pre", "gradient before or after the exchange", choices=("pre", "post"))

    name: ClassVar[str] = "gossip"
    summary: ClassVar[str] = "average with one random peer at a time"
    source: ClassVar[str] = "Jin, Yuan, Iandola, Keutzer 2016, arXiv 1611.04581"
    communication: ClassVar[str] = "1/tau received and, on average, 1/tau sent"
    needs_gradient: ClassVar[bool] = False

    @property
    def is_synchronous(self) -> bool:
        """Nobody waits for anybody."""
        return False

    def worker(self, replica: Replica) -> GossipWorker:
        """Collective."""
        return (PullWorker if self.direction == "pull" else PushWorker)(self, replica)


class GossipWorker(PeriodicWorker):
    """What pull and push share: with whom to average, and what is evaluated."""

    def __init__(self, method: GossipSGD, replica: Replica) -> None:
        super().__init__(method, replica)
        self._rng = np.random.default_rng([replica.seed, self.comm.rank])

    def exchange(self) -> None:
        """Average with a peer drawn uniformly from the others that live. Local."""
        peer = draw_peer(self.comm, self._rng)
        if peer is not None:
            self.average_with(peer)

    @abstractmethod
    def average_with(self, peer: int) -> None:
        """One message. Local."""

    def consensus(self, out: Any) -> None:
        """The mean of all workers as they are now. Local: exact while they rest, between their steps otherwise."""
        mean_of_workers(self.comm, self.x, out)

    def state(self) -> Iterator[tuple[str, Any]]:
        """The clock and the random state."""
        yield from super().state()
        yield "rng", json.dumps(self._rng.bit_generator.state)

    def load(self, state: dict[str, Any]) -> None:
        """Local."""
        super().load(state)
        self._rng.bit_generator.state = json.loads(state["rng"])


class PullWorker(GossipWorker):
    """Publishes its own vector, reads a peer's."""

    def __init__(self, method: GossipSGD, replica: Replica) -> None:
        super().__init__(method, replica)
        x = self.x.local
        self._boxes = self.comm.mailboxes(x.size, x.dtype, slots=2)
        kernels.pair_average(x[:0], x[:0].copy())  # compiled before the first exchange
        self._boxes.publish(x)
        self.comm.barrier()

    def average_with(self, peer: int) -> None:
        """x_i <- (x_i + x_j)/2"""
        x = self.x.local
        self._boxes.publish(x)
        self._boxes.latest(peer, lambda z: kernels.pair_average(x, z))

    def state(self) -> Iterator[tuple[str, Any]]:
        """The clock, the random state and what peers can read, which is older than ``x``."""
        yield from super().state()
        published = np.empty_like(self.x.local)

        def copy(box: Any) -> None:
            published[...] = box

        self._boxes.latest(self.comm.rank, copy)
        yield "published", published

    def load(self, state: dict[str, Any]) -> None:
        """Collective."""
        super().load(state)
        self._boxes.publish(state["published"])
        self.comm.barrier()


class PushWorker(GossipWorker):
    """Leaves its vector with a peer, averages with what others left."""

    def __init__(self, method: GossipSGD, replica: Replica) -> None:
        super().__init__(method, replica)
        x = self.x.local
        self._boxes = self.comm.mailboxes(x.size, x.dtype)
        kernels.push_receive(x[:0], x[:0].copy(), 1.0)  # compiled before the first exchange

    def average_with(self, peer: int) -> None:
        """Send x_i, then x_i <- (x_i + sum of what came)/(1 + how many came)"""
        self._boxes.update(peer, self._leave)
        self._boxes.update(self.comm.rank, self._average)

    def _leave(self, box: Any, tags: np.ndarray) -> None:
        count, tags[COUNT] = tags[COUNT], 0  # meanwhile: who dies in here leaves an empty mailbox, not half a sum
        if count == 0:
            box[...] = self.x.local
        else:
            kernels.scaled_add(box, self.x.local, 1.0)
        tags[COUNT] = count + 1

    def _average(self, box: Any, tags: np.ndarray) -> int:
        n_nonfinite = kernels.push_receive(self.x.local, box, tags[COUNT]) if tags[COUNT] else 0
        tags[COUNT] = 0
        return n_nonfinite

    def state(self) -> Iterator[tuple[str, Any]]:
        """The clock, the random state and what lies unread in this worker's mailbox."""
        yield from super().state()
        inbox, count = np.zeros_like(self.x.local), np.zeros(1)

        def copy(box: Any, tags: np.ndarray) -> None:
            count[0] = tags[COUNT]
            inbox[...] = box if tags[COUNT] else 0

        self._boxes.update(self.comm.rank, copy)
        yield "inbox", inbox
        yield "inbox_count", float(count[0])

    def load(self, state: dict[str, Any]) -> None:
        """Collective."""
        super().load(state)

        def fill(box: Any, tags: np.ndarray) -> None:
            kernels.assign(box, state["inbox"])
            tags[COUNT] = state["inbox_count"]

        self._boxes.update(self.comm.rank, fill)
        self.comm.barrier()
