"""Ranks that die while the others live.

By MPI's own rule the death of one rank ends all. Open MPI under ``mpirun --with-ft ulfm`` tells the others instead
(User-Level Failure Mitigation: ``MPIX_Comm_get_failed``, ``_revoke``, ``_agree``, ``_shrink``;
https://fault-tolerance.org), and this is what they make of it:

- A thread of each rank asks who has died. MPI learns of it only when it is called, and a rank in a loop of one-sided
  exchanges through the memory of its node, or in a long computation, does not call it.
- The memory that a dead rank shared with its node stays, with its part of the center and all that it had exchanged. Its
  locks are taken over (``collectives.rma.locks``). So a method in which nobody waits for anybody goes on.
- Whoever waits for a dead rank stops waiting and raises ``RankFailed``.
- What all ranks do together at the edges of a run (a barrier, a checkpoint, the result) is done by those that live
  (``run_on_survivors``).
- Memory of another node, or of a GPU, goes with the rank that had it, and others may wait for it in calls that do not
  return. Where vectors lie there, the thread ends all ranks, with a line that says why.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

from mpitrain.collectives.world.background import threads_may_call_mpi
from mpitrain.errors import OUTPUT_SECONDS, RankFailed, UsageError

if TYPE_CHECKING:
    from mpitrain.collectives.world.world import World

T = TypeVar("T")

FAILURE_POLL_SECONDS = 0.02

DETECTION_SECONDS = 1.0
"""How long an error of MPI may be there before the death that it comes of is known."""

SWITCH = "OMPI_MCA_mpi_ft_enable"
"""Environment: what ``mpirun --with-ft ulfm`` sets for its ranks."""

FINALIZE_WITHOUT_BARRIER = "ompi_async_mpi_finalize"
"""Of Open MPI's library: the flag behind its parameter of that name."""

NOBODY: frozenset[int] = frozenset()


def ulfm_requested() -> bool:
    """Whether the launcher lets ranks outlive one that dies. Local; MPI need not have been started."""
    return os.environ.get(SWITCH, "").lower() in ("1", "true", "yes")


def ulfm_available() -> bool:
    """Whether ranks outlive one that dies, and hear of it: the launcher and this MPI see to it. Local.

    If so, they do not wait for it at the end either: the launcher's barrier in MPI_Finalize, which the dead may never
    come to, is left out.

    Raises:
        UsageError: They would outlive it, but this MPI lets one thread only call it, and nobody would hear; or it has
            no way to leave that barrier out.
    """
    from mpi4py import MPI

    if not ulfm_requested() or MPI.get_vendor()[0] != "Open MPI":
        return False
    if not threads_may_call_mpi():
        raise UsageError(
            "this MPI lets one thread of a rank call it (mpitrain info), and to outlive a rank that dies takes two: "
            "leave --with-ft ulfm out"
        )
    try:  # the parameter itself is read when MPI starts, which a script may have done before
        ctypes.c_bool.in_dll(ctypes.CDLL(MPI.__file__), FINALIZE_WITHOUT_BARRIER).value = True
    except ValueError as error:
        raise UsageError(
            f"this Open MPI's MPI_Finalize would wait for a rank that died ({error}): leave --with-ft ulfm out"
        ) from error
    return True


def wait_to_be_ended() -> None:
    """After an error of MPI: if it comes of a death, whoever hears of that ends all ranks, and says why. Local."""
    if ulfm_requested():
        time.sleep(DETECTION_SECONDS + OUTPUT_SECONDS)


def names_of(ranks: Collection[int]) -> str:
    """``rank 2``, or ``ranks 1, 3``."""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, sorted(ranks)))}"


def of_part(dead: frozenset[int], members: Sequence[int]) -> frozenset[int]:
    """The dead by their ranks in a part, whose ``members`` are given by their ranks in the whole. Local."""
    return frozenset(rank for rank, member in enumerate(members) if member in dead) if dead else dead


