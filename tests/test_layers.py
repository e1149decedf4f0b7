"""The layers of the package: imports go down a list of rooms, no files import each other in a cycle, and each heavy
library is imported only where it belongs.

Every import counts: inside functions, for types only, and `importlib.import_module("a.constant")`.
docs/architecture.md has the picture.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From top to bottom. A room is a package, a sub-package or a file, and imports only from rooms below it. A file belongs
# to the room with the longest matching name. Files of one room may import each other, but not in a cycle.
ROOMS = (
    "__init__",  # the public names, each imported when it is first used
    "__main__",
    "cli",
    "report",
    "trainer",
    "optimizer",
    "models",
    "data",
    "simulation",
    "loggers",
    "records",
    "algorithms",  # the registry
    "algorithms.population",
    "algorithms.byzantine",
    "algorithms.flat_minima",
    "algorithms.leader",
    "algorithms.gossip",
    "algorithms.parameter_server",
    "algorithms.elastic",
    "algorithms.synchronous",
    "algorithms.base",
    "theory",
    "collectives",
    "collectives.rma",
    "collectives.world",
    "collectives.probe",
    "collectives.topology",
    "kernels",
    "kernels.native",
    "kernels.compile",
    "kernels.gpu",
    "log",
    "errors",
    "version",
)

# Where a library may be imported. A library that is not listed may be imported anywhere.
LIBRARIES = {
    "cupy": ("kernels.compile.cuda", "kernels.gpu", "collectives.probe.child"),
    "greenlet": ("simulation.scheduler",),
    "h5py": ("records", "data"),
    "matplotlib": ("report",),
    "mlflow": ("loggers.mlflow_run",),
    "mpi4py": ("collectives",),
    "networkx": ("collectives.topology",),
    "numba": ("kernels",),
    "PIL": ("data",),
    "rich": ("cli.watch",),
    "sklearn": ("data",),
    "tensorboardX": ("loggers.tensorboard",),
    "tokenizers": ("data",),
    "torch": ("records.hdf5_tree", "optimizer", "collectives.world.device", "data", "models", "trainer"),
    "tqdm": ("data", "trainer"),
    "wandb": ("loggers.wandb_run",),
}

# Where a module may be imported by a name that is computed: the public names, and modules of the user's own.
BY_COMPUTED_NAME = ("__init__", "cli", "models")

IMPORT_FUNCTIONS = ("importlib.import_module", "import_module", "__import__")
COMPUTED = "a module by a computed name"


def module_name(path: str) -> str:
    """Return the name within the package of the file at `path`: "kernels" of "kernels/__init__.py"."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def is_in(module: str, place: str) -> bool:
    return module == place or module.startswith(place + ".")


def room_of(module: str) -> str | None:
    """Return the room with the longest name that fits, None if there is none."""
    return max((room for room in ROOMS if is_in(module, room)), key=len, default=None)


