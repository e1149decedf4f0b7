"""Checkpoints: one folder for each, with one HDF5 file for each rank.

    RUN/checkpoints/step-00000100/rank-00000.h5, rank-00001.h5, ...

Every rank writes its part into a hidden folder that no reader considers. Once all parts are written and synced, rank 0
renames the folder, which is atomic: a crash at any moment leaves the previous checkpoint as it was
(``checkpoint_writer``).

Each part ends in a checksum (``part``). If the checksum is missing or wrong, for example after a disk error or the loss
of a node, the part is not opened, and all ranks load the previous checkpoint instead.

``hdf5_tree`` says what a state may contain. A loaded state equals the saved one.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpitrain.collectives.world.survivor_collectives import broadcast
from mpitrain.collectives.world.world import World
from mpitrain.errors import UsageError, reason
from mpitrain.log import logger
from mpitrain.records import part

_NAME = re.compile(r"step-(\d+)(\.replaced)?")


def latest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint in ``RUN/checkpoints``, or None. Local."""
    found = complete(folder)
    return found[-1] if found else None


MOST_LOADED_BYTES = 2**28


class Parts(Sequence[dict[str, Any]]):
    """All parts of a checkpoint, each read from its file when it is used.

    Parts of at most 256 MiB in all are read once and stay in memory. Of larger ones, only the last stays.

    Args:
        path: The folder of the checkpoint.
        n: The number of its parts.
    """

    def __init__(self, path: Path, n: int) -> None:
        self.path, self._n = path, n
        self._loaded: dict[int, dict[str, Any]] = {}
        n_bytes = sum(file.stat().st_size for file in path.glob("rank-*.h5"))
        self._all_fit = n_bytes <= MOST_LOADED_BYTES

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]
        if not 0 <= index < self._n:
            raise IndexError(index)
        if index not in self._loaded:
            if not self._all_fit:
                self._loaded.clear()
            self._loaded[index] = _load_part(self.path, index)[1]
        return self._loaded[index]

    def check(self) -> str:
        """Return the reason why a part cannot be read; an empty text if all can be read. Local."""
        try:
            for rank in range(self._n):
                self[rank]
        except _Damaged as error:
            return str(error)
        return ""


def newest_parts(folder: Path) -> Parts:
    """Return all parts of the newest checkpoint that can be read. Local.

    Raises:
        UsageError: There is no checkpoint that can be read.
    """
    problem = f"{folder.parent} has no complete checkpoint"
    for path in reversed(complete(folder)):
        parts = Parts(path, _n_parts(path))
        if not (problem := parts.check()):
            return parts
    raise UsageError(problem)


def load_newest(folder: Path, world: World) -> dict[str, Any] | Parts:
    """Return this rank's part of the newest checkpoint that can be read. Collective.

    Rank 0 lists the checkpoints, because ranks may see different ones on a slow network file system.

    Returns:
        This rank's part. If a different number of ranks wrote the checkpoint, all parts.

    Raises:
        UsageError: There is no checkpoint that can be read. All ranks raise it.
    """
    if world.rank == 0:
        remove_partial(folder)
    mine = [(path.name, _n_parts(path)) for path in reversed(complete(folder))] if world.rank == 0 else []
    found: list[tuple[str, int]] = world.run_on_survivors(lambda comm: comm.bcast(mine))
    if not found:
        raise UsageError(
            f"{folder.parent} has no complete checkpoint: start it again, without --resume and into a new --out"
        )
    problem = ""
    for name, n_parts in found:
        if problem and world.rank == 0:
            logger.warning("%s: trying %s instead", problem, name)
        if n_parts != world.size:
            parts = Parts(folder / name, n_parts)
            if not (problem := broadcast(world, parts.check)):
                return parts
            continue
        state, problem = _load_on_survivors(folder / name, world)
        if state is not None:
            return state
    raise UsageError(f"{problem}: there is no other; start the run again, without --resume and into a new --out")


def _load_on_survivors(path: Path, world: World) -> tuple[dict[str, Any] | None, str]:
    """Return this rank's part of a checkpoint; or, on all ranks, None and why one of them cannot read it. Collective.

    Raises:
        UsageError: Ranks see different checkpoints under this name; the same on all ranks.
    """
    step, state, problem = None, None, ""
    try:
        step, state = _load_part(path, world.rank)
    except _Damaged as error:
        problem = str(error)
    found = step, problem
    parts = world.run_on_survivors(lambda comm: comm.allgather(found))
    if problems := [text for _, text in parts if text]:
        return None, problems[0]
    if len(steps := sorted({number for number, _ in parts})) > 1:
        raise UsageError(
            f"{path} is not the same for all ranks, but of steps {', '.join(map(str, steps))}: the network file system "
            "may be slow to show new files; try again in a minute"
        )
    return state, ""


def load(path: Path, world: World) -> dict[str, Any]:
    """Return this rank's part of a checkpoint. Local.

    Raises:
        UsageError: A different number of ranks wrote the checkpoint, or this rank's part cannot be read.
    """
    if (n_parts := _n_parts(path)) != world.size:
        raise UsageError(f"{path} was written by {n_parts} ranks, not {world.size}")
    try:
        return _load_part(path, world.rank)[1]
    except _Damaged as error:
        raise UsageError(f"{error}: delete {path} to resume from the previous one") from error


class _Damaged(UsageError):
    """A part of a checkpoint that cannot be read."""


def _n_parts(path: Path) -> int:
    """Return the number of ranks that wrote a checkpoint, as one of its parts says, or else the number of its files."""
    files = sorted(path.glob("rank-*.h5"))
    for file in files:
        try:
            return part.read_seal(file).n_ranks
        except (OSError, ValueError):
            continue
    return len(files)


def _load_part(path: Path, rank: int) -> tuple[int, dict[str, Any]]:
    """Return the step and the state that a rank's file holds. Local.

    Raises:
        _Damaged: The file cannot be read, or is not what was written.
    """
    file = path / part.file_name(rank)
    try:
        seal, state = part.read(file, rank)
        return seal.step, state
    except (Exception, MemoryError) as error:  # what HDF5 reads may make it raise errors of any type
        raise _Damaged(f"{file} is no readable checkpoint ({type(error).__name__}: {reason(error)})") from error


def complete(folder: Path) -> list[Path]:
    """Return the complete checkpoints, the oldest first. One that is being replaced comes before its replacement."""
    found = [(match, path) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, key=lambda pair: (int(pair[0][1]), pair[0][2] is None))]


def remove_partial(folder: Path) -> None:
    """Remove unfinished checkpoints, to free disk space for the next one. Local; only one rank calls it."""
    for partial in folder.glob(".step-*.partial"):
        shutil.rmtree(partial, ignore_errors=True)
