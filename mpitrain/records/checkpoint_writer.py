"""The writer of checkpoints: a background thread of each rank, so that training waits for a snapshot only.

A snapshot is the rank's part as an HDF5 file in memory. The thread writes it into a hidden folder. The thread of the
lead, the first rank alive, then waits until the parts of all ranks are there, and renames the folder. If the lead dies
before that, the checkpoint is lost, and the next lead removes the hidden folder. Each rank has at most one snapshot in
memory, because the next checkpoint first waits until the previous one is written.

The threads of different ranks communicate through files only, without MPI. If a thread cannot write, it renames and
removes the hidden folder. This frees the disk space and informs the other threads. The rank of this thread raises the
error at the next ``check`` or ``wait``. Writing needs disk space for one checkpoint more than the number that is kept.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpitrain.collectives.world.world import World
from mpitrain.errors import RankFailed, UsageError
from mpitrain.records import KEEP, hdf5_tree, part
from mpitrain.records.checkpoint import complete, latest, remove_partial
from mpitrain.records.durable import sync

POLL_SECONDS = 0.02
MAX_POLL_SECONDS = 0.5
CLOSE_SECONDS = 10.0
"""The longest wait for a thread when a run ends by an error."""


class _Abandoned(Exception):
    """The end of a checkpoint that another rank could not write."""


class CheckpointWriter:
    """The background writer of one rank's parts of checkpoints.

    Args:
        folder: The folder of all checkpoints of the run, ``RUN/checkpoints``.
        world: The ranks.
        keep: The number of checkpoints to keep.
    """

    def __init__(self, folder: Path, world: World, keep: int = KEEP) -> None:
        self._folder, self._world, self._keep = folder, world, keep
        self._thread: threading.Thread | None = None
        self._target = folder
        self._members: Sequence[int] = range(world.size)
        self._n_bytes = 0  # of all ranks' arrays
        self._leads = False  # this rank renames the folder
        self._is_published = False
        self._errno = 0  # of this rank's failure; below 0: of another rank's
        self._has_written = threading.Event()  # this rank's part, or failed to
        self._is_cancelled = threading.Event()

    def start(self, step: int, state: dict[str, Any], members: Sequence[int] | None = None) -> None:
        """Take a snapshot and start to write it. Collective; call ``wait`` for the previous checkpoint first.

        Args:
            members: The ranks whose parts form the checkpoint, in ascending order; by default all. If another rank of
                them has died, its part is a copy of the part of the next one alive.
            step: The number in the name of the checkpoint; a larger one is newer. If the ranks differ, the lead's
                number is used.
            state: This rank's part. It may change as soon as the call returns.

        Raises:
            UsageError: Memory is insufficient, or the folder does not exist. All ranks raise it.
            TypeError: The state of this rank contains an object that cannot be saved.
        """
        assert self._thread is None
        self._members = range(self._world.size) if members is None else list(members)
        number, image = 0, memoryview(b"")
        try:
            image = part.encode(state)
        except (OSError, MemoryError) as error:
            number = _number(error)
        found = self._gather(number, hdf5_tree.n_array_bytes(state), step, first=lambda: self._make_partial(step))
        self._target, self._n_bytes = self._folder / f"step-{int(found[0, 2]):08d}", int(found[:, 1].sum())
        self._require_all(found[:, 0])
        self._errno, self._is_published = 0, False
        self._has_written.clear()
        self._is_cancelled.clear()
        arguments = (self._partial, image, int(found[0, 2]))
        self._thread = threading.Thread(target=self._run, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise if this rank could not write its part. Local.

        If another rank could not write its part, this rank learns of it in ``wait``.

        Raises:
            UsageError: This rank could not write its part. The checkpoint is abandoned.
        """
        if self._errno > 0:
            raise self._failure(self._errno)

    def wait(self) -> Path | None:
        """Wait until the checkpoint is complete. Collective.

        Returns:
            The folder of the checkpoint; None if no checkpoint was started, or if the lead has died before it was
            complete.

        Raises:
            UsageError: The checkpoint could not be written. All ranks raise it.
        """
        if self._thread is None:
            return None
        self._has_written.wait()
        self._require_all(self._gather(self._errno)[:, 0])
        self._thread.join()  # on the lead, which publishes
        self._thread = None
        found = self._gather(self._errno, self._is_published)
        self._require_all(found[:, 0])
        return self._target if found[:, 1].any() else None

    def close(self) -> None:
        """Abandon a checkpoint that is still being written, after an error. Local."""
        self._is_cancelled.set()
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)
            self._thread = None

    @property
    def _partial(self) -> Path:
        return self._target.with_name(f".{self._target.name}.partial")

    def _make_partial(self, step: int) -> None:
        """Make the folder that all ranks write into, and remove those of interrupted saves. Local; lead only."""
        remove_partial(self._folder)
        (self._folder / f".step-{step:08d}.partial").mkdir(parents=True)

    def _gather(self, number: int, *values: int, first: Callable[[], object] | None = None) -> np.ndarray:
        """Return some integers of each rank alive, (ranks, n) int64. Collective.

        Args:
            number: The first of them: of an error, 0 without one.
            values: The others.
            first: Called on the lead before. The next rank is the lead, and it is called there, if the lead dies.
        """

        def collective(comm: Any) -> np.ndarray:
            own = number
            if first is not None:
                self._leads = comm.Get_rank() == 0
                try:
                    if self._leads and not number:
                        first()
                except OSError as error:
                    own = _number(error)
            mine = np.array([own, *values], np.int64)
            found = np.empty((comm.Get_size(), mine.size), np.int64)
            comm.Allgather(mine, found)
            return found

        return self._world.run_on_survivors(collective, "a checkpoint")

    def _require_all(self, numbers: np.ndarray) -> None:
        """Raise the first failure of any rank on all ranks, and remove what has been written. Local."""
        failed = numbers[numbers > 0]
        if failed.size or (numbers < 0).any():
            self.close()
            if self._leads:
                remove_partial(self._folder)
            raise self._failure(int(failed[0]) if failed.size else errno.EIO)

    def _failure(self, number: int) -> UsageError:
        newest = latest(self._folder)
        what = "no room for" if number in (errno.ENOSPC, errno.EDQUOT) else "cannot write"
        return UsageError(
            f"{what} a checkpoint ({self._n_bytes / 2**20:.0f} MiB) in {self._folder} ({os.strerror(number)}): the "
            f"newest is {newest.name if newest else 'none'}; {self._keep + 1} of them need room"
        )

    def _run(self, partial: Path, image: memoryview, step: int) -> None:
        """Write this rank's part and, on rank 0, publish the checkpoint. In the thread."""
        world = self._world
        try:
            try:
                rank = self._members.index(world.rank)
                part.write(partial / part.file_name(rank), image, step=step, rank=rank, n_ranks=len(self._members))
            finally:
                del image
                if self._leads:
                    self._has_written.set()
            if self._leads:
                self._wait_for_parts(partial)
                _publish(partial, self._target, len(self._members), self._keep)
                self._is_published = True
        except (OSError, MemoryError, _Abandoned) as error:
            number = _number(error) if partial.exists() and not isinstance(error, _Abandoned) else -1
            _abandon(partial)
            self._errno = number
        finally:
            self._has_written.set()

    def _wait_for_parts(self, partial: Path) -> None:
        """Wait until every rank alive has written its part. In the thread of the lead.

        Raises:
            _Abandoned: Another rank has failed.
        """
        seconds = POLL_SECONDS
        while not self._is_cancelled.is_set():
            try:
                there = set(os.listdir(partial))  # also refreshes what a network file system has cached
            except FileNotFoundError:
                break
            dead = self._world.dead
            if all(part.file_name(k) in there for k, rank in enumerate(self._members) if rank not in dead):
                return
            time.sleep(seconds)
            seconds = min(2 * seconds, MAX_POLL_SECONDS)
        raise _Abandoned


