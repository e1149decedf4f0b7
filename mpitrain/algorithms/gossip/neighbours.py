"""Messages between neighbours, step after step and without a barrier: what SGP and D-PSGD are made of.

At step t a worker posts one message, a vector and a weight, and takes those of its in-neighbours of that step. A
message lies in the memory of its sender, in one of S mailboxes that are used in turn; all receivers take it from there:

    post(t)   wait until all out-neighbours of step t - S have taken the message of that step; put the new one there
    take(t)   wait for the messages of the steps up to t - overlap; take them, and later ones that are there already

A message also says for how many steps, from the first on, its sender has taken everything: ``post`` looks at that. With
overlap = 0 exactly the messages of step t are taken at step t, in an order that does not depend on who is fast.

S = overlap + 2, and with it nobody waits for ever. Let t be the smallest step at which a worker is, and i be there.

1. i does not wait in ``post``: it wants its message of step t - S taken by some j. j has left step t - 1, so it has
   posted in that step, after leaving step t - 2, in which it took everything up to step t - 2 - overlap = t - S.
2. i does not wait for ever in ``receive``: it wants those of steps up to t - overlap <= t from workers that are at t or
   later. Those that are past t have posted them; those at t do so without waiting, by 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from mpitrain import kernels
from mpitrain.collectives.communicator import Communicator
from mpitrain.collectives.rma.blocks import N_TAGS
from mpitrain.collectives.rma.mailboxes import SEQUENCE_TAG
from mpitrain.collectives.topology.graphs import Topology

WEIGHT = 1
"""The tag that holds the weight of a message."""

RECEIVED = 2
"""The tag that counts the steps, from the first on, of which the sender had taken all messages."""

Receive = Callable[[int, Any, float], int | None]
"""``receive(sender, vector, weight)``: what to do with a message; it returns the number of rejected elements."""


class Neighbours:
    """The messages of one worker. Collective to create.

    Args:
        comm: The workers.
        graph: Who sends to whom at which step.
        like: (n,) a vector of the size and type of the messages.
        overlap: How many steps late a message may be taken.
    """

    def __init__(self, comm: Communicator, graph: Topology, like: Any, overlap: int = 0) -> None:
        self._comm, self._graph, self._overlap = comm, graph, overlap
        self._slots = overlap + 2
        self._boxes = comm.mailboxes(like.size, like.dtype, self._slots)
        self._t = 0  # of the next post
        self._due: list[tuple[int, int]] = []  # (step, sender) of what has not been taken, in this order

    def out_degree(self, t: int) -> int:
        """How many workers take what this one posts at step t."""
        return len(self._graph.out_neighbours(self._comm.rank, t))

    def post(self, vector: Any, weight: float = 1.0) -> None:
        """Send a copy of ``vector`` (n,) to the out-neighbours of this step. Local; waits for slow receivers."""
        t = self._t
        self._wait_until_received(t - self._slots)

        def write(box: Any, tags: np.ndarray) -> None:
            if self.out_degree(t):
                box[...] = vector
            tags[SEQUENCE_TAG], tags[WEIGHT], tags[RECEIVED] = t + 1, weight, self._n_received()

        self._boxes.update(self._comm.rank, write, t % self._slots)
        self._due.extend((t, sender) for sender in self._senders(t))
        self._t += 1

    def receive(self, fn: Receive) -> None:
        """Call ``fn`` with each message that must be taken by now or is there. Local; waits for slow senders."""
        t, later = self._t - 1, []
        for step, sender in self._due:
            if step <= t - self._overlap:
                self._comm.wait_until(lambda step=step, sender=sender: self._is_there(step, sender))  # type: ignore[misc]
            elif not self._is_there(step, sender):
                later.append((step, sender))
                continue
            self._boxes.receive(
                sender,
                lambda box, tags, sender=sender: fn(sender, box, float(tags[WEIGHT])),  # type: ignore[misc]
                step % self._slots,
            )
        self._due = later

    def _senders(self, t: int) -> list[int]:
        """The in-neighbours, each rank beginning after itself: receivers of one message come one after the other."""
        rank, size = self._comm.rank, self._comm.size
        return sorted(self._graph.in_neighbours(rank, t), key=lambda sender: (sender - rank) % size)

    def _is_there(self, step: int, sender: int) -> bool:
        return float(self._boxes.peek(sender, step % self._slots)[SEQUENCE_TAG]) == step + 1

    def _n_received(self) -> int:
        """The number of steps, from the first on, of which everything has been taken."""
        return self._due[0][0] if self._due else self._t

    def _wait_until_received(self, step: int) -> None:
        if step < 0:
            return
        for receiver in self._graph.out_neighbours(self._comm.rank, step):
            self._comm.wait_until(lambda receiver=receiver: self._acknowledged(receiver) > step)  # type: ignore[misc]

    def _acknowledged(self, receiver: int) -> float:
        return max(float(self._boxes.peek(receiver, slot)[RECEIVED]) for slot in range(self._slots))

    def state(self) -> Iterator[tuple[str, Any]]:
        """What is on its way: messages that somebody may not have taken yet, and which have not been taken here. Local.

        All workers must have made the same number of steps.
        """
        tags = np.zeros((self._slots, N_TAGS))
        for slot in range(self._slots):
            tags[slot] = self._boxes.peek(self._comm.rank, slot)
        yield "message_tags", tags
        yield "due", json.dumps(self._due)
        if self._overlap:
            yield "messages", np.stack([kernels.to_host(self._copy(step % self._slots)) for step in self._late_steps()])

    def load(self, t: int, state: dict[str, Any]) -> None:
        """Continue at step t. Collective."""
        self._t = t
        self._due = [(step, sender) for step, sender in json.loads(state["due"])]
        rows = {step % self._slots: state["messages"][k] for k, step in enumerate(self._late_steps())}
        for slot in range(self._slots):

            def fill(box: Any, tags: np.ndarray, slot: int = slot) -> None:
                tags[:] = state["message_tags"][slot]
                if slot in rows:
                    kernels.assign(box, rows[slot])

            self._boxes.update(self._comm.rank, fill, slot)
        self._comm.barrier()

    def _late_steps(self) -> range:
        """Steps whose messages may still be taken at the next one; those before the first are of empty mailboxes."""
        return range(self._t - self._overlap, self._t)

    def _copy(self, slot: int) -> Any:
        copies: list[Any] = []
        self._boxes.read(self._comm.rank, lambda box, _: copies.append(box.copy()), slot)
        return copies[0]
