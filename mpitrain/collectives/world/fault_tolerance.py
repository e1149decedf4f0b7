"""The communicator of a world, and the ranks that survive when one dies.

By MPI's own rule the death of one rank ends all. Open MPI under ``mpirun --with-ft ulfm`` notifies the others instead
(User-Level Failure Mitigation: ``MPIX_Comm_get_failed``, ``_revoke``, ``_agree``, ``_shrink``;
https://fault-tolerance.org). This module builds on that:

- A thread of each rank polls for failures. MPI detects a failure only inside MPI calls, and a rank makes none during
  one-sided exchanges through the memory of its node or during a long computation.
- The memory that a dead rank shared with its node stays, with its part of the center and its past exchanges. Its locks
  are taken over (``collectives.rma.locks``). A method in which no rank waits for another one therefore continues.
- A rank that waits for a dead rank stops waiting and raises ``RankFailed``.
- Collective work at the edges of a run (a barrier, a checkpoint, the result) is done by the survivors
  (``run_on_survivors``).
- The memory of a dead rank is served to other nodes by the next living rank of its node (``World.server_of``). If all
  ranks of a node are dead, its memory is lost, and shared vectors continue elsewhere (``rma.heirs``).
- Memory in MPI windows between nodes, or of a GPU, disappears with its rank, and others may wait for it in calls that
  never return. If a run has vectors in such memory, the thread ends all ranks, with a line that gives the reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar, cast

import numpy as np

from mpitrain.collectives.world.ending import end_all
from mpitrain.collectives.world.failure_detector import (
    FAILURE_POLL_SECONDS,
    NOBODY,
    FailureDetector,
    names_of,
    ulfm_available,
    ulfm_requested,
)
from mpitrain.collectives.world.ulfm_agreement import agreed
from mpitrain.errors import OUTPUT_SECONDS, TURN_SECONDS, RankFailed

T = TypeVar("T")

DETECTION_SECONDS, LONGEST_DETECTION_SECONDS = 1.0, 20.0
"""Longest time from an error, or from an error of MPI, to the detection of the death that caused it."""


def wait_to_be_ended() -> None:
    """Wait after an MPI error, so that a rank that detects a death can print it and end all ranks. Local."""
    if ulfm_requested():
        time.sleep(DETECTION_SECONDS + OUTPUT_SECONDS)


def of_part(dead: frozenset[int], members: Sequence[int]) -> frozenset[int]:
    """Translate dead ranks of a world to their numbers in a part of the world. Local.

    Args:
        dead: The dead ranks of the world.
        members: The rank in the world of each rank of the part.
    """
    return frozenset(rank for rank, member in enumerate(members) if member in dead) if dead else dead


def require_all(dead: Collection[int]) -> None:
    """Raise if a rank is dead. Local.

    Raises:
        RankFailed: A rank is dead; the message names a remedy.
    """
    if dead:
        raise RankFailed(
            f"{names_of(dead)} died, and the ranks that wait for it cannot continue: resume from the newest checkpoint"
        )


class FaultTolerance:
    """A communicator and its behaviour after the death of a rank: all ranks end. Subclasses continue with survivors.

    Args:
        comm: The ranks.

    Attributes:
        comm: The communicator of the ranks; after a death, that of the survivors.
        rank, size: The rank of this process and the number of ranks, including dead ones.
        dead: The ranks known to have died.
        survives_failures: Whether the other ranks continue after a death and are notified.
        dead_words: (ranks,) int64, 1 for each rank known to have died, for compiled code.
    """

    survives_failures = False

    def __init__(self, comm: Any) -> None:
        self.comm = comm
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()
        self.dead_words = np.zeros(self.size, np.int64)

    @property
    def after_death(self) -> str:
        """The description of what happens after a death, for messages. Local."""
        return "ends all ranks"

    def leave_no_survivors(self) -> None:
        """Let a death end all ranks from now on, because none can continue without all others. Local."""

    @property
    def dead(self) -> frozenset[int]:
        """The ranks known to have died. Local."""
        return NOBODY

    @property
    def is_whole(self) -> bool:
        """Whether no rank had died at the last ``run_on_survivors``; the same on all ranks. Local."""
        return bool(self.comm.Get_size() == self.size)

    @property
    def probed_comm(self) -> Any:
        """The communicator on which a call to ``Iprobe`` lets MPI make progress. Local."""
        return self.comm

    def poll(self) -> None:
        """Update ``dead`` at once, before the thread polls again. Local."""

    def require_all(self) -> None:
        """Raise an error if a rank is dead. Local.

        Raises:
            RankFailed: A rank is dead.
        """

    def run_on_survivors(self, collective: Callable[[Any], T]) -> T:
        """Return ``collective(comm)``, called on all survivors. Collective over them.

        Args:
            collective: Called with the communicator of the survivors. Their ranks in this communicator change after a
                death. If a rank dies during the call, all survivors call ``collective`` again.
        """
        return collective(self.comm)

    @contextmanager
    def translated_errors(self) -> Iterator[None]:
        """Raise ``RankFailed`` inside the context instead of an MPI error that a dead rank has caused. Local."""
        yield

    def part(self, comm: Any, *, repeats: bool = True) -> FaultTolerance:
        """Return the fault tolerance of a subset of these ranks. Collective over the subset.

        Args:
            comm: The communicator of the subset.
            repeats: Whether ``run_on_survivors`` repeats a collective in which a rank has died. Otherwise it raises
                ``RankFailed``, and the subset never shrinks: its survivors form a new subset.
        """
        return FaultTolerance(comm)

    def agree(self, succeeded: bool) -> bool:
        """Return whether all ranks have succeeded and none has died, with the same result on all. Collective.

        Args:
            succeeded: Whether this rank has succeeded.
        """
        return succeeded

    def comes_from_death(self, error: Exception) -> bool:
        """Return whether the death of a rank has caused an error. Local; it may wait for the failure detector."""
        return False

    def abort(self, code: int) -> None:
        """End all ranks now, with this exit code. Local."""
        time.sleep(self.rank * TURN_SECONDS if self.dead else 0.0)
        end_all(self.comm, code)


class ULFMFaultTolerance(FaultTolerance):
    """A communicator that shrinks to the survivors when a rank dies.

    Args:
        comm: The ranks.
        detector: The failure detector of the run.
        members: The rank in the run of each of these ranks, if they are a part of it.
    """

    survives_failures = True

    def __init__(self, comm: Any, detector: FailureDetector, members: Sequence[int] | None = None) -> None:
        super().__init__(comm)
        self._detector, self._members = detector, members
        if members is None:
            self.dead_words = detector.dead_words

    @property
    def after_death(self) -> str:
        """The description of what happens after a death, for messages. Local."""
        if self._detector.leaves_no_survivors:
            return super().after_death
        return "is left behind by methods in which nobody waits; it ends the others"

    def leave_no_survivors(self) -> None:
        """Let a death end all ranks from now on, because none can continue without all others. Local."""
        self._detector.leaves_no_survivors = True

    @property
    def dead(self) -> frozenset[int]:
        """The ranks known to have died. Local."""
        dead = self._detector.dead
        return dead if self._members is None else of_part(dead, self._members)

    @property
    def probed_comm(self) -> Any:
        """A communicator without dead ranks, on which ``Iprobe`` lets MPI make progress. Local."""
        from mpi4py import MPI

        return MPI.COMM_SELF

    def poll(self) -> None:
        """Update ``dead`` at once, before the thread polls again. Local."""
        self._detector.poll()

    def require_all(self) -> None:
        """Raise an error if a rank is dead. Local.

        Raises:
            RankFailed: A rank is dead.
        """
        require_all([self._rank_in_run(rank) for rank in self.dead])

    def _rank_in_run(self, rank: int) -> int:
        return rank if self._members is None else self._members[rank]

    def run_on_survivors(self, collective: Callable[[Any], T]) -> T:
        """Return ``collective(comm)``, run by all survivors. Collective over them.

        A collective may succeed on some ranks and fail on others. The ranks therefore agree on the outcome. If it has
        failed on any rank, all ranks revoke the communicator, shrink it to the survivors and repeat the collective.

        Args:
            collective: Called with the communicator of the survivors. Their ranks in this communicator change after a
                death. If a rank dies during the call, all survivors call ``collective`` again.
        """
        from mpi4py import MPI

        while True:
            result: Any = None
            try:
                result, succeeded = collective(self.comm), True
            except Exception as error:  # a collective that is left half done may also deliver garbage
                if not self.comes_from_death(error):
                    raise
                succeeded = False
            try:
                all_succeeded = agreed(self.comm, succeeded)
            except MPI.Exception:  # on all ranks: one has died
                all_succeeded = False
            if all_succeeded:
                return cast(T, result)
            with suppress(MPI.Exception):  # on all ranks: one has died meanwhile, so this communicator fails again
                self.comm = self.comm.Shrink()
            self.poll()  # now all ranks know of the death

    @contextmanager
    def translated_errors(self) -> Iterator[None]:
        """Raise ``RankFailed`` inside the context instead of an MPI error that a dead rank has caused. Local."""
        from mpi4py import MPI

        try:
            yield
        except MPI.Exception as error:
            if self.comes_from_death(error):
                self.poll()
                self.require_all()
            raise

    def comes_from_death(self, error: Exception) -> bool:
        """Return whether the death of a rank has caused an error. Local; it may wait for the failure detector.

        The class of an error need not say so. A rank that learned of the death first has revoked the communicator.
        """
        from mpi4py import MPI

        classes = MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED
        if isinstance(error, MPI.Exception) and error.Get_error_class() in classes:
            return True
        n_known = self.size - self.comm.Get_size()  # when the communicator was made
        is_named = isinstance(error, MPI.Exception | RankFailed)
        deadline = time.monotonic() + (LONGEST_DETECTION_SECONDS if is_named else DETECTION_SECONDS)
        while len(self.dead) == n_known and not self.comm.Is_revoked() and time.monotonic() < deadline:
            time.sleep(FAILURE_POLL_SECONDS)
            self.poll()
        return len(self.dead) > n_known or bool(self.comm.Is_revoked())

    def part(self, comm: Any, *, repeats: bool = True) -> FaultTolerance:
        """Return the fault tolerance of a subset of these ranks. Collective over the subset.

        Args:
            comm, repeats: See ``FaultTolerance.part``.
        """
        kind = ULFMFaultTolerance if repeats else _UntilDeath
        return kind(comm, self._detector, comm.allgather(self._rank_in_run(self.rank)))

    def agree(self, succeeded: bool) -> bool:
        """Return whether all ranks have succeeded and none has died, with the same result on all. Collective.

        If this rank has not succeeded, it first revokes the communicator, so that no rank stays in a collective.

        Args:
            succeeded: Whether this rank has succeeded.
        """
        from mpi4py import MPI

        try:
            return agreed(self.comm, succeeded)
        except MPI.Exception:  # on all ranks: one has died
            return False


class _UntilDeath(ULFMFaultTolerance):
    """A communicator on which all collectives fail after a death, and which never shrinks."""

    def comes_from_death(self, error: Exception) -> bool:
        """Return whether the death of a rank has caused an error. Local; it may wait for the failure detector."""
        return isinstance(error, RankFailed) or super().comes_from_death(error)

    def run_on_survivors(self, collective: Callable[[Any], T]) -> T:
        """Return ``collective(comm)``. Collective over all ranks.

        Raises:
            RankFailed: A rank has died.
        """
        try:
            return collective(self.comm)
        except Exception as error:
            if not self.comes_from_death(error):
                raise
            self.comm.Revoke()  # others may wait in it
            raise RankFailed("a rank died during a collective operation") from error


def fault_tolerance_of(comm: Any, *, leaves_no_survivors: bool) -> FaultTolerance:
    """Return the fault tolerance that launcher and MPI offer to the ranks of a run. Local.

    Args:
        comm: The ranks.
        leaves_no_survivors: Whether a death ends all ranks, because none can continue without all others.

    Raises:
        UsageError: See ``ulfm_available``.
    """
    if comm.Get_size() > 1 and ulfm_available():
        return ULFMFaultTolerance(comm, FailureDetector(comm, leaves_no_survivors=leaves_no_survivors))
    return FaultTolerance(comm)
