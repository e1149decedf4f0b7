"""Unequal numbers of steps: a rank that has made its last step keeps taking part in the exchanges of the others.

    with optimizer.join():
        for x, y in batches:      # more of them on some ranks than on others
            ...
            optimizer.step()

At each step, the ranks first count how many of them still make a step. A rank whose loop has ended (an ended rank)
stays in ``join`` until this number is 0. Until then it takes part in each step of the others as follows:

- Where a step uses the mean of all gradients, it is the mean over the ranks that still make steps. An ended rank makes
  the same update, so that all parameters stay equal.
- Where a round of several steps ends with a mean of the parameters, a rank that has made no step in the round has no
  weight in this mean. It receives the mean of the others.
- In other exchanges (with a center, or with neighbours in a graph), an ended rank takes part with its parameters as
  they are, and makes no local steps.

Source: the Join context of PyTorch (torch.distributed.algorithms.join) with ``divide_by_initial_world_size=False``.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

from mpitrain import kernels
from mpitrain.algorithms.base.method import Method
from mpitrain.errors import UsageError
from mpitrain.optimizer.local_replica import LocalReplica
from mpitrain.optimizer.step import Stepper


class Join:
    """A context manager around steps of which the ranks may make unequal numbers.

    For synchronous methods, it is Collective to enter and to leave. For asynchronous methods it does nothing, because
    no rank waits for another.

    Args:
        method: The method.
        replica: This rank's vectors and its worker.
        stepper: Makes the steps.

    Raises:
        UsageError: The method needs every rank in every step.
    """

    def __init__(self, method: Method, replica: LocalReplica, stepper: Stepper) -> None:
        self._waits = method.is_synchronous
        if self._waits and (not method.can_join or method.takes_gradients_early or replica.size > 1):
            name = method.name if replica.size == 1 else "replica groups"
            raise UsageError(f"join() is not for {name}: every rank is needed in every step; give all as many batches")
        if replica.survivors is not None:
            raise UsageError("join() counts all ranks, dead ones too: use on_failure=stop, or leave out join()")
        self._combines, self._replica, self._stepper = method.combines_gradients, replica, stepper

    def __enter__(self) -> Join:
        if self._waits:
            if self._stepper.join is not None:
                raise UsageError("join() inside another join(): leave that block first")
            self._note(None)
            self._stepper.join = self
        return self

    def weigh(self) -> None:
        """Count the ranks that make this step, and scale this rank's gradient accordingly. Collective.

        The mean of the scaled gradients of all ranks is then the mean over the ranks that make the step.
        """
        self._count(makes_step=True)

    def _note(self, clock: int | None) -> None:
        """Note in the worker, and in the one inside it, when it has made its last step."""
        worker: Any = self._replica.worker
        while worker is not None:
            worker.joined_at = clock
            worker = getattr(worker, "_worker", None)

    def _count(self, *, makes_step: bool) -> int:
        comm, worker = self._replica.comm, self._replica.worker
        n = int(comm.gather([makes_step]).sum())
        if self._combines and 0 < n < comm.size:
            kernels.scale(worker.g.local, comm.size / n)  # the mean over all ranks becomes the mean over n
        return n

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._waits:
            return
        self._stepper.join = None
        if kind is not None:
            return
        self._note(self._replica.worker.t)
        while self._count(makes_step=False):
            self._stepper.accompany()
