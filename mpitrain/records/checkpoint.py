"""Checkpoints: a folder for each, one HDF5 file for each rank in it.

    RUN/checkpoints/step-00000100/rank-00000.h5, rank-00001.h5, ..., checksums.json

Every rank writes its own part into a folder that nobody looks at; when all have written and synced theirs, rank 0 adds
their checksums (CRC-32) and renames it, which is atomic. A crash at any moment leaves the one before as it was. The
newest two are kept: a part whose checksum is wrong, as a disk or a lost node may leave it, is not opened (HDF5 may
crash or hang on it), and all ranks go on from the one before. While one is written there has to be room for one
more than are kept; where there is none, what has been written of it goes and those before stay.

A state is nested dicts and lists of arrays, tensors, numbers, strings and None; what is loaded equals what was saved.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import zlib
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np
import torch

from mpitrain.collectives.world.world import World
from mpitrain.errors import UsageError, reason

KEEP = 2
CHECKSUMS = "checksums.json"
"""In a checkpoint: the CRC-32 of each rank's file, by its name. Those of earlier versions have none."""

NO_ROOM = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))
_BLOCK_BYTES = 2**22
_KIND, _VALUE, _DTYPE = "kind", "value", "dtype"
_SIXTEEN_BIT = {"bfloat16": np.dtype(ml_dtypes.bfloat16)}


def save(folder: Path, step: int, state: dict[str, Any], world: World) -> Path:
    """Write a checkpoint. Collective.

    Args:
        folder: ``RUN/checkpoints``.
        step: Names the checkpoint; larger is newer.
        state: This rank's part.
        world: The ranks.

    Returns:
        The complete checkpoint.

    Raises:
        UsageError: It cannot be written, for want of room or otherwise; the same on all ranks.
    """
    target = folder / f"step-{step:08d}"
    partial = folder / f".{target.name}.partial"
    mine = partial / _file_name(world.rank)
    problem, checksum = "", 0
    if world.rank == 0:
        _remove_partial(folder)
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            problem = reason(error)
    world.barrier()
    if not problem:
        try:
            _write_file(mine, {"ranks": world.size, "step": step, "state": state})
            checksum = _checksum(mine)
        except (OSError, RuntimeError) as error:  # RuntimeError: HDF5 closes a file that it could not write
            problem = reason(error)
    part = mine.name, checksum, _n_bytes(state), problem
    parts = world.run_on_survivors(lambda comm: comm.allgather(part))
    problem = next((text for *_, text in parts if text), "")
    if world.rank == 0 and not problem:
        try:
            _publish(partial, target, {name: checksum for name, checksum, *_ in parts}, world)
        except OSError as error:
            problem = reason(error)
    known = problem
    problem = world.run_on_survivors(lambda comm: comm.bcast(known))
    if problem:
        if world.rank == 0:
            _remove_partial(folder)
        newest, mib = latest(folder), sum(n_bytes for _, _, n_bytes, _ in parts) / 2**20
        what = "no room for" if problem in NO_ROOM else "cannot write"
        raise UsageError(
            f"{what} a checkpoint ({mib:.0f} MiB) in {folder} ({problem}): the newest is "
            f"{newest.name if newest else 'none'}; {KEEP + 1} of them need room"
        )
    return target


def _publish(partial: Path, target: Path, checksums: dict[str, int], world: World) -> None:
    """Make a checkpoint of what all ranks have written, and remove the oldest. Local; rank 0 only."""
    _supply_missing(partial, checksums, world)
    (partial / CHECKSUMS).write_text(json.dumps(checksums, indent=1))
    _sync(partial / CHECKSUMS)
    _sync(partial)
    if target.exists():  # written before a resume: this one replaces it
        _remove(target)
    partial.rename(target)
    _sync(target.parent)
    for old in _complete(target.parent)[:-KEEP]:
        _remove(old)


def _remove_partial(folder: Path) -> None:
    """Remove what was not completed: it may be what there is no room for. Local; rank 0 only."""
    for left in folder.glob(".step-*.partial"):
        shutil.rmtree(left, ignore_errors=True)


def _remove(path: Path) -> None:
    """Remove a checkpoint; a crash leaves it whole or as one that was not completed. Local; rank 0 only."""
    gone = path.rename(path.with_name(f".{path.name}.old.partial"))
    shutil.rmtree(gone, ignore_errors=True)


def _n_bytes(state: Any) -> int:
    """Of the arrays in a state."""
    if isinstance(state, dict):
        return sum(map(_n_bytes, state.values()))
    if isinstance(state, (list, tuple)):
        return sum(map(_n_bytes, state))
    return int(state.nbytes) if isinstance(state, (torch.Tensor, np.ndarray)) else 0


