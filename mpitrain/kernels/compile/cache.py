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
- Cached code is executed. It is taken only from folders that nobody else can write to (``cache_folder``), and the
  source is compared byte for byte.
- A writable folder may turn out to be full (a quota). Then the next candidate is tried.
"""

from __future__ import annotations

import atexit
import contextlib
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

from mpitrain.kernels.compile import cache_folder

# error_model: a division by zero gives infinity or NaN, as in NumPy, and no branch to raise from.
OPTIONS: Final[dict[str, Any]] = {"nogil": True, "fastmath": False, "error_model": "numpy"}
_IMPORTS: Final = re.compile(r"^from mpitrain\.kernels\.([\w.]+) import ", re.MULTILINE)
_BLAS: Final = "scipy.linalg.cython_blas"
_KERNELS: Final = Path(__file__).resolve().parents[1]
_SOURCE_TIME: Final = 1_000_000_000  # seconds since 1970; any constant does

statistics: Final = {"compiled": 0, "loaded": 0}  # by this process; for tests and `mpitrain info`
_lock = threading.Lock()


def compiled(name: str, label: str, source: str) -> Callable[..., int]:
    """Compile the function `name` of `source`, for the types in its constant ``SIGNATURE``, or load it from the cache.

    Args:
        name: The function in `source`.
        label: A part of the file name that distinguishes signatures.
        source: The Python source of a module.

    Returns:
        The compiled entry point. It does not check its arguments: arrays must have the declared types.
    """
    with _lock, _without_reset_of_the_terminal(), _without_import_of_scipy():
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
    folders = [root / digest for root in cache_folder.roots()]
    compiled_in = [folder for folder in folders if list(folder.rglob("*.nbc"))]
    # A folder with the source but without machine code is full or still being filled: prefer one that has both.
    for folder in [folder for folder in folders if not (compiled_in and folder.exists()) or folder in compiled_in]:
        try:
            module = _module_on_disk(folder / f"{stem}.py", source)
            with _in_tree_cache():
                dispatcher = numba.njit(module.SIGNATURE, cache=True, **OPTIONS)(getattr(module, name))
            if not dispatcher.stats.cache_hits:
                cache_folder.protect(folder)
            return dispatcher
        except (OSError, RuntimeError):  # Numba raises a RuntimeError where it cannot make its folder
            continue
    module = ModuleType(_module_name(digest))
    exec(compile(source, f"<{stem}>", "exec"), module.__dict__)
    return numba.njit(module.SIGNATURE, **OPTIONS)(getattr(module, name))


@contextlib.contextmanager
def _without_reset_of_the_terminal() -> Iterator[None]:
    """Undo an effect of Numba where colorama is installed: an escape code after the last line of the output.

    Numba initialises colorama, which then resets the colours at the end of the process if the output is a terminal. It
    is one for ranks under ``mpirun``, even if their output goes into a file.
    """

    def reset() -> Any:
        initialise: Any = getattr(sys.modules.get("colorama"), "initialise", None)
        return initialise.reset_all if getattr(initialise, "atexit_done", False) else None

    was_registered = reset() is not None
    yield
    if not was_registered and reset() is not None:
        atexit.unregister(reset())


@contextlib.contextmanager
def _without_import_of_scipy() -> Iterator[None]:
    """Answer Numba's question whether SciPy is there without an import, which takes 0.2 s on every rank.

    Numba imports ``scipy.linalg.cython_blas`` when it prepares its first function, only to see whether that works. It
    imports the module again when it compiles a product of matrices, which no kernel contains.
    """
    if _BLAS in sys.modules or importlib.util.find_spec("scipy") is None:
        yield
        return
    sys.modules[_BLAS] = placeholder = ModuleType(_BLAS)
    try:
        yield
    finally:
        if sys.modules.get(_BLAS) is placeholder:
            del sys.modules[_BLAS]


@contextlib.contextmanager
def _in_tree_cache() -> Iterator[None]:
    """Let Numba store machine code beside its source only, whatever NUMBA_CACHE_DIR says."""
    from numba.core import config

    before = vars(config)["CACHE_DIR"]
    vars(config)["CACHE_DIR"] = ""
    try:
        yield
    finally:
        vars(config)["CACHE_DIR"] = before


def cache_root() -> Path | None:
    """Return the folder of compiled kernels: the first candidate that is writable and trusted, or None."""
    return next(iter(cache_folder.roots()), None)


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
    cache_folder.make_private(path.parent)
    cache_folder.drop_foreign(path.parent)
    try:
        if path.stat().st_mtime == _SOURCE_TIME and path.read_bytes() == source.encode():
            return
    except FileNotFoundError:
        pass
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(source)
        os.utime(temporary, (_SOURCE_TIME, _SOURCE_TIME))
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
