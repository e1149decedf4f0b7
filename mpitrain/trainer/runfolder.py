"""The folder of a run: ``config.json`` from its beginning, ``result.json`` once it has finished.

``result.json``, not the exit code of the launcher, shows that a run has finished: Open MPI's mpirun can return 0 after
it has lost a node.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpitrain.collectives.world.world import World
from mpitrain.errors import UsageError
from mpitrain.trainer.config import TrainConfig
from mpitrain.version import __version__

PACKAGES = ("torch", "numpy", "mpi4py", "numba", "h5py")


def create(config: TrainConfig, settings: dict[str, Any], world: World) -> Path | None:
    """Create the folder of a new run, if it has one, and write ``config.json``. Collective.

    Raises:
        UsageError: The folder holds a run already or cannot be created; on all ranks.
    """
    if config.out is None:
        return None
    folder = Path(config.out)
    document = {"config": config.to_json(), "algorithm": config.algorithm, "settings": settings}
    document |= {"world": world.describe(), "versions": versions(), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}

    def describe() -> None:
        if (folder / "config.json").exists():
            raise UsageError(
                f"{folder} already holds a run: continue it with --resume {folder}, or choose another --out"
            )
        write_json(folder / "config.json", document)

    make_folder(folder, world, describe)
    return folder


def make_folder(folder: Path, world: World, first: Callable[[], None]) -> None:
    """Create a folder and call ``first``, which checks or fills it, on rank 0. Collective.

    Raises:
        UsageError: ``first`` raised it, or the folder cannot be used; on all ranks.
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


def reopen(folder: Path, config: TrainConfig, world: World) -> None:
    """Mark a resumed run as unfinished, and store its new budget. Local; no effect on ranks other than 0."""
    if world.rank != 0:
        return
    path = folder / "config.json"
    write_json(path, {**json.loads(path.read_text()), "config": config.to_json()})
    (folder / "result.json").unlink(missing_ok=True)


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a document atomically."""
    partial = path.with_suffix(".partial")
    partial.write_text(to_json(document, indent=2) + "\n")
    partial.replace(path)


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
    found = {"mpitrain": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        found[package] = importlib.metadata.version(package)
    return found
