"""Unequal numbers of steps: a rank that has made its last one stays in the exchanges of the others.

    with optimizer.join():
        for x, y in batches:      # more of them on some ranks than on others
            ...
            optimizer.step()

At each step the ranks first count those that still make one. A rank whose loop has ended then repeats, until no rank
makes a step any more:

- Where a step uses the mean of all gradients, it is the mean over the ranks that still make steps. A rank that has
  ended makes the same update, so that all parameters stay equal.
- Where rounds end in a mean of parameters, a rank has no weight in rounds in which it has made no step. It receives the
  mean of the others.
- In other exchanges (a center, neighbours in a graph), a rank that has ended takes part as it is, without local steps.

Source: the Join context of PyTorch (torch.distributed.algorithms.join), there with
``divide_by_initial_world_size=False``.
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
    """A context manager around the steps of an epoch, of which ranks may make unequal numbers.

    Collective to enter and to leave for synchronous methods. For the others it does nothing: no rank waits.

    Args:
        method: The method.
        replica: This rank's vectors and its worker.
        stepper: Makes the steps.

    Raises:
        UsageError: The method cannot leave a rank out.
    """

    def __init__(self, method: Method, replica: LocalReplica, stepper: Stepper) -> None:
        self._waits = method.is_synchronous
        if self._waits and (not method.can_join or method.takes_gradients_early or replica.size > 1):
            name = method.name if replica.size == 1 else "replica groups"
            raise UsageError(f"join() is not for {name}: every rank is needed in every step; give all as many batches")
        self._combines, self._replica, self._stepper = method.combines_gradients, replica, stepper

    def __enter__(self) -> Join:
        if self._waits:
            if self._stepper.join is not None:
                raise UsageError("join() inside another join(): leave that block first")
            self._note(None)
            self._stepper.join = self
        return self

    def weigh(self) -> None:
        """Count the ranks that make this step, and give this rank's gradient its weight. Collective."""
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
