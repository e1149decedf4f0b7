"""A run on disk: ``config.json`` when it begins, ``result.json`` when it has finished.

The presence of ``result.json``, not the launcher's exit code, says that a run has finished: Open MPI's mpirun can
return 0 when it has lost a node.
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
    """Make the folder of a new run, if it is to have one, and describe the run in it. Collective.

    Raises:
        UsageError: When it holds a run already or cannot be made, on all ranks.
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
    """Make a folder on rank 0, where ``first`` then looks at what it holds and puts something in. Collective.

    Raises:
        UsageError: What ``first`` raised, or that the folder cannot be used; on all ranks.
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
    problem = world.comm.bcast(problem)
    if problem is not None:
        raise UsageError(problem)


def reopen(folder: Path, config: TrainConfig, world: World) -> None:
    """Make a run that is resumed an unfinished one, and note its new budget. Local; only rank 0 does something."""
    if world.rank != 0:
        return
    path = folder / "config.json"
    write_json(path, {**json.loads(path.read_text()), "config": config.to_json()})
    (folder / "result.json").unlink(missing_ok=True)


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a document whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(to_json(document, indent=2) + "\n")
    partial.replace(path)


def to_json(document: Any, indent: int | None = None) -> str:
    """As text that every JSON reader takes: there is no NaN and no infinity in JSON, null stands for them."""
    return json.dumps(_finite(document), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions() -> dict[str, str]:
    """Of everything that decides how a run behaves."""
    found = {"mpitrain": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        found[package] = importlib.metadata.version(package)
    return found