def save(folder: Path, step: int, state: dict[str, Any], world: World, keep: int = KEEP) -> Path:
    """Write a checkpoint and wait until it is complete. Collective.

    Args:
        folder: The folder of all checkpoints of the run, ``RUN/checkpoints``.
        step: The number in the name of the checkpoint; a larger one is newer.
        state: This rank's part.
        world: The ranks.
        keep: The number of checkpoints to keep.

    Returns:
        The folder of the complete checkpoint.

    Raises:
        UsageError: The checkpoint cannot be written, for example because the disk is full. All ranks raise it.
    """
    writer = CheckpointWriter(folder, world, keep)
    writer.start(step, state)
    path = writer.wait()
    if path is None:
        raise RankFailed("the rank that was to complete the checkpoint died")
    return path


def _number(error: BaseException) -> int:
    """Return the number of an error of the system."""
    return errno.ENOMEM if isinstance(error, MemoryError) else getattr(error, "errno", None) or errno.EIO


def _abandon(partial: Path) -> None:
    """Remove an unfinished checkpoint. Renamed first: another rank cannot create a file in it any more. Local."""
    given_up = partial.with_name(f"{partial.name}.failed.partial")
    try:
        partial.rename(given_up)
    except OSError:
        given_up = partial
    shutil.rmtree(given_up, ignore_errors=True)


def _publish(partial: Path, target: Path, n_ranks: int, keep: int) -> None:
    """Turn the parts of all ranks into a checkpoint and remove the oldest ones. Local; lead only.

    A resumed run may write a checkpoint of the same step again. The one that is there is complete under another name
    until the new one has taken its place.
    """
    _supply_missing(partial, n_ranks)
    sync(partial)
    replaced = target.with_name(f"{target.name}.replaced")
    if target.exists():
        if replaced.exists():
            _remove(replaced)
        target.rename(replaced)
    partial.rename(target)
    sync(target.parent)
    if replaced.exists():
        _remove(replaced)
    for old in complete(target.parent)[:-keep]:
        _remove(old)


def _supply_missing(partial: Path, n_ranks: int) -> None:
    """Copy, for each rank that has died, the part of the next rank alive, from which it starts when resumed.

    Local; lead only.
    """
    files = [partial / part.file_name(rank) for rank in range(n_ranks)]
    written = {rank for rank, file in enumerate(files) if file.exists()}
    for rank in sorted(set(range(n_ranks)) - written):
        followers = (other % n_ranks for other in range(rank + 1, rank + n_ranks))
        part.copy(files[next(other for other in followers if other in written)], files[rank], rank)


def _remove(path: Path) -> None:
    """Remove a checkpoint; a crash leaves it complete or unfinished. Local; lead only."""
    unfinished = path.rename(path.with_name(f".{path.name}.old.partial"))
    shutil.rmtree(unfinished, ignore_errors=True)