def imports(source: str, path: str) -> Iterator[tuple[int, str]]:
    """Yield line and absolute dotted name of everything that a file imports, names from a module as "module.name"."""
    package = ["mpitrain", *path.split("/")[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in IMPORT_FUNCTIONS:
            name = node.args[0] if node.args else None
            constant = isinstance(name, ast.Constant) and isinstance(name.value, str)
            yield node.lineno, name.value if constant else COMPUTED


def objection(module: str, imported: str, target: str | None) -> str | None:
    """Return why `module` may not import `imported`, None if it may. `target` is the file of ours that this is."""
    if imported == COMPUTED:
        return None if any(is_in(module, place) for place in BY_COMPUTED_NAME) else "its name must be a constant"
    if target is None:
        library = imported.partition(".")[0]
        places = LIBRARIES.get(library)
        allowed = places is None or any(is_in(module, place) for place in places)
        return None if allowed else f"{library} is imported by {', '.join(places or ())} only"
    if target == "__init__":
        return "the package's public names are for users: import the name from its own module"
    here, there = room_of(module), room_of(target)
    if here is None or there is None:  # reported by violations(), once
        return None
    if here != there and ROOMS.index(here) > ROOMS.index(there):
        return f"{here} is below {there}, and imports go down only"
    return None


def target_of(imported: str, modules: set[str]) -> str | None:
    """Return the module of ours that an import reads, "__init__" for the package itself, None for a library."""
    head, _, rest = imported.partition(".")
    if head != "mpitrain":
        return None
    while rest and rest not in modules:  # a name within a module
        rest = rest.rpartition(".")[0]
    return rest or "__init__"


def cycles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the shortest cycle through each module that lies on one, every cycle once."""
    found: dict[frozenset[str], list[str]] = {}
    for start in sorted(graph):
        paths = deque([[start]])
        reached: set[str] = set()
        while paths:
            path = paths.popleft()
            following = graph.get(path[-1], set())
            if start in following:
                found.setdefault(frozenset(path), [*path, start])
                break
            paths.extend([*path, module] for module in sorted(following - reached))
            reached |= following
    return list(found.values())


def violations(sources: Mapping[str, str]) -> list[str]:
    """Return what is wrong with a package, given the text of each file by its path within the package."""
    modules = {module_name(path) for path in sources}
    found = [f"{name} belongs to no room: add it to tests/test_layers.py" for name in modules if room_of(name) is None]
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for path, source in sources.items():
        module = module_name(path)
        for line, imported in imports(source, path):
            target = target_of(imported, modules)
            if target in modules:
                graph[module].add(target)
            reason = objection(module, imported, target)
            if reason is not None:
                found.append(f"mpitrain/{path}:{line} imports {imported}: {reason}")
    found += ["an import cycle: " + " -> ".join(cycle) for cycle in cycles(graph)]
    return sorted(found)


def package_sources() -> dict[str, str]:
    package = ROOT / "mpitrain"
    return {path.relative_to(package).as_posix(): path.read_text() for path in sorted(package.rglob("*.py"))}


def test_the_package_keeps_to_its_layers() -> None:
    found = violations(package_sources())
    assert not found, "\n".join(found)


def test_every_room_exists() -> None:
    modules = {module_name(path) for path in package_sources()}
    assert [room for room in ROOMS if not any(is_in(module, room) for module in modules)] == []


def test_no_library_is_allowed_where_nothing_imports_it() -> None:
    used = {
        (library, place)
        for path, source in package_sources().items()
        for _, imported in imports(source, path)
        for library, places in LIBRARIES.items()
        for place in places
        if is_in(imported, library) and is_in(module_name(path), place)
    }
    assert {(library, place) for library, places in LIBRARIES.items() for place in places} == used


def test_importing_the_package_loads_no_heavy_library() -> None:
    probe = f"import sys, mpitrain; print(*sorted(set({tuple(LIBRARIES)!r}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, timeout=200, check=True
    )
    assert done.stdout.strip() == ""


# A small package that keeps to the rules. Each test below adds files to it.
SOUND = {
    "__init__.py": "import importlib\nfrom mpitrain.errors import UsageError\nimportlib.import_module(name)",
    "errors.py": "",
    "version.py": "",
    "kernels/__init__.py": "from mpitrain.kernels import elastic\nfrom mpitrain.kernels.elastic import exchange",
    "kernels/elastic.py": "from mpitrain.kernels.compile.declare import Kernel",
    "kernels/compile/__init__.py": "",
    "kernels/compile/declare.py": "from numba import njit\nfrom ...errors import UsageError",
    "collectives/__init__.py": "",
    "collectives/mpi.py": "from mpi4py import MPI\nfrom mpitrain.collectives.world.world import World",
    "collectives/world/__init__.py": "",
    "collectives/world/world.py": "import numpy as np\nfrom mpitrain import kernels",
    "algorithms/__init__.py": "from .elastic.easgd import EASGD",
    "algorithms/base/__init__.py": "",
    "algorithms/base/method.py": "",
    "algorithms/elastic/__init__.py": "",
    "algorithms/elastic/easgd.py": "from ..base import method\nfrom mpitrain.kernels import elastic_exchange",
    "trainer/loop.py": "import torch\nfrom mpitrain import algorithms\nfrom mpitrain.collectives.mpi import f",
    "cli/main.py": "import importlib\nimportlib.import_module(users)\nfrom mpitrain.trainer.loop import train",
}

# What is planted: the reason that is given, and the files that give it.
PLANTED = {
    "imports go down only": {
        "an import from a room above": {"algorithms/elastic/easgd.py": "from mpitrain.trainer.loop import train"},
        "a module from a room above": {"algorithms/elastic/easgd.py": "from mpitrain.trainer import loop"},
        "a dotted import from a room above": {"kernels/elastic.py": "import mpitrain.collectives.mpi"},
        "a relative import from a room above": {"algorithms/elastic/easgd.py": "from ...trainer import loop"},
        "a relative import from the package above": {"algorithms/base/method.py": "from .. import elastic"},
        "a sub-package above": {"algorithms/base/method.py": "from mpitrain.algorithms.elastic.easgd import EASGD"},
        "the parent package above": {"collectives/world/world.py": "from mpitrain.collectives.mpi import f"},
        "the registry above": {"algorithms/elastic/easgd.py": "from mpitrain.algorithms import EASGD"},
        "a type from a room above": {
            "collectives/mpi.py": "from typing import TYPE_CHECKING\n"
            "if TYPE_CHECKING:\n    from mpitrain.algorithms.base.method import Method",
        },
        "a function's import from a room above": {
            "kernels/elastic.py": "def f():\n    from mpitrain.collectives.world import world",
        },
        "a named module above": {
            "kernels/elastic.py": "import importlib\nimportlib.import_module('mpitrain.trainer.loop')"
        },
        "errors that import something": {"errors.py": "from mpitrain.kernels import elastic"},
    },
    "an import cycle: trainer.a -> trainer.b -> ": {
        "two files in a cycle": {
            "trainer/a.py": "from mpitrain.trainer.b import f",
            "trainer/b.py": "from mpitrain.trainer import a",
        },
        "two files in a cycle through types": {
            "trainer/a.py": "from mpitrain.trainer.b import f",
            "trainer/b.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mpitrain.trainer.a import A",
        },
        "three files in a cycle": {
            "trainer/a.py": "from mpitrain.trainer import b",
            "trainer/b.py": "def f():\n    from mpitrain.trainer.c import g",
            "trainer/c.py": "from .a import h",
        },
    },
    "an import cycle: kernels -> kernels.elastic -> kernels": {
        "a file that imports its package, which imports it": {
            "kernels/elastic.py": "from mpitrain.kernels import something_else",
        },
    },
    "is imported by": {
        "a library in the wrong room": {"algorithms/elastic/easgd.py": "import torch"},
        "a part of a library in the wrong room": {"trainer/loop.py": "from matplotlib import pyplot"},
        "a function's library in the wrong room": {
            "algorithms/elastic/easgd.py": "def f():\n    from mpi4py import MPI"
        },
        "a named library in the wrong room": {"trainer/loop.py": "import importlib\nimportlib.import_module('cupy')"},
        "a library for types in the wrong room": {
            "kernels/elastic.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch",
        },
    },
    "belongs to no room": {
        "a file in no room": {"somewhere_new.py": "import os"},
    },
    "its name must be a constant": {
        "a module by a computed name": {
            "kernels/elastic.py": "from importlib import import_module\nimport_module(f())"
        },
    },
    "the package's public names are for users": {
        "the public names": {"trainer/loop.py": "from mpitrain import EASGD"},
        "the package as a whole": {"trainer/loop.py": "import mpitrain"},
    },
}
CASES = [pytest.param(reason, files, id=name) for reason, cases in PLANTED.items() for name, files in cases.items()]


def test_a_sound_package_is_not_objected_to() -> None:
    assert violations(SOUND) == []


@pytest.mark.parametrize(("reason", "files"), CASES)
def test_a_planted_violation_is_found(reason: str, files: dict[str, str]) -> None:
    found = violations(SOUND | files)
    assert [text for text in found if reason in text], found
    assert all(reason in text or "an import cycle" in text for text in found), found
