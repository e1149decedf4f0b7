"""Synchronous methods that go on after the death of a worker: exchanges that are repeated by the survivors.

A step of a synchronous method has up to two exchanges, one before and one after the local update. With
``on_failure="continue"``, each of them is a transaction:

    1. keep      copies of what the exchange changes
    2. exchange  as usual; a worker that waits for a dead one raises an error, while others may have finished
    3. agree     did all workers finish, and is nobody dead? The answer is the same on all survivors
    4. if not    discard the result, form a smaller group of workers, continue there from the copies, and go to 2

Therefore all survivors make the same step: either all use an exchange of p workers, or all use one of the p' survivors.
From the failed exchange on, the trajectory is that of p' workers that start from the survivors' states, to the last
bit. A mean is over p' workers, and a graph of workers is that of p'. The local update lies outside of the transactions
and is never repeated, so that the state of the torch optimizer needs no copy.

The learning rate does not change, although a mini-batch of all workers becomes smaller by the factor p'/p: a rate that
is stable for the larger mini-batch has a step that is as long on average, with a noise that is larger by sqrt(p/p').

The copies cost one pass over the vector in each step that exchanges, and the agreement one small collective.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

from mpitrain import kernels
from mpitrain.algorithms.base import gradients, nonfinite
from mpitrain.algorithms.base.method import Method
from mpitrain.algorithms.base.replica import ParamGroupSlice, Replica
from mpitrain.algorithms.base.state import State
from mpitrain.algorithms.base.worker import Worker
from mpitrain.errors import UsageError
from mpitrain.log import logger

ON_FAILURE = ("stop", "continue")
"""What the ranks of a synchronous method do after a death: end with a line, or continue without the dead rank."""

CARRIED = ("group_slices", "learning_rate", "loss", "skips", "has_common_gradient", "n_nonfinite")
"""Attributes of a worker that belong to the present step and are in no checkpoint."""

T = TypeVar("T")


class Group(Protocol):
    """The living workers, as far as they have agreed on it.

    Attributes:
        members: The number at the start of the run of each worker, in ascending order.
    """

    members: Sequence[int]

    def agree(self, succeeded: bool) -> bool:
        """Return whether all workers have succeeded and none has died, with the same result on all. Collective."""

    def comes_from_death(self, error: Exception) -> bool:
        """Return whether the death of a worker has caused an error. Local."""

    def shrink(self, make: Callable[[Replica, Sequence[int]], T]) -> T:
        """Form a group of the survivors and return what ``make`` returns. Collective over the survivors.

        Args:
            make: Called with the replica of this worker in the new group, which has the memory of the old one, and with
                the survivors' numbers in the old group. If another worker dies meanwhile, it is called again.
        """


def check_on_failure(on_failure: str, method: Method, *, replica_size: int = 1, has_average: bool = False) -> None:
    """Check that a method can continue after a death if ``on_failure`` says so. Local.

    Raises:
        UsageError: It cannot; the message says why.
    """
    if on_failure not in ON_FAILURE:
        raise UsageError(f"on_failure must be stop or continue, not {on_failure!r}")
    if on_failure == "stop" or not method.is_synchronous:
        return
    problems = {
        f"{method.name} with these settings keeps a part of the center at each rank": not method.can_lose_workers,
        "overlap sums gradients during the backward pass": method.takes_gradients_early,
        "with node_shared, a rank that dies may leave a part of the shared parameters half updated": (
            method.shares_parameters
        ),
        "a replica group needs each of its ranks": replica_size > 1,
        "the average of the iterates is shared by all ranks": has_average,
    }
    for problem, is_there in problems.items():
        if is_there:
            raise UsageError(f"on_failure=continue is not possible here: {problem}; use stop")


@dataclass(frozen=True)
class Copies:
    """Copies of what an exchange may change.

    Attributes:
        changed: The name of the vector, ``x`` or ``g``.
        vector: (n,) its values.
        entries: The entries of the worker, except those that no exchange changes.
        attributes: The attributes ``CARRIED``.
    """

    changed: str
    vector: Any
    entries: dict[str, Any]
    attributes: dict[str, Any]


class SurvivingWorker(Worker):
    """A worker that goes on when another worker dies.

    Args:
        method: The method.
        worker: The method's worker.
        replica: The replica with which the worker was created.
        group: The living workers.

    Attributes:
        pause_seconds: The duration of the last exchange that was repeated, from the beginning of its first attempt; 0
            without one. It is the time for which a death has stopped this worker.
    """

    persistent: ClassVar[tuple[str, ...]] = ("_worker",)

    def __init__(self, method: Method, worker: Worker, replica: Replica, group: Group) -> None:
        super().__init__(replica)
        self._method, self._worker, self._group = method, worker, group
        self.pause_seconds = 0.0

    def step(
        self,
        group_slices: Sequence[ParamGroupSlice],
        local_update: Callable[[], object] | None,
        loss: float | None = None,
        *,
        skips: bool = False,
        is_combined: bool = False,
    ) -> bool:
        """Make one step of the method.

        If a worker dies during an exchange, all survivors undo the exchange and repeat it without the dead worker.
        """
        worker, method = self._worker, self._method
        worker.use(group_slices)
        worker.loss = loss

        def before(worker: Worker) -> None:
            if not is_combined:
                gradients.combine(worker, skips=skips)
            worker.before_update()

        if method.exchanges_before(worker):
            self._exchange(before, changes="g" if method.combines_gradients else "x")
        else:
            before(worker)
        worker = self._worker
        if worker.skips:
            self.comm.statistics.n_nonfinite += not skips
        elif local_update is not None:
            local_update()
        else:
            worker.update_all(group_slices)
        if method.exchanges_after(worker):
            self._exchange(lambda worker: worker.after_update(), changes="x")
        else:
            worker.after_update()
        worker = self._worker
        worker.t += 1
        self.t, self.skips = worker.t, worker.skips
        return nonfinite.repair(worker)

    def clip_gradients(
        self,
        group_slices: Sequence[ParamGroupSlice],
        max_norm: float,
        order: float,
        *,
        skips: bool = False,
        is_combined: bool = False,
    ) -> float:
        """Combine and clip the gradients as a transaction. Collective if the method combines gradients."""

        def clip(worker: Worker) -> float:
            return worker.clip_gradients(group_slices, max_norm, order, skips=skips, is_combined=is_combined)

        norm = self._exchange(clip, changes="g") if self._method.combines_gradients else clip(self._worker)
        self.skips = self._worker.skips
        return norm

    def finalize(self, group_slices: Sequence[ParamGroupSlice] = ()) -> None:
        """Make the last exchange of a run as a transaction. Collective."""
        self._exchange(lambda worker: worker.finalize(group_slices), changes="x", is_last=True)

    def consensus(self, out: Any) -> None:
        """Write the method's consensus. Local."""
        self._worker.consensus(out)

    def wait(self) -> None:
        """Wait for the method's background operations. Local."""
        self._worker.wait()

    def metrics(self) -> dict[str, float]:
        """Return the method's metrics. Local."""
        return self._worker.metrics()

    def state(self) -> Iterator[tuple[str, Any]]:
        """Yield the entries of the method's worker, which do not depend on ``on_failure``. Local."""
        return self._worker.state()

    def load(self, state: State) -> None:
        """Continue from the entries of the method's worker. Collective."""
        self._worker.load(state)
        self.t = self._worker.t

    def _exchange(self, exchange: Callable[[Worker], T], *, changes: str, is_last: bool = False) -> T:
        """Make an exchange, again and again until no worker has died in it. Collective over the survivors.

        Args:
            exchange: Makes the exchange of a worker.
            changes: The vector that it changes, ``x`` or ``g``.
            is_last: Whether it may change any entry of the worker, which the other exchanges do not.
        """
        began, n_before = time.perf_counter(), len(self._group.members)
        copies = self._copies(changes, is_last=is_last)
        while True:
            result: Any = None
            try:
                result, succeeded = exchange(self._worker), True
            except Exception as error:  # an exchange that is left half done may also deliver garbage
                if not self._group.comes_from_death(error):
                    raise
                succeeded = False
            if self._group.agree(succeeded):
                break
            self._continue_from(copies)
        if len(self._group.members) < n_before:
            self.pause_seconds = time.perf_counter() - began
            self._report(n_before)
        return result

    def _copies(self, changes: str, *, is_last: bool) -> Copies:
        """Return copies of what an exchange may change. Local."""
        worker = self._worker
        unchanged = () if is_last else worker.unchanged_by_exchanges
        entries = {name: _copied(value) for name, value in worker.state() if name not in unchanged}
        attributes = {name: getattr(worker, name) for name in CARRIED}
        return Copies(changes, getattr(worker, changes).local.copy(), entries, attributes)

    def _continue_from(self, copies: Copies) -> None:
        """Replace the worker by one in a group of the survivors, in the state of the copies. Collective."""
        former = self._worker
        unchanged = {name: value for name, value in former.state() if name in former.unchanged_by_exchanges}
        entries = {**unchanged, **copies.entries}

        def make(replica: Replica, survivors: Sequence[int]) -> Worker:
            kernels.assign(getattr(replica, copies.changed).local, copies.vector)
            worker = self._method.worker(replica)
            worker.load(self._method.entries_after_death(entries, worker, survivors))
            for name, value in copies.attributes.items():
                setattr(worker, name, value)
            return worker

        self._worker = self._group.shrink(make)

    def _report(self, n_before: int) -> None:
        if self._worker.comm.rank == 0:
            logger.critical(
                "%d of %d workers continue with step %d, after a pause of %.3f s",
                len(self._group.members), n_before, self._worker.t + 1, self.pause_seconds,
            )  # fmt: skip


def _copied(value: Any) -> Any:
    return value.copy() if hasattr(value, "copy") else value
