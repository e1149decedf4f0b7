"""Imports go downwards only, and heavy libraries stay where they belong (docs/architecture.md).

Every import statement counts, also inside functions and for types only; so does importlib.import_module("a.constant").
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the top to the bottom. A module may import from its own layer and from those below. A name stands for a module or
# a package; one that does not exist does no harm. A module of the package that stands nowhere is an error.
LAYERS = (
    ("__main__", "cli", "report"),
    ("trainer",),
    ("optimizer", "records", "simulation"),
    ("algorithms", "theory"),
    ("collectives",),
    ("kernels",),
)

# Beside the layers: each may import from itself and from what stands here, and may be imported from the top two layers.
SIBLINGS = {
    "data": ("collectives",),
    "models": ("optimizer.flat", "collectives"),
}

# Importable from everywhere, importing nothing of ours but each other.
EVERYWHERE = ("errors", "log", "version")

# Importing the package runs it; the second test of this file says what it may not load. It names its modules lazily.
EXEMPT = ("__init__",)

# Where a library may be imported. One that is not named may be imported anywhere.
LIBRARIES = {
    "cupy": ("kernels.compile.cuda", "kernels.gpu", "collectives.world.device", "collectives.probe.child"),
    "greenlet": ("simulation.communicator",),
    "h5py": ("records", "data", "cli.info", "report"),
    "matplotlib": ("report",),
    "mpi4py": ("collectives",),
    "numba": ("kernels",),
    "PIL": ("data",),
    "sklearn": ("data",),
    "torch": ("records.checkpoint", "optimizer", "collectives.world.device", "data", "models", "trainer"),
    "tqdm": ("data", "trainer"),
}

NOT_AT_IMPORT = ("cupy", "h5py", "matplotlib", "mpi4py", "numba", "torch")


def is_in(module: str, place: str) -> bool:
    return module == place or module.startswith(place + ".")


def place_of(module: str) -> str | int | None:
    """The layer of a module (0 is the top), or the sibling it belongs to, or "everywhere", or None."""
    if any(is_in(module, place) for place in EVERYWHERE):
        return "everywhere"
    for sibling in SIBLINGS:
        if is_in(module, sibling):
            return sibling
    for depth, layer in enumerate(LAYERS):
        if any(is_in(module, place) for place in layer):
            return depth
    return None


def imports(source: str, module: str, *, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything a module imports. `module` is its name within the package: "kernels.host"."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = f"mpitrain.{module}".split(".")
                package = package[: len(package) - node.level + is_package]
                base = ".".join([*package, *([base] if base else [])])
            if base == "mpitrain":  # from mpitrain import kernels
                yield from ((node.lineno, f"mpitrain.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, base
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = ast.unparse(node.func)
            if function in ("importlib.import_module", "import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def objection(module: str, imported: str) -> str | None:
    """Why `module` may not import `imported`, None if it may."""
    head = imported.partition(".")[0]
    if head != "mpitrain":
        places = LIBRARIES.get(head)
        if places is None or any(is_in(module, place) for place in places):
            return None
        return f"{head} is imported by {', '.join(places)} only"
    target = imported.removeprefix("mpitrain").lstrip(".")
    if not target or target.startswith("__"):
        return None if not target or target == "__version__" else "dunder modules are not imported"
    here, there = place_of(module), place_of(target)
    if there == "everywhere" or here == there:
        return None
    if here == "everywhere":
        return "what is importable from everywhere imports nothing of ours"
    if isinstance(here, str):
        allowed = SIBLINGS[here]
        return (
            None if any(is_in(target, place) for place in allowed) else f"{here} may import {', '.join(allowed)} only"
        )
    if isinstance(there, str):
        return None if here is not None and here <= 1 else f"{there} is for the trainer and above"
    if here is None or there is None:
        return "one of them stands in no layer: add it to the table in tests/test_layers.py"
    return None if here < there else "imports go downwards only"


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    found = (
        [f"mpitrain.{module} stands in no layer: add it to tests/test_layers.py"] if place_of(module) is None else []
    )
    for line, imported in imports(source, module, is_package=is_package):
        reason = objection(module, imported)
        if reason is not None:
            found.append(f"mpitrain.{module}, line {line}: imports {imported}: {reason}")
    return found


def modules() -> dict[str, Path]:
    """Every module of the package by its name within it: "kernels.host", "kernels" for a package's own file."""
    package = ROOT / "mpitrain"
    named = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return {name: path for name, path in named.items() if name not in EXEMPT}


def test_imports_go_downwards() -> None:
    found = [
        violation
        for name, path in modules().items()
        for violation in violations(path.read_text(), name, is_package=path.name == "__init__.py")
    ]
    assert not found, "\n".join(found)


def test_importing_the_package_loads_no_heavy_library() -> None:
    probe = f"import sys, mpitrain; print(*sorted(set({NOT_AT_IMPORT!r}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("algorithms.easgd", "import torch"),
        ("algorithms.easgd", "from numba import njit"),
        ("algorithms.easgd", "def f():\n    from mpi4py import MPI"),
        ("algorithms.easgd", "import importlib\nimportlib.import_module('cupy')"),
        ("algorithms.easgd", "from mpitrain.optimizer.distributed import DistributedOptimizer"),
        ("algorithms.easgd", "from mpitrain import trainer"),
        ("algorithms.easgd", "from .. import optimizer"),
        ("algorithms.easgd", "from ..data.storage import read"),
        ("collectives.tree", "from mpitrain.algorithms.method import Method"),
        ("collectives.tree", "import mpitrain.optimizer.flat"),
        ("kernels.compile.host", "from mpitrain.collectives import memory"),
        ("kernels.compile.host", "import cupy"),
        ("data.images", "from mpitrain.trainer.loop import train"),
        ("models.mlp", "from mpitrain.data import splits"),
        ("errors", "from mpitrain import kernels"),
        ("trainer", "import matplotlib.pyplot as plt"),
        ("trainer", "from mpitrain.cli import main"),
        ("somewhere_new", "import os"),
    ],
)
def test_what_is_not_allowed_is_found(module: str, source: str) -> None:
    assert violations(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("cli", "from mpitrain import trainer, data, models, algorithms"),
        (
            "trainer",
            "import torch\nfrom mpitrain.data import open_dataset\nfrom .optimizer import DistributedOptimizer",
        ),
        ("algorithms.easgd", "import numpy as np\nfrom ..kernels import elastic_exchange\nfrom . import method"),
        ("algorithms", "from .easgd import EASGD"),
        ("collectives.mpi", "from mpi4py import MPI\nfrom mpitrain.errors import UsageError"),
        ("report", "from matplotlib import pyplot\nfrom mpitrain import __version__"),
    ],
)
def test_what_is_allowed_is_not_objected_to(module: str, source: str) -> None:
    assert not violations(source, module, is_package=module == "algorithms")
