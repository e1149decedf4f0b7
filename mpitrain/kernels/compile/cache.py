"""Compiled host kernels on disk, so that only the first process on a kind of CPU compiles.

Numba's own cache does the storing. What it needs around it, when many ranks start at once, perhaps in one home
directory on nodes of different CPUs:

- Generated source is a file at ``<root>/<hash>/<kernel>_<dtypes>.py``. The hash covers the source, the modules of
  this package that it imports from, the versions of Numba and llvmlite, the CPU's name and features and the compiler's
  options, so unlike processes never meet in one folder.
- Numba recognises a source by its modification time and size. The file gets a fixed time before it is renamed to its
  place, so it is the same source whichever rank wrote it last.
- One signature to a file: with two, ranks that compile different ones could both claim the same data file in Numba's
  index. With one, whoever writes last writes what the others wrote.
- A folder that lets itself be written to may turn out to be full (a quota): then the next place is tried.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Final

# error_model: a division by zero gives infinity or NaN, as in NumPy, and no branch to raise from.
OPTIONS: Final[dict[str, Any]] = {"nogil": True, "fastmath": False, "error_model": "numpy"}
_IMPORTS: Final = re.compile(r"^from mpitrain\.kernels\.([\w.]+) import ", re.MULTILINE)
_KERNELS: Final = Path(__file__).resolve().parents[1]
_SOURCE_TIME: Final = 1_000_000_000  # seconds since 1970; any constant does

statistics: Final = {"compiled": 0, "loaded": 0}  # by this process; for tests and `mpitrain info`
_lock = threading.Lock()


def compiled(name: str, label: str, source: str) -> Callable[..., int]:
    """Compiles or loads the function `name` of `source`, whose module constant SIGNATURE says for which types.

    Args:
        name: of the function in `source`.
        label: distinguishes the file from that of other signatures.
        source: Python source of a module.

    Returns:
        The function's compiled entry. It checks nothing: arrays must be of the declared kind.
    """
    with _lock:
        dispatcher = _dispatcher(name, f"{name}_{label}", source)
        statistics["loaded" if sum(dispatcher.stats.cache_hits.values()) else "compiled"] += 1
        # The entry point and not the dispatcher: it takes read-only arrays for what is not assigned, and it does not
        # look at the types again, which the kernels have checked already.
        (overload,) = dispatcher.overloads.values()
        entry: Callable[..., int] = overload.entry_point
        return entry


def _dispatcher(name: str, stem: str, source: str) -> Any:
    """From the cache of the first place that takes it; from none where none does."""
    import numba

    digest = _digest(source)
    folders = [root / digest for root in _roots()]
    have_it = [folder for folder in folders if list(folder.rglob("*.nbc"))]
    # Who has the source and not what was compiled of it is full, or will have it soon: others may have it now.
    for folder in [folder for folder in folders if not (have_it and folder.exists()) or folder in have_it]:
        try:
            module = _module_on_disk(folder / f"{stem}.py", source)
            return numba.njit(module.SIGNATURE, cache=True, **OPTIONS)(getattr(module, name))
        except (OSError, RuntimeError):  # RuntimeError: of Numba, where it can make no folder
            continue
    module = ModuleType(_module_name(digest))
    exec(compile(source, f"<{stem}>", "exec"), module.__dict__)
    return numba.njit(module.SIGNATURE, **OPTIONS)(getattr(module, name))


def cache_root() -> Path | None:
    """The folder of compiled kernels: the first of the candidates that can be written to, None where none can."""
    return next(iter(_roots()), None)


@functools.cache
def _roots() -> tuple[Path, ...]:
    """Those candidates that can be written to: with an empty file, for one that is full may hold what is looked for."""
    found = []
    for candidate in _candidates():
        try:
            candidate.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=candidate):
                found.append(candidate)
        except OSError:
            continue
    return tuple(found)


def _candidates() -> Iterator[Path]:
    """$MPITRAIN_CACHE_DIR, $XDG_CACHE_HOME/mpitrain, ~/.cache/mpitrain, this user's folder among the temporary ones."""
    if named := os.environ.get("MPITRAIN_CACHE_DIR"):
        yield Path(named)
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        yield Path(xdg) / "mpitrain"
    home = os.path.expanduser("~")  # Path.home() raises where a container's user has none
    if os.path.isabs(home):
        yield Path(home) / ".cache" / "mpitrain"
    # Cached code is executed: a folder that somebody else has made under our name is not taken.
    temporary = Path(tempfile.gettempdir()) / f"mpitrain-{os.getuid()}"
    try:
        temporary.mkdir(mode=0o700, exist_ok=True)
        if temporary.stat().st_uid == os.getuid() and not temporary.is_symlink():
            yield temporary
    except OSError:
        return


@functools.cache
def _platform_key() -> str:
    import llvmlite  # type: ignore[import-untyped]
    import llvmlite.binding as llvm  # type: ignore[import-untyped]
    import numba
    from numba.core import config

    cpu = (llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten())
    overrides = [getattr(config, name) for name in ("CPU_NAME", "CPU_FEATURES", "OPT")]
    return repr((numba.__version__, llvmlite.__version__, cpu, overrides, sorted(OPTIONS.items())))


def _digest(source: str) -> str:
    modules = sorted({*_IMPORTS.findall(source)})
    imported = [_KERNELS.joinpath(*name.split(".")).with_suffix(".py").read_text() for name in modules]
    return hashlib.sha256((_platform_key() + repr(imported) + source).encode()).hexdigest()[:24]


def _module_name(digest: str) -> str:
    return f"mpitrain_generated_{digest}"


def _module_on_disk(path: Path, source: str) -> ModuleType:
    """Imports `source` from a file, which it is written to unless it is there."""
    _write(path, source)
    module_name = _module_name(path.parent.name)
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # Numba looks a cached function's globals up by its module's name
    spec.loader.exec_module(module)
    return module


def _write(path: Path, source: str) -> None:
    """Writes `source` to `path` unless it is there; a reader sees all of it or nothing, whoever else writes."""
    try:
        stamp = path.stat()
        if stamp.st_mtime == _SOURCE_TIME and stamp.st_size == len(source.encode()):
            return
    except FileNotFoundError:
        pass
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(source)
        os.utime(temporary, (_SOURCE_TIME, _SOURCE_TIME))
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
