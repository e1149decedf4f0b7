"""The on-disk cache of compiled host kernels: only the first process on a kind of CPU compiles.

Numba's own cache stores the machine code. This module makes it safe for many ranks that start at once, possibly in one
home directory shared by nodes with different CPUs:

- Generated source is a file at ``<root>/<hash>/<kernel>_<dtypes>.py``. The hash covers the source, the modules of
  this package that it imports, the versions of Numba and llvmlite, the CPU's name and features, and the compiler
  options, so processes that differ in any of these use different folders.
- Numba identifies a source file by its modification time and size. The file gets a fixed time before it is renamed into
  place, so it counts as the same source whichever rank wrote it last.
- Each file has one signature. With two, ranks that compile different ones could claim the same data file in Numba's
  index. With one, concurrent writers write the same content.
- A writable folder may turn out to be full (a quota). Then the next candidate is tried.
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
    """Compile or load the function `name` of `source` for the types in the module constant ``SIGNATURE``.

    Args:
        name: The function in `source`.
        label: Distinguishes the file from those of other signatures.
        source: The Python source of a module.

    Returns:
        The compiled entry point. It checks nothing: arrays must have the declared types.
    """
    with _lock:
        dispatcher = _dispatcher(name, f"{name}_{label}", source)
        statistics["loaded" if sum(dispatcher.stats.cache_hits.values()) else "compiled"] += 1
        # Return the entry point, not the dispatcher: it accepts read-only arrays as inputs, and it does not check the
        # types again, which the kernels have already checked.
        (overload,) = dispatcher.overloads.values()
        entry: Callable[..., int] = overload.entry_point
        return entry


def _dispatcher(name: str, stem: str, source: str) -> Any:
    """Return the compiled function from the cache of the first usable root, or compile it in memory without one."""
    import numba

    digest = _digest(source)
    folders = [root / digest for root in _roots()]
    compiled_in = [folder for folder in folders if list(folder.rglob("*.nbc"))]
    # A folder with the source but without machine code is full or still being filled: prefer one that has both.
    for folder in [folder for folder in folders if not (compiled_in and folder.exists()) or folder in compiled_in]:
        try:
            module = _module_on_disk(folder / f"{stem}.py", source)
            return numba.njit(module.SIGNATURE, cache=True, **OPTIONS)(getattr(module, name))
        except (OSError, RuntimeError):  # Numba raises a RuntimeError where it cannot make its folder
            continue
    module = ModuleType(_module_name(digest))
    exec(compile(source, f"<{stem}>", "exec"), module.__dict__)
    return numba.njit(module.SIGNATURE, **OPTIONS)(getattr(module, name))


def cache_root() -> Path | None:
    """Return the folder of compiled kernels: the first writable candidate, or None."""
    return next(iter(_roots()), None)


@functools.cache
def _roots() -> tuple[Path, ...]:
    """Return the candidates in which an empty file can be made. A full one may still hold compiled kernels."""
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
    """Yield $MPITRAIN_CACHE_DIR, $XDG_CACHE_HOME/mpitrain, ~/.cache/mpitrain and a temporary folder of this user."""
    if named := os.environ.get("MPITRAIN_CACHE_DIR"):
        yield Path(named)
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        yield Path(xdg) / "mpitrain"
    home = os.path.expanduser("~")  # Path.home() raises where a container's user has none
    if os.path.isabs(home):
        yield Path(home) / ".cache" / "mpitrain"
    # Cached code is executed, so a folder of this name that belongs to another user is not used.
    temporary = Path(tempfile.gettempdir()) / f"mpitrain-{os.getuid()}"
    try:
        temporary.mkdir(mode=0o700, exist_ok=True)
        if temporary.stat().st_uid == os.getuid() and not temporary.is_symlink():
            yield temporary
    except OSError:
        return


@functools.cache
def _platform_key() -> str:
    """Return what compiled code depends on besides its source: versions, CPU and options."""
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
    """Import `source` from a file, and write the file first unless it exists."""
    _write(path, source)
    module_name = _module_name(path.parent.name)
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # Numba finds a cached function's globals by its module's name
    spec.loader.exec_module(module)
    return module


def _write(path: Path, source: str) -> None:
    """Write `source` to `path` atomically unless it is there: readers see all of it or nothing."""
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
