"""A worker's own mailboxes in a checkpoint. They contain vectors that peers have left there or may still read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from mpitrain import kernels
from mpitrain.algorithms.base.state import State
from mpitrain.collectives.communicator import Communicator
from mpitrain.collectives.rma.mailboxes import Mailboxes


class Inbox:
    """The contents of this worker's mailbox: a vector from other workers, and a number that belongs to this vector.

    Args:
        comm: The communicator of the workers.
        boxes: The mailboxes of all workers, with one slot.
        like: (n,) a vector with the size and the type of those in the mailboxes.
        tag: The index of the number among the tags of the mailbox.
        names: The names of the vector and of the number in a checkpoint.
    """

    def __init__(self, comm: Communicator, boxes: Mailboxes, like: Any, tag: int, names: tuple[str, str]) -> None:
        self._boxes, self._rank, self._like, self._tag, self._names = boxes, comm.rank, like, tag, names

    def fill(self, values: Any, number: float) -> None:
        """Replace the vector and the number. Local; peers see the new ones after a barrier."""

        def fill(box: Any, tags: np.ndarray) -> None:
            kernels.assign(box, values)
            tags[self._tag] = number

        self._boxes.update(self._rank, fill)

    def place(self, start: Any) -> None:
        """Put ``start`` (n,) and the number 0 into the mailbox. Local; peers see them after a barrier."""
        self.fill(start, 0.0)

    def state(self) -> Iterator[tuple[str, Any]]:
        """Yield the vector and the number. Local."""
        values, number = np.zeros_like(self._like), np.zeros(1)

        def copy(box: Any, tags: np.ndarray) -> None:
            values[...], number[0] = box, tags[self._tag]

        self._boxes.read(self._rank, copy)
        yield self._names[0], values
        yield self._names[1], float(number[0])

    def load(self, state: State) -> None:
        """Restore the vector and the number. Local; peers see them after a barrier."""
        self.fill(state[self._names[0]], float(state[self._names[1]]))


class Published:
    """The vector that this worker published last in its mailbox, which has two slots.

    Args:
        comm: The communicator of the workers.
        boxes: The mailboxes of all workers.
        like: (n,) a vector with the size and the type of those in the mailboxes.
    """

    def __init__(self, comm: Communicator, boxes: Mailboxes, like: Any) -> None:
        self._boxes, self._rank, self._like = boxes, comm.rank, like

    def place(self, start: Any) -> None:
        """Publish ``start`` (n,). Local; peers see it after a barrier."""
        values = np.empty_like(self._like)
        kernels.assign(values, start)
        self._boxes.publish(values)

    def state(self) -> Iterator[tuple[str, Any]]:
        """Yield the vector that peers can read. Local."""
        published = np.empty_like(self._like)

        def copy(box: Any) -> None:
            published[...] = box

        self._boxes.latest(self._rank, copy)
        yield "published", published

    def load(self, state: State) -> None:
        """Publish the vector from a checkpoint. Local; peers see it after a barrier."""
        self._boxes.publish(state["published"])