def require_all(dead: Collection[int]) -> None:
    """Raise if somebody is missing. Local.

    Raises:
        RankFailed: It says who, and what to do.
    """
    if dead:
        raise RankFailed(
            f"{names_of(dead)} died, and who waits for it cannot go on: start again from the newest checkpoint"
        )


class Failures:
    """Who has died. Local to create.

    Args:
        comm: The ranks.

    Attributes:
        dead: Those known to have died. It grows, by being replaced.
        leaves_no_survivors: Whether nobody can go on without all the others: whoever dies takes them along.
    """

    def __init__(self, comm: Any) -> None:
        self.dead = NOBODY
        self._comm, self._rank, self._size = comm, comm.Get_rank(), comm.Get_size()
        self.leaves_no_survivors = False
        self._stopped, self._polling = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._run, name="mpi-failures", daemon=True)
        self._thread.start()
        atexit.register(self.stop)  # runs before MPI is finalized

    def _run(self) -> None:
        while not self._stopped.wait(FAILURE_POLL_SECONDS):
            self.poll()

    def poll(self) -> None:
        """Ask MPI who has died, and tell the user, on one rank, who has died since the last look. Local."""
        from mpi4py import MPI

        MPI.COMM_SELF.Iprobe()  # MPI hears of it when it is called; on this communicator nobody dies
        with self._polling:
            failed, ours = self._comm.Get_failed(), self._comm.Get_group()
            dead = frozenset(MPI.Group.Translate_ranks(failed, range(failed.Get_size()), ours))
            failed.Free()
            ours.Free()
            news, self.dead = dead - self.dead, dead
        if news and self._rank == min(set(range(self._size)) - dead):
            self._tell(news)

    def _tell(self, news: frozenset[int]) -> None:
        text = f"{names_of(news)} of {self._size} died"
        if self.leaves_no_survivors:
            text += ", with memory that the others need: start again from the newest checkpoint"
        print(f"mpitrain: {text}", file=sys.stderr, flush=True)
        if self.leaves_no_survivors:
            self._stopped.wait(OUTPUT_SECONDS)
            self._comm.Abort(1)

    def stop(self) -> None:
        """End the thread. Local; safe to call again."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()


def run_on_survivors(world: World, collective: Callable[[Any], T]) -> T:
    """What all ranks of a world that live do together. Collective over them; those that die meanwhile are left out.

    Whether a collective has succeeded looks different from different ranks. They agree on it, and where it has not for
    one, all make it again.

    Args:
        world: Its ``comm`` becomes that of the living.
        collective: Called with it, and called again.
    """
    from mpi4py import MPI

    while True:
        result: Any = None
        try:
            result, well = collective(world.comm), True
        except MPI.Exception as error:
            if not _means_a_death(error, world):
                raise
            world.comm.Revoke()  # others may wait in it
            well = False
        try:
            agreed = bool(world.comm.Agree(well))
        except MPI.Exception:  # on all ranks: somebody has died
            agreed = False
        if agreed:
            return cast(T, result)
        world.comm = world.comm.Shrink()
        world.poll_failures()  # all know now


@contextmanager
def explained(world: World) -> Iterator[None]:
    """What MPI raises in here because a rank has died comes out as ``RankFailed``. Local."""
    from mpi4py import MPI

    try:
        yield
    except MPI.Exception as error:
        if world.survives_failures and _means_a_death(error, world):
            world.poll_failures()
            require_all(world.dead)
        raise


def _means_a_death(error: Any, world: World) -> bool:
    """Whether an error of MPI comes of a rank that died: not every collective says so in its class."""
    from mpi4py import MPI

    if error.Get_error_class() in (MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED):
        return True
    known = world.size - world.comm.Get_size()  # when the communicator was made
    deadline = time.monotonic() + DETECTION_SECONDS
    while len(world.dead) == known and time.monotonic() < deadline:
        time.sleep(FAILURE_POLL_SECONDS)
        world.poll_failures()
    return len(world.dead) > known
