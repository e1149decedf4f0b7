"""Checkpoints: one folder for each, with one HDF5 file for each rank.

    RUN/checkpoints/step-00000100/rank-00000.h5, rank-00001.h5, ..., checksums.json

Every rank writes its part into a hidden folder that no reader considers. Once all parts are written and synced, rank 0
adds their checksums (CRC-32) and renames the folder, which is atomic: a crash at any moment leaves the previous
checkpoint as it was.

The newest two checkpoints are kept. HDF5 may crash or hang on a damaged file, so a part whose checksum is wrong, as a
disk or a lost node may leave it, is not opened, and all ranks load the previous checkpoint instead. Writing needs room
for one checkpoint more than are kept; without that room the unfinished one is removed and the previous ones stay.

``hdf5_tree`` says what a state may contain. A loaded state equals the saved one.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import h5py

from mpitrain.collectives.world.world import World
from mpitrain.errors import UsageError, reason
from mpitrain.records import hdf5_tree

KEEP = 2
CHECKSUMS = "checksums.json"
"""The file of a checkpoint that has the CRC-32 of each rank's file, by file name. Early versions wrote none."""

NO_ROOM = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))
_NAME = re.compile(r"step-(\d+)(\.replaced)?")
_BLOCK_BYTES = 2**22


class _Part(NamedTuple):
    """The outcome of writing one rank's part."""

    file_name: str
    checksum: int
    n_bytes: int  # of its arrays
    problem: str  # empty if it was written


def save(folder: Path, step: int, state: dict[str, Any], world: World) -> Path:
    """Write a checkpoint. Collective.

    Args:
        folder: The folder of all checkpoints of the run, ``RUN/checkpoints``.
        step: The number in the checkpoint's name; a larger one is newer.
        state: This rank's part.
        world: The ranks.

    Returns:
        The folder of the complete checkpoint.

    Raises:
        UsageError: The checkpoint cannot be written, for lack of room or another reason; the same on all ranks.
    """
    target = folder / f"step-{step:08d}"
    partial = folder / f".{target.name}.partial"
    problem = _problem_of(lambda: _make_partial(folder, partial)) if world.rank == 0 else ""
    world.barrier()
    part = _write_part(partial / _file_name(world.rank), step, state, world, problem)
    parts = world.run_on_survivors(lambda comm: comm.allgather(part))
    problem = next((part.problem for part in parts if part.problem), "")
    if world.rank == 0 and not problem:
        checksums = {part.file_name: part.checksum for part in parts}
        problem = _problem_of(lambda: _publish(partial, target, checksums, world))
    problem = world.run_on_survivors(lambda comm: comm.bcast(problem))
    if problem:
        if world.rank == 0:
            _remove_partial(folder)
        raise UsageError(_cannot_write(folder, problem, sum(part.n_bytes for part in parts)))
    return target


def _make_partial(folder: Path, partial: Path) -> None:
    """Make the folder that all ranks write into, and remove those of interrupted saves. Local; rank 0 only."""
    _remove_partial(folder)
    partial.mkdir(parents=True)


def _write_part(file: Path, step: int, state: dict[str, Any], world: World, problem: str) -> _Part:
    """Write this rank's file, unless there is a problem already. Local."""
    checksum = 0
    if not problem:
        try:
            _write_file(file, {"ranks": world.size, "step": step, "state": state})
            checksum = _checksum(file)
        except (OSError, RuntimeError) as error:  # HDF5 raises RuntimeError when it closes a file it could not write
            problem = reason(error)
    return _Part(file.name, checksum, hdf5_tree.n_array_bytes(state), problem)


def _publish(partial: Path, target: Path, checksums: dict[str, int], world: World) -> None:
    """Turn the parts of all ranks into a checkpoint and remove the oldest one. Local; rank 0 only.

    A resumed run may write a checkpoint of the same step again. The one that is there is complete under another name
    until the new one has taken its place.
    """
    _supply_missing(partial, checksums, world)
    (partial / CHECKSUMS).write_text(json.dumps(checksums, indent=1))
    _sync(partial / CHECKSUMS)
    _sync(partial)
    replaced = target.with_name(f"{target.name}.replaced")
    if target.exists():
        if replaced.exists():
            _remove(replaced)
        target.rename(replaced)
    partial.rename(target)
    _sync(target.parent)
    if replaced.exists():
        _remove(replaced)
    for old in _complete(target.parent)[:-KEEP]:
        _remove(old)


def _supply_missing(partial: Path, checksums: dict[str, int], world: World) -> None:
    """Copy, for each rank that has died, the part of the next rank alive, from which it starts when resumed.

    Local; rank 0 only.
    """
    for rank in world.dead:
        followers = (other % world.size for other in range(rank + 1, rank + world.size))
        source = next(other for other in followers if other not in world.dead)
        shutil.copyfile(partial / _file_name(source), partial / _file_name(rank))
        checksums[_file_name(rank)] = checksums[_file_name(source)]
        _sync(partial / _file_name(rank))