def _supply_missing(folder: Path, checksums: dict[str, int], world: World) -> None:
    """Give each rank that has died a copy of the part of the next one that lives: when resumed it begins as its twin.

    Local; rank 0 only.
    """
    for rank in world.dead:
        after = (other % world.size for other in range(rank + 1, rank + world.size))
        heir = next(other for other in after if other not in world.dead)
        shutil.copyfile(folder / _file_name(heir), folder / _file_name(rank))
        checksums[_file_name(rank)] = checksums[_file_name(heir)]
        _sync(folder / _file_name(rank))


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint of ``RUN/checkpoints``, if there is one."""
    complete = _complete(folder)
    return complete[-1] if complete else None


def load_newest(folder: Path, world: World) -> dict[str, Any]:
    """This rank's part of the newest checkpoint of ``RUN/checkpoints`` that all ranks can read. Collective.

    Rank 0 says which ones there are: where a network file system is slow to show what is new, others may see others.

    Raises:
        UsageError: There is none, or it was written by another number of ranks; the same on all ranks.
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
    """This rank's part of a checkpoint; or None, on all ranks, and what is wrong with it. Collective.

    Raises:
        UsageError: Some ranks see another checkpoint under this name than others; the same on all ranks.
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
            f"{path} is not the same for all ranks, but of steps {', '.join(map(str, steps))}: a network file system "
            "may be slow to show what is new; try again in a minute"
        )
    return state, ""


def load(path: Path, world: World) -> dict[str, Any]:
    """This rank's part of a checkpoint. Local.

    Raises:
        UsageError: When it was written by another number of ranks, or cannot be read.
    """
    _require_ranks(path, _n_parts(path), world)
    try:
        return _load_part(path, world)[1]
    except _Damaged as error:
        raise UsageError(f"{error}: delete {path} to resume from the one before") from error


class _Damaged(UsageError):
    """A part of a checkpoint cannot be read."""


def _n_parts(path: Path) -> int:
    """How many ranks have written a checkpoint: as its checksums tell it, else as many as it has parts."""
    try:
        n_files = len(json.loads((path / CHECKSUMS).read_text()))
    except (OSError, ValueError):
        n_files = 0
    return n_files or len(list(path.glob("rank-*.h5")))


def _require_ranks(path: Path, n_parts: int, world: World) -> None:
    if n_parts != world.size:
        raise UsageError(f"{path} was written by {n_parts} ranks: resume with as many, not with {world.size}")


def _load_part(path: Path, world: World) -> tuple[int, dict[str, Any]]:
    """The number of the checkpoint, as this rank's file tells it, and this rank's state. Local.

    Raises:
        _Damaged: When it cannot be read, or is not what was written.
    """
    file = path / _file_name(world.rank)
    try:
        manifest = path / CHECKSUMS
        if manifest.exists() and json.loads(manifest.read_text())[file.name] != _checksum(file):
            raise ValueError("its checksum is wrong")
        with h5py.File(file, "r", locking=False) as root:
            content = _read(root)
        return content["step"], content["state"]
    except Exception as error:  # what a damaged file makes of HDF5 has no end
        raise _Damaged(f"{file} is no readable checkpoint ({type(error).__name__}: {error})") from error


def _file_name(rank: int) -> str:
    return f"rank-{rank:05d}.h5"


def _complete(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), key=lambda path: (len(path.name), path.name))  # 100000000 is after 99999999


def _write_file(path: Path, content: dict[str, Any]) -> None:
    with h5py.File(path, "w", locking=False) as root:
        _write(root, content)
        root.flush()
    _sync(path)


def _checksum(path: Path) -> int:
    """The CRC-32 of a file."""
    value, block = 0, memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        while n := file.readinto(block):
            value = zlib.crc32(block[:n], value)
    return value


def _sync(path: Path) -> None:
    """Of a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(group: h5py.Group, value: Any) -> None:
    """Write one value of a nested state as a group that says of what kind it is."""
    if isinstance(value, dict):
        group.attrs[_KIND] = "dict"
        for k, (key, item) in enumerate(value.items()):
            child = group.create_group(str(k))
            child.attrs["key"] = key
            child.attrs["key_is_number"] = isinstance(key, int)
            _write(child, item)
    elif isinstance(value, (list, tuple)):
        group.attrs[_KIND] = "list" if isinstance(value, list) else "tuple"
        for k, item in enumerate(value):
            _write(group.create_group(str(k)), item)
    elif isinstance(value, (torch.Tensor, np.ndarray)):
        group.attrs[_KIND] = "tensor" if isinstance(value, torch.Tensor) else "array"
        array = _to_numpy(value)
        group.attrs[_DTYPE] = str(array.dtype)
        group.create_dataset(_VALUE, data=array.view(np.uint16) if str(array.dtype) in _SIXTEEN_BIT else array)
    elif value is None:
        group.attrs[_KIND] = "none"
    elif isinstance(value, (bool, int, float, str)):
        kind = next(kind for kind in (bool, int, float, str) if isinstance(value, kind))  # np.float64 is a float
        group.attrs[_KIND] = kind.__name__
        # Text goes into a dataset: attributes end at 64 KiB. So do whole numbers, which may be of any length.
        group.create_dataset(_VALUE, data=str(value) if kind is int else kind(value))
    else:
        raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")


def _read(group: h5py.Group) -> Any:
    kind = group.attrs[_KIND]
    if kind == "dict":
        children = [group[str(k)] for k in range(len(group))]
        return {
            int(child.attrs["key"]) if child.attrs["key_is_number"] else str(child.attrs["key"]): _read(child)
            for child in children
        }
    if kind in ("list", "tuple"):
        items = [_read(group[str(k)]) for k in range(len(group))]
        return items if kind == "list" else tuple(items)
    if kind == "none":
        return None
    if kind in ("tensor", "array"):
        return _read_array(group, as_tensor=kind == "tensor")
    raw = group[_VALUE][()]
    return raw.decode() if kind == "str" else {"bool": bool, "int": int, "float": float}[kind](raw)


def _read_array(group: h5py.Group, *, as_tensor: bool) -> Any:
    stored = group[_VALUE]
    array = np.empty(stored.shape, stored.dtype)
    if array.size:
        stored.read_direct(array)
    dtype = str(group.attrs[_DTYPE])
    if not as_tensor:
        return array.view(_SIXTEEN_BIT[dtype]) if dtype in _SIXTEEN_BIT else array
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype in _SIXTEEN_BIT else tensor


def _to_numpy(value: torch.Tensor | np.ndarray) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return np.ascontiguousarray(value) if value.ndim else value
    value = value.detach().cpu().contiguous()
    if value.dtype == torch.bfloat16:
        return value.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return value.numpy()
