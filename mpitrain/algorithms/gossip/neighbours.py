"""Messages between neighbours, at every step and without a barrier, for SGP and D-PSGD.

At step t a worker posts one message, a vector and a weight, and receives those of its in-neighbours of that step. A
message lies in the memory of its sender, in one of S mailboxes that are used in turn; all receivers read it there:

    post(t)      wait until all out-neighbours of step t - S have received that step's message; write the new one there
    average(t)   wait for the messages of the steps up to t - overlap; average with them, and with later ones if there

A message also carries an acknowledgement: the number of steps, from the first on, of which its sender has received all
messages. ``post`` waits for that. With overlap = 0 exactly the messages of step t are received at step t, in an order
that does not depend on the workers' speeds.

S = overlap + 2 excludes deadlock. Let t be the smallest step at which a worker is, and let i be such a worker.

1. i does not wait in ``post``: it would wait for some j to receive its message of step t - S. j has left step t - 1, so
   it has posted in that step, after leaving step t - 2, in which it received everything up to step t - 2 - overlap =
   t - S.
2. i does not wait forever in ``average``: it waits for messages of steps up to t - overlap <= t, from workers at t or
   later. Those past t have posted them; those at t do so without waiting, by 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from mpitrain import kernels
from mpitrain.algorithms.base.rescaling import CLOCK, Parts
from mpitrain.algorithms.base.state import State
from mpitrain.collectives.communicator import Communicator
from mpitrain.collectives.rma.blocks import N_TAGS, WEIGHT_TAG
from mpitrain.collectives.rma.mailboxes import SEQUENCE_TAG
from mpitrain.collectives.topology.graphs import Topology

RECEIVED = 2
"""The tag that counts the steps, from the first on, of which the sender had received all messages."""


def under_way(parts: Parts, overlap: int) -> Iterator[tuple[Any, float]]:
    """Yield the vector and the weight of each message under way, from the parts of a checkpoint."""
    slots = overlap + 2
    for part in parts if overlap else ():
        first_late = int(part["posted"]) - overlap
        for step, sender in json.loads(part["due"]):
            sent = parts[sender]
            yield sent["messages"][step - first_late], float(sent["message_tags"][step % slots][WEIGHT_TAG])


def no_messages(state: State, overlap: int) -> dict[str, Any]:
    """Return the entries of ``Neighbours`` after the clock of ``state``, as if all messages had been received.

    Args:
        state: The entries of a worker, with its clock.
        overlap: The number of steps by which a message may be late.
    """
    tags = np.zeros((overlap + 2, N_TAGS))
    tags[:, RECEIVED] = int(state[CLOCK])
    return {"posted": int(state[CLOCK]), "message_tags": tags, "due": "[]"}


class Neighbours:
    """The messages between a worker and its neighbours in a graph. Collective to create.

    Args:
        comm: The communicator of the workers.
        graph: The graph, which may differ from step to step.
        like: (n,) a vector of the size and type of the messages.
        overlap: The number of steps by which a message may be late.
    """

    def __init__(self, comm: Communicator, graph: Topology, like: Any, overlap: int = 0) -> None:
        self._comm, self._graph, self._overlap = comm, graph, overlap
        self._slots = overlap + 2
        self._boxes = comm.mailboxes(like.size, like.dtype, self._slots)
        self._boxes.prepare(like)
        self._senders = [self._senders_of(step) for step in range(graph.period)]
        self._receivers = [graph.out_neighbours(comm.rank, step) for step in range(graph.period)]
        self._tags = np.zeros(N_TAGS)  # of the message that is posted
        self._t = 0  # the step of the next post
        self._due: list[tuple[int, int]] = []  # (step, sender) of the messages still to receive, in order
        self._acknowledged = [0.0] * comm.size  # the largest acknowledgement seen from each worker

    def out_degree(self, t: int) -> int:
        """Return the number of workers that receive this worker's message of step t."""
        return len(self._receivers[t % len(self._receivers)])

    def post(self, vector: Any, weight: float = 1.0) -> None:
        """Send a copy of ``vector`` (n,) to the out-neighbours of this step. Local; waits for slow receivers."""
        # With short vectors this takes some microseconds, of which each line is a part.
        t, tags = self._t, self._tags
        slot, step = t % self._slots, t % len(self._receivers)
        self._wait_until_received(t - self._slots)
        tags[SEQUENCE_TAG], tags[WEIGHT_TAG], tags[RECEIVED] = t + 1, weight, self._n_received()
        self._boxes.post(vector if self._receivers[step] else None, tags, slot)
        self._due += [(t, sender) for sender in self._senders[step]]
        self._t = t + 1

    def average(self, x: Any, own: float, weights: Sequence[float] | None = None, overlap: int | None = None) -> float:
        """Replace x by its weighted mean with the messages that are due or have arrived. Local; waits for slow senders.

            x <- (w*x + sum_j w_j*z_j)/(w + sum_j w_j)        message by message, in a fixed order

        Args:
            x: (n,) the vector. It does not change where an element of a message is not finite.
            own: Its weight w.
            weights: (workers,) the weight w_j of each sender's message; by default the one that it was posted with.
            overlap: The number of steps by which a message may be late in this call; by default as in ``Neighbours``.

        Returns:
            The weight of the mean, w + sum_j w_j.
        """
        # With short vectors this takes some microseconds, of which each line is a part.
        t, later = self._t - 1 - (self._overlap if overlap is None else overlap), []
        for step, sender in self._due:
            if not self._is_there(step, sender):
                if step > t:
                    later.append((step, sender))
                    continue
                self._comm.wait_until(partial(self._is_there, step, sender))
            weight = None if weights is None else weights[sender]
            own += self._boxes.average(sender, x, own, weight, step % self._slots)
        self._due = later
        return own

    def _senders_of(self, step: int) -> list[int]:
        """Return the in-neighbours, starting after this rank, so that receivers do not read one message at once."""
        rank, size = self._comm.rank, self._comm.size
        return sorted(self._graph.in_neighbours(rank, step), key=lambda sender: (sender - rank) % size)

    def _is_there(self, step: int, sender: int) -> bool:
        """Return whether a message has arrived, and note what it acknowledges."""
        tags = self._boxes.peek(sender, step % self._slots)
        if tags[SEQUENCE_TAG] != step + 1:
            return False
        self._acknowledged[sender] = max(self._acknowledged[sender], float(tags[RECEIVED]))
        return True

    def _n_received(self) -> int:
        """Return the number of steps, from the first on, of which all messages have been received."""
        return self._due[0][0] if self._due else self._t

    def _wait_until_received(self, step: int) -> None:
        """Wait until all out-neighbours have received the messages up to this step, of which a message may tell."""
        if step < 0:
            return
        for receiver in self._receivers[step % len(self._receivers)]:
            if self._acknowledged[receiver] <= step:
                self._comm.wait_until(partial(self._has_received, receiver, step))

    def _has_received(self, receiver: int, step: int) -> bool:
        for slot in range(self._slots):
            acknowledged = float(self._boxes.peek(receiver, slot)[RECEIVED])
            self._acknowledged[receiver] = max(self._acknowledged[receiver], acknowledged)
        return self._acknowledged[receiver] > step

    def state(self) -> Iterator[tuple[str, Any]]:
        """Yield the messages that neighbours may still receive, and a list of those that this worker expects. Local.

        All workers must have made the same number of steps.
        """
        yield "posted", self._t
        tags = np.zeros((self._slots, N_TAGS))
        for slot in range(self._slots):
            tags[slot] = self._boxes.peek(self._comm.rank, slot)
        yield "message_tags", tags
        yield "due", json.dumps(self._due)
        if self._overlap:
            yield "messages", np.stack([kernels.to_host(self._copy(step % self._slots)) for step in self._late_steps()])

    def restart(self, state: State) -> None:
        """Set the number of steps made, and mark all messages as received. Local; peers see it after a barrier."""
        self._t, self._due = int(state[CLOCK]), []
        self._acknowledged = [0.0] * self._comm.size
        for slot in range(self._slots):

            def acknowledge(_: Any, tags: np.ndarray) -> None:
                tags[RECEIVED] = self._t

            self._boxes.update(self._comm.rank, acknowledge, slot)

    def load(self, state: State) -> None:
        """Restore the messages. Local; peers see them after a barrier."""
        self._t = int(state["posted"])
        self._acknowledged = [0.0] * self._comm.size
        self._due = [(step, sender) for step, sender in json.loads(state["due"])]
        rows = {step % self._slots: state["messages"][k] for k, step in enumerate(self._late_steps())}
        for slot in range(self._slots):

            def fill(box: Any, tags: np.ndarray, slot: int = slot) -> None:
                tags[:] = state["message_tags"][slot]
                if slot in rows:
                    kernels.assign(box, rows[slot])

            self._boxes.update(self._comm.rank, fill, slot)

    def _late_steps(self) -> range:
        """Return the steps whose messages may be received at the next one; those before 0 have empty mailboxes."""
        return range(self._t - self._overlap, self._t)

    def _copy(self, slot: int) -> Any:
        copies: list[Any] = []
        self._boxes.read(self._comm.rank, lambda box, _: copies.append(box.copy()), slot)
        return copies[0]