def _remove_partial(folder: Path) -> None:
    """Remove unfinished checkpoints, to free disk space for the next one. Local; rank 0 only."""
    for partial in folder.glob(".step-*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def _remove(path: Path) -> None:
    """Remove a checkpoint; a crash leaves it complete or unfinished. Local; rank 0 only."""
    unfinished = path.rename(path.with_name(f".{path.name}.old.partial"))
    shutil.rmtree(unfinished, ignore_errors=True)


def _problem_of(action: Callable[[], None]) -> str:
    """Return why the file system refused an action, or an empty string. Local."""
    try:
        action()
    except OSError as error:
        return reason(error)
    return ""


def _cannot_write(folder: Path, problem: str, n_bytes: int) -> str:
    newest = latest(folder)
    return (
        f"{'no room for' if problem in NO_ROOM else 'cannot write'} a checkpoint ({n_bytes / 2**20:.0f} MiB) in "
        f"{folder} ({problem}): the newest is {newest.name if newest else 'none'}; {KEEP + 1} of them need room"
    )


def latest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint in ``RUN/checkpoints``, or None. Local."""
    complete = _complete(folder)
    return complete[-1] if complete else None


def load_newest(folder: Path, world: World) -> dict[str, Any]:
    """Return this rank's part of the newest checkpoint that all ranks can read. Collective.

    Rank 0 lists the checkpoints, because ranks may see different ones on a slow network file system.

    Raises:
        UsageError: There is no checkpoint, or another number of ranks wrote it; the same on all ranks.
    """
    if world.rank == 0:
        _remove_partial(folder)
    mine = [(path.name, _n_parts(path)) for path in reversed(_complete(folder))] if world.rank == 0 else []
    found: list[tuple[str, int]] = world.run_on_survivors(lambda comm: comm.bcast(mine))
    if not found:
        raise UsageError(
            f"{folder.parent} has no complete checkpoint: start it again, without --resume and into a new --out"
        )
    problem = ""
    for name, n_parts in found:
        if problem and world.rank == 0:
            print(f"mpitrain: warning: {problem}: trying {name} instead", file=sys.stderr, flush=True)
        _require_ranks(folder / name, n_parts, world)
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
        step, state = _load_part(path, world)
    except _Damaged as error:
        problem = str(error)
    part = step, problem
    parts = world.run_on_survivors(lambda comm: comm.allgather(part))
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
        UsageError: Another number of ranks wrote the checkpoint, or this rank's part cannot be read.
    """
    _require_ranks(path, _n_parts(path), world)
    try:
        return _load_part(path, world)[1]
    except _Damaged as error:
        raise UsageError(f"{error}: delete {path} to resume from the previous one") from error


class _Damaged(UsageError):
    """A part of a checkpoint that cannot be read."""


def _n_parts(path: Path) -> int:
    """Return the number of ranks that wrote a checkpoint: the number of its checksums, or else of its files."""
    try:
        n_files = len(json.loads((path / CHECKSUMS).read_text()))
    except (OSError, ValueError):
        n_files = 0
    return n_files or len(list(path.glob("rank-*.h5")))


def _require_ranks(path: Path, n_parts: int, world: World) -> None:
    if n_parts != world.size:
        raise UsageError(f"{path} was written by {n_parts} ranks: resume with {n_parts} ranks, not {world.size}")


def _load_part(path: Path, world: World) -> tuple[int, dict[str, Any]]:
    """Return the step and the state that this rank's file holds. Local.

    Raises:
        _Damaged: The file cannot be read, or is not what was written.
    """
    file = path / _file_name(world.rank)
    try:
        manifest = path / CHECKSUMS
        if manifest.exists() and json.loads(manifest.read_text())[file.name] != _checksum(file):
            raise ValueError("its checksum is wrong")
        with h5py.File(file, "r", locking=False) as root:
            content = hdf5_tree.read_tree(root)
        return content["step"], content["state"]
    except Exception as error:  # a damaged file makes HDF5 raise errors of any type
        raise _Damaged(f"{file} is no readable checkpoint ({type(error).__name__}: {error})") from error


def _file_name(rank: int) -> str:
    return f"rank-{rank:05d}.h5"


def _complete(folder: Path) -> list[Path]:
    """Return the complete checkpoints, the oldest first; a replaced one comes before the one that replaces it."""
    found = [(match, path) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, key=lambda pair: (int(pair[0][1]), pair[0][2] is None))]


def _write_file(path: Path, content: dict[str, Any]) -> None:
    with h5py.File(path, "w", locking=False) as root:
        hdf5_tree.write_tree(root, content)
        root.flush()
    _sync(path)


def _checksum(path: Path) -> int:
    """Return the CRC-32 of a file."""
    value, block = 0, memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        while n := file.readinto(block):
            value = zlib.crc32(block[:n], value)
    return value


def _sync(path: Path) -> None:
    """Write a file or the entries of a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
