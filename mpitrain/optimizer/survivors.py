"""The living ranks of a synchronous method that continues after a death, and their communicator.

The vectors of parameters and gradients stay where they are. After a death, the survivors form a new world and allocate
everything else anew: the communicator, the barrier of the node and the memory of the method. The old memory, of which
the dead rank has a part, is never freed (``collectives.rma.window.Window.free``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from mpitrain.algorithms.base import surviving
from mpitrain.algorithms.base.method import Method
from mpitrain.algorithms.base.replica import Replica
from mpitrain.collectives.mpi import MPICommunicator
from mpitrain.collectives.rma.window import Window
from mpitrain.collectives.world.ranks import revoke_all
from mpitrain.collectives.world.world import World, part_of, revoke
from mpitrain.errors import RankFailed, UsageError

T = TypeVar("T")


def check_on_failure(
    on_failure: str, method: Method, world: World, *, replica_size: int = 1, has_average: bool = False
) -> None:
    """Check that the ranks can continue after a death if ``on_failure`` says so. Local.

    Raises:
        UsageError: They cannot; the message says why. All ranks raise it.
    """
    surviving.check_on_failure(on_failure, method, replica_size=replica_size, has_average=has_average)
    if on_failure == "stop" or not method.is_synchronous or world.size == 1:
        return
    if not world.survives_failures or world.gpu is not None:
        raise UsageError(
            "on_failure=continue needs ranks that survive the death of another: Open MPI 5 with mpirun --with-ft ulfm, "
            "and vectors in host memory; otherwise use stop",
            on_all_ranks=True,
        )
    if world.n_nodes > 1 and world.service is None:
        raise UsageError(
            "on_failure=continue needs messages between the nodes, but MPITRAIN_BETWEEN_NODES=windows is set: remove "
            "it, or use stop",
            on_all_ranks=True,
        )
    try:
        method.check_size(world.size - 1)
    except UsageError as error:
        raise UsageError(f"on_failure=continue is not possible here: {error}; use stop", on_all_ranks=True) from None


def prepare_for_deaths(
    on_failure: str, method: Method, world: World, *, replica_size: int = 1, has_average: bool = False
) -> None:
    """Check that the ranks can do what ``on_failure`` says, and let a death end all ranks if none can continue. Local.

    Without this, a rank could wait for ever for a rank of another node that has not learned of the death.

    Raises:
        UsageError: See ``check_on_failure``.
    """
    check_on_failure(on_failure, method, world, replica_size=replica_size, has_average=has_average)
    waits = method.is_synchronous and on_failure == "stop"
    if world.n_nodes > 1 and (waits or replica_size > 1):
        world.fault_tolerance.leave_no_survivors()


class Survivors:
    """The living ranks of a world, which form a smaller group after a death; a ``surviving.Group``.

    Args:
        comm: The communicator of all ranks of the run.
        replica: The replica of this rank, with vectors of ``comm``.
        wire: The wire format.

    Attributes:
        members: The rank in ``comm`` of each living rank, in ascending order.
    """

    def __init__(self, comm: MPICommunicator, replica: Replica, wire: str) -> None:
        self._world, self._statistics, self._replica, self._wire = comm.world, comm.statistics, replica, wire
        assert isinstance(replica.x, Window)
        assert isinstance(replica.g, Window)
        self._x, self._g = replica.x, replica.g
        self.members: Sequence[int] = range(comm.size)
        self._part: World = comm.world
        self._comm: MPICommunicator | None = None
        self._abandoned: list[Any] = []  # with memory that stays until the process ends

    def start(self, make: Callable[[Replica], T]) -> T:
        """Form the first group, of all ranks. Collective."""
        return self._form(lambda replica, _: make(replica))

    def agree(self, succeeded: bool) -> bool:
        """Return whether all ranks have succeeded and none has died, with the same result on all. Collective."""
        if not succeeded:
            revoke(self._part)  # between nodes, a rank may wait for this one without knowing the dead one
        with self._part.waiting("an agreement"):
            return self._part.fault_tolerance.agree(succeeded)

    def comes_from_death(self, error: Exception) -> bool:
        """Return whether the death of a rank has caused an error. Local."""
        return self._part.fault_tolerance.comes_from_death(error)

    def shrink(self, make: Callable[[Replica, Sequence[int]], T]) -> T:
        """Form a group of the survivors, and return what ``make`` returns; see ``surviving.Group``. Collective."""
        revoke(self._part)
        self._abandoned.append((self._part, self._comm))
        self._world.barrier()  # the communicator shrinks
        return self._form(make)

    def _form(self, make: Callable[[Replica, Sequence[int]], T]) -> T:
        before = self.members

        def form(comm: Any) -> tuple[World, MPICommunicator, list[int], T]:
            own = comm.Dup()
            try:
                part = part_of(self._world, own, repeats=False)
            except Exception:
                revoke_all(own)
                raise
            try:
                members = [self._world.members.index(member) for member in part.members]
                workers = MPICommunicator(part, self._statistics, wire=self._wire)
                x, g = workers.adopt(self._x), workers.adopt(self._g)
                replica = dataclasses.replace(self._replica, comm=workers, x=x, g=g)
                made = make(replica, [before.index(member) for member in members])
                part.barrier()
            except Exception:
                revoke(part)
                raise
            return part, workers, members, made

        self._part, self._comm, self.members, made = self._world.run_on_survivors(form, "the survivors")
        return made

    def close(self) -> None:
        """Free the memory of the present group, unless one of its ranks has died. Collective."""
        if self._comm is None or not self.agree(True):
            return
        try:
            self._comm.free()
            self._part.free()
        except RankFailed:
            self._abandoned.append((self._part, self._comm))
