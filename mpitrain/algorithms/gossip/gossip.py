"""Gossiping SGD: workers average with one random peer instead of with all workers.

    pull:  x_i <- (x_i + x_j)/2                     j uniform among the others; x_j itself is not changed
    push:  x_i is sent to a random j, which sets    x_j <- (x_j + sum of the k vectors received)/(1 + k)

The local update follows. Both exchanges are one-sided here. Pull reads x_j as it is, in the memory of j, which may be
making a step meanwhile: each element then has its value before or after this step. A pull does nothing if the x_j of
the drawn peer has not changed since the last average with it: a worker that runs while others stand still is not drawn
to them again and again. Push adds x_i to the mailbox of j. The mailbox holds a sum and a count, so that its memory does
not grow with the number of unread messages.

Source: Jin, Yuan, Iandola, Keutzer, How to scale distributed deep learning?, 2016, https://arxiv.org/abs/1611.04581,
section 3.

Deviations: the paper does not say how a receiver weighs several messages; the rule above is ours. The mean of all
workers is evaluated; it is preserved in expectation only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

from mpitrain import kernels
from mpitrain.algorithms.base.clipping import Clip, clip_displacement
from mpitrain.algorithms.base.evaluation import mean_of_workers
from mpitrain.algorithms.base.mailbox_state import Inbox
from mpitrain.algorithms.base.method import Method
from mpitrain.algorithms.base.peers import draw_peer
from mpitrain.algorithms.base.replica import Replica
from mpitrain.algorithms.base.settings import choice, integer
from mpitrain.algorithms.base.state import Located
from mpitrain.algorithms.base.worker import PeriodicWorker
from mpitrain.collectives.communicator import Communicator, Vector
from mpitrain.kernels import norms

COUNT = 1
"""The tag that counts the vectors summed in a mailbox."""


@dataclass(frozen=True)
class GossipSGD(Method):
    """Asynchronous gossip with one random peer at a time.

    Args:
        direction: With ``pull``, a worker reads the vector of a random peer; with ``push``, it sends its own to one.
        period: The number tau of local steps between two exchanges of a worker.
        grad_point: Whether the gradient of a step with an exchange is computed before (``pre``) or after (``post``) the
            exchange.
        clip_displacement: The largest Euclidean norm C by which a received vector moves a worker (``base.clipping``).
            C also bounds how far the local steps between two exchanges move a worker. This takes one more vector of
            memory.
    """

    direction: str = choice("pull", "who moves a vector: the receiver or the sender", ("pull", "push"))
    period: int = integer(1, "tau, local steps between exchanges", low=1)
    grad_point: str = choice("pre", "gradient before or after the exchange", ("pre", "post"))
    clip_displacement: float | None = clip_displacement()

    name: ClassVar[str] = "gossip"
    summary: ClassVar[str] = "average with one random peer at a time"
    source: ClassVar[str] = "Jin, Yuan, Iandola, Keutzer 2016, arXiv 1611.04581"
    communication: ClassVar[str] = "1/tau received and, on average, 1/tau sent"
    needs_gradient: ClassVar[bool] = False

    @property
    def is_synchronous(self) -> bool:
        """False: no worker waits for another."""
        return False

    def worker(self, replica: Replica) -> GossipWorker:
        """Make a worker. Collective."""
        direction = Pull if self.direction == "pull" else Push
        return GossipWorker(self, replica, direction(replica.comm, replica.x, Clip.of(self, replica.comm)))


class GossipWorker(PeriodicWorker):
    """A worker that averages with a random peer; only one of the two moves.

    Args:
        method: The hyper-parameters.
        replica: The vectors and the communicator to work with.
        direction: The exchange, a ``Pull`` or a ``Push``.
    """

    persistent: ClassVar[tuple[str, ...]] = ("_rng", "_direction", Located("_origin"))

    def __init__(self, method: GossipSGD, replica: Replica, direction: Pull | Push) -> None:
        super().__init__(method, replica)
        self._rng = np.random.default_rng([replica.seed, self.comm.rank])
        self._direction = direction
        self.average_with: Callable[[int], None] = direction.average_with
        self._clip = Clip.of(method, self.comm)
        self._origin = self.x.local[:0] if self._clip is None else self.x.local.copy()  # after the last exchange

    def before_update(self) -> None:
        """Begin a step: peers that have averaged with x_i may do so again. Exchange if due and grad_point = pre."""
        self._direction.begin_step()
        super().before_update()

    def after_update(self) -> None:
        """Limit the displacement since the last exchange, then exchange if it is due and grad_point = post."""
        if self._clip is not None:
            self._clip.limit(self.x.local, self._origin, self._clip.bound)
        super().after_update()

    def exchange(self) -> None:
        """Average with a peer that is drawn uniformly from the other living workers. Local."""
        peer = draw_peer(self.comm, self._rng)
        if peer is not None:
            self.average_with(peer)
        if self._clip is not None:
            kernels.copy(self._origin, self.x.local)

    def exchange_remaining(self) -> None:
        """Average with the vectors in the mailbox (push). With pull, do nothing. Local."""
        self._direction.receive()

    def consensus(self, out: Any) -> None:
        """Write the mean of all workers' present parameters. Local; exact while no worker makes a step."""
        mean_of_workers(self.comm, self.x, out)


