"""A worker that is a group of ranks with one model between them.

    rank      0   1   2 | 3   4   5 | ...       groups of k = 3 neighbours
    worker        0     |     1     | ...       in a method, p is the number of workers
    head      0           3           ...       the only rank of a group that the method knows

One step of a group:

    1. g <- the mean of its members' gradients     an all-reduce among them
    2. the head makes the worker's step            exchange and local update, with that gradient
    3. x <- the head's x                           the other members read it in place

With any method, a group of k ranks with mini-batches of b is therefore equivalent to one rank with a mini-batch of
k*b, up to rounding. Only the head holds the state of the method and of the local optimizer. The other members receive
the parameters after each step.

A group is data-parallel: every member has the whole model and samples of its own. A model that is split over the
members would fit here too: step 1 would gather the members' parts of the gradient, and step 3 scatter the parameters.

Every member can read the consensus, the parameters that the method evaluates, at any time. A member requests it from
the head, where a thread answers it. The head's own program need not reach a certain point first.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mpitrain import kernels
from mpitrain.algorithms.base import gradients
from mpitrain.algorithms.base.replica import ParamGroupSlice, Replica
from mpitrain.algorithms.base.state import State
from mpitrain.algorithms.base.worker import Worker
from mpitrain.collectives.communicator import Vector
from mpitrain.collectives.world.background import threads_may_call_mpi
from mpitrain.collectives.world.world import World
from mpitrain.errors import UsageError
from mpitrain.optimizer.consensus_server import ANSWER, ASK, ConsensusServer

if TYPE_CHECKING:  # importing it starts MPI, and `check_replica_size` is called before that
    from mpitrain.collectives.mpi import MPICommunicator
    from mpitrain.collectives.rma.device_window import AnyWindow


def check_replica_size(replica_size: int, world: World) -> None:
    """Refuse a replica size that does not divide the number of ranks.

    Raises:
        UsageError: The message names sizes that do.
    """
    if replica_size < 1 or world.size % replica_size:
        raise UsageError(
            "replica_size, the number of ranks per worker, must divide the number of ranks, "
            f"which is {world.size}, not be {replica_size}"
        )


@dataclass(frozen=True)
class GroupVectors:
    """The vectors that the members of a group exchange with each other.

    Attributes:
        comm: The communicator of the members.
        x, g: (n,) vectors of parameters and gradients. The model's tensors are views of these on all members except the
            head. Those of the head live elsewhere, where the heads of other groups can reach them.
    """

    comm: MPICommunicator
    x: AnyWindow
    g: AnyWindow

    def average(self, *, skips: bool = False) -> bool:
        """Replace every member's ``g`` by the mean over the group. Collective over the group.

        Args:
            skips: Whether this rank's gradient is not finite.

        Returns:
            Whether the gradient of any member is not finite.
        """
        first = self.g.local[:1]
        if skips:
            first[...] = math.nan
        self.comm.allreduce(self.g, mean=True)
        return not all(math.isfinite(float(element)) for element in first)

    def mean_loss(self, loss: float | None) -> float | None:
        """Return the mean of the members' losses, or None if they have none. Collective over the group if they do."""
        return None if loss is None else float(self.comm.gather([loss]).mean())


