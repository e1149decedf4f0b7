"""Compiled kernels on disk: concurrent processes, a later one that compiles nothing, and no folder to write to."""

import importlib
import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mpitrain.kernels
from mpitrain.kernels.compile import cache, cache_folder

pytestmark = pytest.mark.launches

SCRIPT = """
import json, sys
import numpy as np
from mpitrain.kernels import elastic_exchange, reduce_sum
from mpitrain.kernels.compile import cache
assert "numba" not in sys.modules
x, c = np.ones(99, np.float32), np.zeros(99, np.float32)
elastic_exchange(x, c, 0.25, 0.5)
h = np.ones(99, np.float16)
elastic_exchange(h, np.zeros(99, np.float16), 0.25, 0.5)
out = np.empty(99)
reduce_sum(out, [np.ones(99)] * 9)
assert set(x) == {0.75} and set(c) == {0.5} and set(h) == {0.75} and set(out) == {9.0}
assert "scipy.linalg" not in sys.modules
print(json.dumps(cache.statistics))
"""
ROOT = Path(mpitrain.kernels.__file__).parents[2]


def start(head="", **variables):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MPITRAIN_", "NUMBA_", "XDG_"))}
    environment |= {"PYTHONPATH": str(ROOT), **{name: str(value) for name, value in variables.items()}}
    return subprocess.Popen(
        [sys.executable, "-c", head + SCRIPT],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait(process):
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    return json.loads(out)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A folder with the compiled kernels of the script."""
    folder = tmp_path_factory.mktemp("compiled") / "cache"
    wait(start(MPITRAIN_CACHE_DIR=folder))
    return folder


def files(root):
    return {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


def test_processes_that_compile_at_once_agree_and_the_next_compiles_nothing(tmp_path):
    counts = [wait(process) for process in [start(MPITRAIN_CACHE_DIR=tmp_path) for _ in range(3)]]
    assert all(sum(count.values()) == 3 for count in counts)
    assert any(count["compiled"] for count in counts)
    before = files(tmp_path)
    assert len({path.parent for path in before if path.suffix == ".py"}) == 3
    assert not [path for path in before if path.name.startswith(".") or ".tmp" in path.name]
    assert wait(start(MPITRAIN_CACHE_DIR=tmp_path)) == {"compiled": 0, "loaded": 3}
    assert files(tmp_path) == before


def test_a_damaged_source_is_rewritten(tmp_path, compiled):
    root = Path(shutil.copytree(compiled, tmp_path / "cache"))
    for path in root.rglob("*.py"):
        path.write_text("raise SystemExit('half a file')")
    wait(start(MPITRAIN_CACHE_DIR=root))


def test_the_first_writable_folder_is_used(tmp_path):
    blocked = tmp_path / "a file, not a folder"
    blocked.touch()
    wait(start(MPITRAIN_CACHE_DIR=blocked, XDG_CACHE_HOME=tmp_path / "xdg"))
    assert list((tmp_path / "xdg" / "mpitrain").rglob("*.nbc"))


# Like a quota: an empty file can be made, but nothing can be written to it.
FULL = """
import builtins, errno, os, tempfile
real_fdopen, real_open = os.fdopen, builtins.open
class Full:
    def __init__(self, file): self.file = file
    def __enter__(self): return self
    def __exit__(self, *error): self.file.close()
    def write(self, data): raise OSError(errno.EDQUOT, "Disk quota exceeded")
def is_full(name): return os.path.realpath(name).startswith({full!r}) and {which!r} in str(name)
def fdopen(fd, mode="r", *more):
    file = real_fdopen(fd, mode, *more)
    return Full(file) if "w" in mode and is_full(os.readlink(f"/proc/self/fd/{{fd}}")) else file
def open(name, mode="r", *more, **options):
    file = real_open(name, mode, *more, **options)
    return Full(file) if "w" in mode and isinstance(name, str) and is_full(name) else file
os.fdopen, builtins.open = fdopen, open
"""


@pytest.mark.parametrize("which", ["", ".nbc", ".nbi"])
def test_the_next_folder_is_used_if_the_first_is_full(tmp_path, which):
    full, other = tmp_path / "full", tmp_path / "xdg"
    head = FULL.format(full=str(full), which=which)
    for expected in ({"compiled": 3, "loaded": 0}, {"compiled": 0, "loaded": 3}):
        assert wait(start(head, MPITRAIN_CACHE_DIR=full, XDG_CACHE_HOME=other, HOME=tmp_path)) == expected
    assert len(list(other.rglob("*.nbc"))) == 3
    assert not [path for path in full.rglob("*") if path.name.startswith(".") or ".tmp" in path.name]


def test_kernels_in_a_full_folder_are_used(compiled):
    head = FULL.format(full=str(compiled), which="")
    assert wait(start(head, MPITRAIN_CACHE_DIR=compiled)) == {"compiled": 0, "loaded": 3}


def test_kernels_compile_in_memory_without_a_writable_folder(tmp_path):
    blocked = tmp_path / "a file, not a folder"
    blocked.touch()
    nowhere = {"MPITRAIN_CACHE_DIR": blocked, "XDG_CACHE_HOME": blocked, "HOME": blocked}
    driver = f"import tempfile; tempfile.tempdir = {str(blocked)!r}\n"
    process = subprocess.run(
        [sys.executable, "-c", driver + SCRIPT],
        env={**os.environ, "PYTHONPATH": str(ROOT), **{name: str(path) for name, path in nowhere.items()}},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout) == {"compiled": 3, "loaded": 0}


def test_numba_finds_scipy_without_an_import_and_imports_it_for_a_product_of_matrices(monkeypatch):
    monkeypatch.delitem(sys.modules, cache._BLAS, raising=False)
    for _ in range(2):
        with cache._without_import_of_scipy():
            assert not hasattr(importlib.import_module(cache._BLAS), "__file__")
        assert cache._BLAS not in sys.modules
    blas = importlib.import_module(cache._BLAS)
    with cache._without_import_of_scipy():
        assert importlib.import_module(cache._BLAS) is blas
    assert sys.modules[cache._BLAS] is blas


@pytest.mark.parametrize("imported", ["native.atomics", "native.service.foreign", "compile.halves"])
def test_a_kernel_is_recompiled_when_a_module_it_imports_has_changed(imported, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(cache._KERNELS, tmp_path / "kernels"))
    monkeypatch.setattr(cache, "_KERNELS", folder)
    source = f"import math\nfrom mpitrain.kernels.{imported} import __name__ as name\n"

    first = cache._digest(source)
    (folder / "norms.py").write_text("something else")
    assert cache._digest(source) == first
    (folder / imported.replace(".", "/")).with_suffix(".py").write_text("something else")
    assert cache._digest(source) != first


def test_a_kernel_is_recompiled_for_another_cpu_another_version_and_other_options(monkeypatch):
    """Code for another CPU would end the process with an illegal instruction on nodes that share a home directory."""
    import numba
    from numba.core import config

    def digest():
        cache._platform_key.cache_clear()
        return cache._digest("source")

    digests = [digest()]
    for module, name, value in (
        (config, "CPU_NAME", "generic"),
        (config, "CPU_FEATURES", "+sse2"),
        (numba, "__version__", "0.0"),
        (cache, "OPTIONS", cache.OPTIONS | {"fastmath": True}),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, value)
            digests.append(digest())
    cache._platform_key.cache_clear()
    assert len(set(digests)) == 5
    assert digest() == digests[0]


# ---- folders that others can write to -----------------------------------------------------------------------

FORGED = "raise SystemExit('the code of another user ran')\n"


@pytest.mark.parametrize(("which", "mode"), [("the folder", 0o770), ("a parent", 0o707)])
def test_a_folder_that_others_can_write_to_is_not_used(tmp_path, compiled, which, mode):
    root = tmp_path / "shared" / "cache"
    cache_folder.make_private(root.parent)
    shutil.copytree(compiled, root)
    for path in root.rglob("*.py"):
        path.write_text(FORGED)
    before = files(root)
    (root if which == "the folder" else root.parent).chmod(mode)
    process = start(MPITRAIN_CACHE_DIR=root, XDG_CACHE_HOME=tmp_path / "xdg")
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    assert err.count("mpitrain: warning: ") == 1
    assert f"compiled kernels are not cached in {root}: " in err
    assert "can be written by others" in err
    assert files(root) == before
    assert list((tmp_path / "xdg").rglob("*.nbc"))


@pytest.mark.parametrize("which", ["the folder", "a parent"])
@pytest.mark.parametrize("mode", [0o770, 0o707], ids=oct)
def test_a_folder_that_others_can_write_to_is_objected_to(tmp_path, which, mode):
    root = tmp_path / "shared" / "cache"
    cache_folder.make_private(root)
    assert cache_folder.objection(root) is None
    (root if which == "the folder" else root.parent).chmod(mode)
    assert "can be written by others" in cache_folder.objection(root)


def test_a_sticky_parent_is_trusted(tmp_path):
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp").chmod(0o1777)
    cache_folder.make_private(tmp_path / "tmp" / "mine")
    assert cache_folder.objection(tmp_path / "tmp" / "mine") is None
    assert "can be written by others" in cache_folder.objection(tmp_path / "tmp")


@pytest.mark.parametrize("which", ["the folder", "a parent", "a link"])
def test_a_folder_of_another_user_is_not_trusted(tmp_path, monkeypatch, which):
    """A file system on which one folder belongs to user 65534, which only root could make."""
    theirs, place = tmp_path / "theirs", tmp_path / "theirs" / "cache"
    cache_folder.make_private(place)
    owner = theirs if which == "a parent" else place
    real = Path.stat

    def stat(path, **options):
        found = real(path, **options)
        return found if path != owner else os.stat_result((*found[:4], 65534, *found[5:]))

    monkeypatch.setattr(Path, "stat", stat)
    if which == "a link":
        (tmp_path / "link").symlink_to(place)
        place = tmp_path / "link"
    assert cache_folder.objection(place) == f"{owner} belongs to another user (65534)"


@pytest.mark.parametrize("suffix", [".py", ".nbi"])
def test_files_that_others_can_write_are_replaced(tmp_path, compiled, suffix):
    root = Path(shutil.copytree(compiled, tmp_path / "cache"))
    for path in root.rglob(f"*{suffix}"):
        path.write_text(FORGED)
        path.chmod(0o666)
        os.utime(path, (cache._SOURCE_TIME, cache._SOURCE_TIME))
    assert sum(wait(start(MPITRAIN_CACHE_DIR=root)).values()) == 3
    assert not [path for path in root.rglob("*") if path.stat().st_mode & 0o077]


def test_a_forged_source_of_the_same_size_and_time_is_not_run(tmp_path, compiled):
    root = Path(shutil.copytree(compiled, tmp_path / "cache"))
    for path in root.rglob("*.py"):
        path.write_text(FORGED.ljust(path.stat().st_size))
        os.utime(path, (cache._SOURCE_TIME, cache._SOURCE_TIME))
    wait(start(MPITRAIN_CACHE_DIR=root))


def test_the_cache_of_numba_for_all_programs_is_not_used(tmp_path):
    wait(start(MPITRAIN_CACHE_DIR=tmp_path / "ours", NUMBA_CACHE_DIR=tmp_path / "numba"))
    assert list((tmp_path / "ours").rglob("*.nbc"))
    assert not (tmp_path / "numba").exists()


def test_cached_files_are_private_whatever_the_umask(tmp_path):
    wait(start("import os\nos.umask(0)\n", MPITRAIN_CACHE_DIR=tmp_path / "new" / "cache"))
    everything = [tmp_path / "new", *(tmp_path / "new").rglob("*")]
    assert not [path for path in everything if path.stat().st_mode & 0o077]
    assert wait(start("import os\nos.umask(0)\n", MPITRAIN_CACHE_DIR=tmp_path / "new" / "cache"))["loaded"] == 3


def test_no_escape_code_follows_the_output_in_a_terminal(tmp_path):
    """Numba initialises colorama where it is installed, which resets the colours at the end of the process."""
    master, terminal = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPITRAIN_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", "import colorama\n" + SCRIPT]
    subprocess.run(command, env=environment, stdout=terminal, stderr=subprocess.PIPE, timeout=400, check=True)
    os.close(terminal)
    assert os.read(master, 10_000).endswith(b"}\r\n")
    os.close(master)
