"""The folder of a run: ``config.json`` from its beginning, ``result.json`` once it has finished.

``result.json``, not the exit code of the launcher, shows that a run has finished: Open MPI's mpirun can return 0 after
it has lost a node.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import math
import os
import platform
import re
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpitrain.collectives.world.world import World
from mpitrain.data import Identity
from mpitrain.errors import UsageError, option_in_words
from mpitrain.records.durable import replace_text
from mpitrain.records.json_file import read_json
from mpitrain.trainer.config import TrainConfig
from mpitrain.version import __version__

SECONDS_TO_APPEAR = 5.0
"""How long a rank waits to see a file that rank 0 has created: network file systems cache directories."""

LOCAL_FILE_SYSTEMS = frozenset("tmpfs ramfs ext2 ext3 ext4 xfs btrfs zfs overlay".split())
"""Types of file systems of one node, where nothing that another node has created appears later."""

MAX_NAMED = 4
"""The number of ranks that a message names."""

PACKAGES = ("torch", "numpy", "mpi4py", "numba", "h5py")


def create(config: TrainConfig, settings: dict[str, Any], identity: Identity, world: World) -> Path | None:
    """Create the folder of a new run and write ``config.json``; do nothing in a run without a folder. Collective.

    Args:
        config: The options.
        settings: The settings of the method, including defaults.
        identity: The identity of the data set.
        world: The ranks.

    Raises:
        UsageError: The folder already contains a run, or cannot be created. All ranks raise it.
    """
    if config.out is None:
        return None
    folder = Path(config.out)
    document = {"config": config.to_json(), "algorithm": config.algorithm, "settings": settings}
    document["data"] = identity.to_json()
    document |= {"world": world.describe(), "versions": versions(), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}

    def describe() -> None:
        if (folder / "config.json").exists():
            raise UsageError(
                f"{folder} already holds a run: continue it with {option_in_words('--resume', folder)}, or choose "
                "another --out"
            )
        write_json(folder / "config.json", document)

    make_folder(folder, world, describe)
    return folder


def make_folder(folder: Path, world: World, first: Callable[[], None]) -> None:
    """Create a folder on rank 0 and call ``first`` there, which checks or fills the folder. Collective.

    Raises:
        UsageError: ``first`` has raised it, or the folder cannot be used. All ranks raise it.
    """
    problem = None
    if world.rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            first()
        except UsageError as error:
            problem = str(error)
        except OSError as error:
            problem = f"--out {folder} cannot be used ({error.strerror or error}): choose another folder"
    with world.waiting("the run folder, which rank 0 makes", lambda: [0]):
        problem = world.comm.bcast(problem)
    if problem is not None:
        raise UsageError(problem)


def require_shared(folder: Path, world: World) -> None:
    """Check that the folder of the run is the same folder on every rank. Collective.

    Raises:
        UsageError: A rank does not see the folder, for example because each node has its own disk. All ranks raise it.
    """
    token = folder / f".shared-{uuid.uuid4().hex}"
    problem = None
    if world.rank == 0:
        try:
            token.touch()
        except OSError as error:
            problem = f"--out {folder} cannot be used ({error.strerror or error}): choose another folder"
    problem, name = world.comm.bcast((problem, token.name))
    try:
        if problem is None:
            sees = _appears(folder / name)
            blind = [rank for rank, seen in enumerate(world.comm.allgather(sees)) if not seen]
            if blind:
                where = ", ".join(f"rank {rank} on {world.hosts[rank]}" for rank in blind[:MAX_NAMED])
                others = f" and {len(blind) - MAX_NAMED} others" if len(blind) > MAX_NAMED else ""
                verb = "does" if len(blind) == 1 else "do"
                problem = (
                    f"{where}{others} {verb} not see the folder {folder} of rank 0 on {world.hosts[0]}: "
                    "choose a folder on a file system that all nodes share"
                )
    finally:
        if world.rank == 0:
            token.unlink(missing_ok=True)
    if problem is not None:
        raise UsageError(problem)


def _appears(path: Path) -> bool:
    """Return whether a file exists here, after a wait for the caches of network file systems. Local."""
    try:
        is_local = file_system(os.path.realpath(path), Path("/proc/self/mounts").read_text()) in LOCAL_FILE_SYSTEMS
    except OSError:
        is_local = False
    deadline = time.monotonic() + (0.0 if is_local else SECONDS_TO_APPEAR)
    while True:
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # NFS reads the directory again
        if path.exists():
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


def file_system(path: str, mounts: str) -> str:
    """Return the type of the file system that holds a path, such as ``ext4``; empty if it is unknown. Local.

    Args:
        path: An absolute path without symbolic links.
        mounts: The text of ``/proc/self/mounts``. Among several mounts on the same folder, the last one counts.
    """
    found, length = "", 0
    for line in mounts.splitlines():
        folder, kind = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), line.split()[1]), line.split()[2]
        if os.path.commonpath([folder, path]) == folder and len(folder) >= length:
            found, length = kind, len(folder)
    return found


def check_data(folder: Path, name: str, identity: Identity, world: World) -> None:
    """Check that a resumed run uses the same data as before, wherever the data are now. Collective.

    Args:
        folder: The folder of the run.
        name: The name of the data set as given by the user.
        identity: The identity of the data set.
        world: The ranks.

    Raises:
        UsageError: The data differ, or ``config.json`` does not describe them. All ranks raise it.
    """
    problem = None
    if world.rank == 0:
        path = folder / "config.json"
        try:
            began_with = Identity.of_json(read_json(path)["data"])
        except (OSError, LookupError, TypeError, ValueError) as error:
            problem = f"{path} does not describe the data of the run ({type(error).__name__}: {error}): start a new run"
        else:
            if difference := began_with.difference(identity):
                problem = (
                    f"--data {name} is not the data of the run {folder}: it has {difference}; name the file of the "
                    "run with --data, or start a new run"
                )
    with world.waiting("the comparison of the data by rank 0", lambda: [0]):
        problem = world.comm.bcast(problem)
    if problem is not None:
        raise UsageError(problem, on_all_ranks=True)


def reopen(folder: Path, config: TrainConfig, world: World) -> None:
    """Mark a resumed run as unfinished, and store its new options. Local; ranks other than 0 do nothing."""
    if world.rank != 0:
        return
    path = folder / "config.json"
    write_json(path, {**read_json(path), "config": config.to_json()})
    (folder / "result.json").unlink(missing_ok=True)


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a document atomically.

    Raises:
        UsageError: The document cannot be written. The old file does not change.
    """
    replace_text(path, to_json(document, indent=2) + "\n")


def to_json(document: Any, indent: int | None = None) -> str:
    """Return a document as standard JSON, with null in place of NaN and infinity."""
    return json.dumps(_finite(document), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions() -> dict[str, str]:
    """Return the versions of the packages that affect a run."""
    return {"mpitrain": __version__, "python": platform.python_version(), **_versions_of_packages()}


@functools.cache
def _versions_of_packages() -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in PACKAGES}
