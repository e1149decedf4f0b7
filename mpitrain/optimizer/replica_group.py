"""A worker that is a group of ranks, which hold one model between them.

    rank      0   1   2 | 3   4   5 | ...       groups of k = 3 neighbours
    worker        0     |     1     | ...       what the methods call p counts workers
    head      0           3           ...       the only rank of a group that the method knows

One step of a group:

    1. g <- the mean of its members' gradients     an all-reduce among them
    2. the head makes the worker's step            exchange and local update, with that gradient
    3. x <- the head's x                           the others read it where it lies

So a group of k ranks with mini-batches of b is, to rounding, one rank with a mini-batch of k*b, whatever the method:
only the head has the method's state and the local optimizer's, and the others have the parameters that it leaves.

A group is data-parallel: every member has the whole model and computes with samples of its own. A model that is split
over the members has its place here: step 1 would gather what each has of the gradient, step 3 hand out the parameters,
and nothing above or below would change.

The other members can ask for what the method evaluates at any time, as the head can: it has a thread that answers, so
that neither has to wait until the other has come to a certain point of its program.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from mpitrain import kernels
from mpitrain.collectives.communicator import Vector
from mpitrain.collectives.world.background import threads_may_call_mpi
from mpitrain.errors import RankFailed, UsageError

if TYPE_CHECKING:
    from mpitrain.collectives.mpi import MPICommunicator
    from mpitrain.collectives.world.world import World

ASK, ANSWER = 23, 24
"""Tags of a member's question and of the head's answer."""

REQUEST_POLL_SECONDS = 2e-3
"""How long a question lies before the head sees it."""


def check_replica_size(replica_size: int, world: World) -> None:
    """Refuse groups that the ranks cannot be divided into.

    Raises:
        UsageError: With what would be right.
    """
    if replica_size < 1 or world.size % replica_size:
        raise UsageError(
            f"replica_size must divide the number of ranks, which is {world.size}, not be {replica_size}: "
            "so many ranks are one worker"
        )


class ReplicaGroup:
    """The ranks that are one worker, as one of them sees them. Collective over all ranks to make.

    Args:
        comm: Of all ranks.
        size: Ranks of a worker, k; 1: each rank is a worker, and everything here costs nothing.
        n: Elements of the model's vector.
        dtype: Of the elements.
        node_shared: The workers of a node hold one ``x`` between them; only where each rank is a worker.

    Attributes:
        workers: The communicator of the heads, which the method gets; None on other ranks.
        world: The ranks of this group; None where each rank is a worker.
        x, g: (n,) vectors in which this rank's parameters and gradients live.
        busy: Held while the worker changes; who asks the worker something waits for it.
    """

    def __init__(self, comm: MPICommunicator, size: int, n: int, dtype: Any, *, node_shared: bool = False) -> None:
        self.busy = threading.Lock()
        self.workers: MPICommunicator | None = comm
        self.world: World | None = None
        self.x: Vector
        self.g: Vector
        self._consensus_server: ConsensusServer | None = None
        if size > 1:
            is_head = comm.rank % size == 0
            heads = comm.split(0 if is_head else 1)
            self.workers = heads if is_head else None
            self._group = comm.split(comm.rank // size)
            self.world = self._group.world
            # What the members exchange. The others' parameters and gradients live here; the head's must be where the
            # other heads can reach them.
            self._shared_x, self._shared_g = self._group.vector(n, dtype), self._group.vector(n, dtype)
            self.x, self.g = self._shared_x, self._shared_g
            kernels.copy(np.empty(0, dtype), np.empty(0, dtype))  # compiled before the first step
        if self.workers is not None:
            self.x = self.workers.node_vector(n, dtype) if node_shared else self.workers.vector(n, dtype)
            self.g = self.workers.vector(n, dtype)

    def average(self, loss: float | None) -> float | None:
        """Make every member's gradient the mean over the group. Collective over the group.

        Args:
            loss: Of this rank's mini-batch, where the method asks for it; on all members or on none.

        Returns:
            The mean of the members' losses: that of the mini-batch that the group is one worker with.
        """
        if self.world is None:
            return loss
        if self.workers is not None:
            kernels.copy(self._shared_g.local, self.g.local)
        self._group.allreduce(self._shared_g, mean=True)
        if self.workers is not None:
            kernels.copy(self.g.local, self._shared_g.local)
        return None if loss is None else float(self._group.gather([loss]).mean())

    def share(self) -> None:
        """Let every member have the head's parameters. Collective over the group."""
        if self.world is None:
            return
        if self.workers is not None:
            # The members have read what it held: they have been in an all-reduce since.
            kernels.copy(self._shared_x.local, self.x.local)
            self._shared_x.sync()
        self._group.barrier()
        if self.workers is None:
            mine = self.x.local
            self._group.read(self._shared_x, 0, lambda x: kernels.copy(mine, x))
            self._group.statistics.bytes_sent += mine.nbytes

    def serve_consensus(self, answer: Callable[[Any], None]) -> None:
        """Answer the other members from now on. Local; the head only.

        Args:
            answer: Writes what the method evaluates to a vector (n,).
        """
        if self.world is not None and threads_may_call_mpi():
            self._consensus_server = ConsensusServer(self.world, np.empty_like(self.x.local), answer, self.busy)

    def ask(self, out: np.ndarray) -> None:
        """Write what the method evaluates to ``out`` (n,), as the head sees it. Local; not for the head.

        Raises:
            UsageError: When this MPI lets only one thread of a rank call it.
        """
        assert self.world is not None
        if not threads_may_call_mpi():
            raise UsageError(
                "this MPI lets one thread of a rank call it (mpitrain info): "
                "ask the first rank of a replica group for the consensus"
            )
        self.world.comm.Send(np.empty(0, np.uint8), 0, ASK)
        self.world.comm.Recv(out.view(np.uint8), 0, ANSWER)

    def close(self) -> None:
        """Answer no more, and let go of the vectors. Local; when no member can ask any more."""
        if self._consensus_server is not None:
            self._consensus_server.stop()
            self._consensus_server = None
        del self.x, self.g


class ConsensusServer:
    """Answers the members of a group, in a thread of its head.

    Args:
        world: The group.
        vector: (n,) what is sent.
        answer: Fills it.
        busy: Held while it does.
    """

    def __init__(self, world: World, vector: np.ndarray, answer: Callable[[Any], None], busy: threading.Lock) -> None:
        self._world, self._comm, self._members = world, world.comm, range(1, world.size)
        self._vector, self._answer, self._busy = vector, answer, busy
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="replica-desk", daemon=True)
        self._thread.start()
        atexit.register(self.stop)  # runs before MPI is finalized

    def _run(self) -> None:
        with suppress(RankFailed), self._world.translated_errors():  # the thread that makes the steps will say so
            while not self._stopped.wait(REQUEST_POLL_SECONDS):
                for member in self._members:
                    self._serve(member)

    def _serve(self, member: int) -> None:
        question = np.empty(0, np.uint8)
        if self._comm.Iprobe(member, ASK):
            self._comm.Recv(question, member, ASK)
            with self._busy:
                self._answer(self._vector)
            self._comm.Send(self._vector.view(np.uint8), member, ANSWER)

    def stop(self) -> None:
        """End the thread. Local; safe to call again."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
        atexit.unregister(self.stop)