class Pull:
    """A pull exchange, which reads the present vector of a peer. Collective to create.

    Each worker counts the steps that it has begun; this number is the version of its vector. A worker remembers the
    version of each peer's vector that it has averaged with, and does not average with the same version twice.

    Args:
        comm: The communicator of the workers.
        x: (n,) this worker's vector.
        clip: The bound on the displacement of this worker by a received vector.
    """

    persistent: ClassVar[tuple[str, ...]] = ("_version", "_versions_seen")

    def __init__(self, comm: Communicator, x: Vector, clip: Clip | None = None) -> None:
        self._comm, self._x, self._clip = comm, x, clip
        self._version = comm.numbers(1)
        self._versions_seen = np.full(comm.size, -1.0)
        self._peeked = np.zeros(1)
        kernels.pair_average(x.local[:0], x.local[:0].copy())  # compiled before the first exchange
        comm.barrier()

    def begin_step(self) -> None:
        """Count a step, because this worker's vector will change in it. Local."""
        self._version.local[0] += 1

    def average_with(self, peer: int) -> None:
        """Compute x_i <- (x_i + x_j)/2, unless this worker has averaged with the same x_j before. Local."""
        if self._version_of(peer) == self._versions_seen[peer]:
            return
        x, statistics = self._x.local, self._comm.statistics

        def average(z: Any) -> None:
            factor = 1.0 if self._clip is None else self._clip.factor(norms.distance(x, z) / 2, self._clip.bound)
            if factor < 1:
                statistics.n_nonfinite += kernels.weighted_average(x, z, factor / 2)
            else:
                statistics.n_nonfinite += kernels.pair_average(x, z)

        self._comm.read(self._x, peer, average)
        self._versions_seen[peer] = self._version_of(peer)
        statistics.n_exchanges += 1
        statistics.bytes_sent += x.nbytes

    def receive(self) -> None:
        """Do nothing, because a pull sends no messages."""

    def _version_of(self, peer: int) -> float:
        self._comm.read(self._version, peer, partial(np.copyto, self._peeked))
        return float(self._peeked[0])


class Push:
    """A push exchange: send this worker's vector to a peer, and average with received vectors. Collective to create.

    Args:
        comm: The communicator of the workers.
        vector: (n,) this worker's vector.
        clip: The bound on the displacement of this worker by a received vector.
    """

    persistent: ClassVar[tuple[str, ...]] = ("_inbox",)

    def __init__(self, comm: Communicator, vector: Vector, clip: Clip | None = None) -> None:
        x, self._clip = vector.local, clip
        self._x, self._rank = x, comm.rank
        self._boxes = comm.mailboxes(x.size, x.dtype)
        self._inbox = Inbox(comm, self._boxes, x, COUNT, ("inbox", "inbox_count"))
        kernels.push_receive(x[:0], x[:0].copy(), 1.0)  # compiled before the first exchange

    def begin_step(self) -> None:
        """Do nothing, because sent vectors do not change."""

    def average_with(self, peer: int) -> None:
        """Send x_i, then compute x_i <- (x_i + sum of the k received vectors)/(1 + k). Local."""
        self._boxes.update(peer, self._leave)
        self.receive()

    def receive(self) -> None:
        """Compute x_i <- (x_i + sum of the k vectors received)/(1 + k). Local."""
        self._boxes.update(self._rank, self._average)

    def _leave(self, box: Any, tags: np.ndarray) -> None:
        count, tags[COUNT] = tags[COUNT], 0  # a worker that dies in here leaves an empty mailbox, not half a sum
        if count == 0:
            box[...] = self._x
        else:
            kernels.scaled_add(box, self._x, 1.0)
        tags[COUNT] = count + 1

    def _average(self, box: Any, tags: np.ndarray) -> int:
        before = None if self._clip is None else self._x.copy()
        n_nonfinite = kernels.push_receive(self._x, box, tags[COUNT]) if tags[COUNT] else 0
        if self._clip is not None and tags[COUNT]:
            self._clip.limit(self._x, before, self._clip.bound * tags[COUNT])
        tags[COUNT] = 0
        return n_nonfinite