class ReplicaGroup:
    """The ranks that form one worker, as one of them sees them. Collective over all ranks to create.

    The first rank of the group is its head, and runs the method's worker.

    Args:
        comm: The communicator of all ranks.
        size: The number k of ranks per worker. With k = 1, each rank is a worker, at no cost.
        n: The number of elements of the model's vector.
        dtype: The type of the elements.
        node_shared: Whether the workers of a node share one ``x``; only with a size of 1.

    Attributes:
        workers: The communicator of the heads, which the method uses; None on other members.
        world: The ranks of this group; None if each rank is a worker.
        x, g: (n,) vectors for this rank's parameters and gradients.
    """

    def __init__(self, comm: MPICommunicator, size: int, n: int, dtype: Any, *, node_shared: bool = False) -> None:
        self.workers: MPICommunicator | None = comm
        self.world: World | None = None
        self.x: Vector
        self.g: Vector
        self._shared: GroupVectors | None = None
        self._consensus_server: ConsensusServer | None = None
        if size > 1:
            is_head = comm.rank % size == 0
            heads = comm.split(0 if is_head else 1)
            self.workers = heads if is_head else None
            members = comm.split(comm.rank // size)
            self.world = members.world
            self._shared = GroupVectors(members, members.vector(n, dtype), members.vector(n, dtype))
            self.x, self.g = self._shared.x, self._shared.g
            kernels.copy(np.empty(0, dtype), np.empty(0, dtype))  # compiled before the first step
        if self.workers is not None:
            self.x = self.workers.node_vector(n, dtype) if node_shared else self.workers.vector(n, dtype)
            self.g = self.workers.vector(n, dtype)

    def worker(self, make: Callable[[MPICommunicator], Worker], metrics: Sequence[str]) -> Worker:
        """Return an object with the interface of a worker, on every rank. Collective.

        Args:
            make: Creates the method's worker from the communicator of the heads; called on heads only.
            metrics: The names of the method's metrics.
        """
        if self.workers is None:
            assert self._shared is not None
            return GroupMember(self._shared, metrics)
        worker = make(self.workers)
        if self._shared is None:
            return worker
        busy = threading.Lock()
        if threads_may_call_mpi():
            vector = np.empty_like(self.x.local)
            self._consensus_server = ConsensusServer(self._shared.comm.world, vector, worker.consensus, busy)
        return GroupHead(worker, self._shared, busy)

    def consensus(self, worker: Worker, out: Any) -> None:
        """Write a worker's consensus to ``out`` (n,) on every member. Collective over the group if there is one."""
        if self.workers is not None:
            worker.consensus(out)
        if self._shared is not None:
            self._shared.comm.broadcast(out)

    def close(self) -> None:
        """Stop the thread that answers members, and release the vectors. Local; call it after the last request."""
        if self._consensus_server is not None:
            self._consensus_server.stop()
            self._consensus_server = None
        self._shared = None
        del self.x, self.g


class GroupHead(Worker):
    """The worker of a replica group on its head. It runs the method's worker with the mean gradient of the group.

    Args:
        worker: The method's worker, possibly wrapped by an average.
        shared: The vectors that the members exchange.
        busy: A lock that is held while the worker changes or is read. The thread that answers members also uses it.
    """

    persistent: ClassVar[tuple[str, ...]] = ("_worker",)

    def __init__(self, worker: Worker, shared: GroupVectors, busy: threading.Lock) -> None:
        super().__init__(Replica(worker.comm, worker.x, worker.g))
        self._worker, self._shared, self._busy = worker, shared, busy

    def step(
        self,
        group_slices: Sequence[ParamGroupSlice],
        local_update: Callable[[], object] | None,
        loss: float | None = None,
        *,
        skips: bool = False,
        is_combined: bool = False,
    ) -> bool:
        """Make the worker's step with the mean of the members' gradients. Collective over the group."""
        loss = self._shared.mean_loss(loss)
        if not is_combined:
            self._average(skips=skips)
        with self._busy:
            found_nonfinite = self._worker.step(
                group_slices, local_update, loss, skips=self.skips, is_combined=is_combined
            )
            self.skips = self._worker.skips
        self._share_parameters()
        return found_nonfinite

    def clip_gradients(
        self,
        group_slices: Sequence[ParamGroupSlice],
        max_norm: float,
        order: float,
        *,
        skips: bool = False,
        is_combined: bool = False,
    ) -> float:
        """Clip the worker's gradient, which is computed from the mean over the group. Collective over the group."""
        if not is_combined:
            self._average(skips=skips)
        with self._busy:
            norm = self._worker.clip_gradients(group_slices, max_norm, order, skips=self.skips, is_combined=is_combined)
            self.skips = self._worker.skips
        return float(self._shared.comm.gather([norm])[0, 0])

    def _average(self, *, skips: bool) -> None:
        kernels.copy(self._shared.g.local, self.g.local)
        self.skips = self._shared.average(skips=skips)
        kernels.copy(self.g.local, self._shared.g.local)

    def _share_parameters(self) -> None:
        # The members have read what was there before: they have been in an all-reduce since.
        kernels.copy(self._shared.x.local, self.x.local)
        self._shared.x.sync()
        self._shared.comm.barrier()

    def consensus(self, out: Any) -> None:
        """Write the consensus to ``out`` (n,). Local."""
        with self._busy:
            self._worker.consensus(out)

    def wait(self) -> None:
        """Wait for the worker's background exchanges. Local."""
        with self._busy:
            self._worker.wait()

    def finalize(self, group_slices: Sequence[ParamGroupSlice] = ()) -> None:
        """Make the worker's last exchange. Collective over the group."""
        with self._busy:
            self._worker.finalize(group_slices)
        self._share_parameters()

    def metrics(self) -> dict[str, float]:
        """Return the worker's metrics. Local."""
        return self._worker.metrics()

    def state(self) -> Iterator[tuple[str, Any]]:
        """Yield the worker's state. The lock is held until the iterator is exhausted."""
        with self._busy:
            yield from self._worker.state()

    def load(self, state: State) -> None:
        """Continue from the worker's state. Collective over the heads."""
        with self._busy:
            self._worker.load(state)


class GroupMember(Worker):
    """The worker of a replica group on a member other than the head. It has no state of the method.

    Args:
        shared: The vectors that the members exchange.
        metrics: The names of the method's metrics.
    """

    def __init__(self, shared: GroupVectors, metrics: Sequence[str]) -> None:
        super().__init__(Replica(shared.comm, shared.x, shared.g))
        self._shared, self._metrics = shared, metrics

    def step(
        self,
        group_slices: Sequence[ParamGroupSlice],
        local_update: Callable[[], object] | None,
        loss: float | None = None,
        *,
        skips: bool = False,
        is_combined: bool = False,
    ) -> bool:
        """Contribute the gradient and receive the head's parameters. Collective over the group."""
        self._shared.mean_loss(loss)
        if not is_combined:
            self.skips = self._shared.average(skips=skips)
        self._receive_parameters()
        return False

    def clip_gradients(
        self,
        group_slices: Sequence[ParamGroupSlice],
        max_norm: float,
        order: float,
        *,
        skips: bool = False,
        is_combined: bool = False,
    ) -> float:
        """Contribute the gradient, and receive the norm from the head. Collective over the group."""
        if not is_combined:
            self.skips = self._shared.average(skips=skips)
        norm = float(self._shared.comm.gather([0.0])[0, 0])
        factor = gradients.clip_factor(norm, max_norm)
        if factor < 1:
            kernels.scale(self.g.local, factor)  # for who reads it: the step uses the head's
        return norm

    def _receive_parameters(self) -> None:
        comm, own = self._shared.comm, self.x.local
        comm.barrier()
        comm.read(self._shared.x, 0, lambda x: kernels.copy(own, x))
        comm.statistics.bytes_sent += own.nbytes

    def consensus(self, out: Any) -> None:
        """Request the consensus from the head, and write it to ``out`` (n,). Local.

        Raises:
            UsageError: This MPI does not allow several threads of a rank to call it.
        """
        if not threads_may_call_mpi():
            raise UsageError(
                "this MPI lets only one thread of a rank call it (mpitrain info): "
                "ask the first rank of a replica group for the consensus"
            )
        world = self._shared.comm.world
        with world.waiting("the consensus of the group's first rank", lambda: [0]):
            world.comm.Send(np.empty(0, np.uint8), 0, ASK)
            world.comm.Recv(out.view(np.uint8), 0, ANSWER)

    def finalize(self, group_slices: Sequence[ParamGroupSlice] = ()) -> None:
        """Receive the head's parameters after its last exchange. Collective over the group."""
        self._receive_parameters()

    def metrics(self) -> dict[str, float]:
        """Return NaN for every metric, because only the head has the values. Local."""
        return dict.fromkeys(self._metrics, math.nan)

    def state(self) -> Iterator[tuple[str, Any]]:
        """Yield nothing, because the head has the worker's state."""
        yield from ()

    def load(self, state: State) -> None:
        """Do nothing, because the head loads the worker's state."""
