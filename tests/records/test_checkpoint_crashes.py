"""A crash between any two file operations of a save leaves a complete checkpoint, and nothing else is taken for one.

A library loaded before libc ends the process in front of its k-th operation on the file system, for every k: Python's
calls and those of HDF5 alike.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from support.lone_world import LoneWorld

from mpitrain.records import KEEP, checkpoint
from mpitrain.records.checkpoint_writer import save

TESTS = Path(__file__).resolve().parent.parent
PARTIAL = ".step-00000003.partial"
FAST = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

OPERATIONS = r"""
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static int armed = 0, left = 0, trace = -1;

static void operation(const char *name, const char *path) {
    if (!armed) return;
    char line[4400];
    int n = snprintf(line, sizeof line, "%s %s\n", name, path);
    syscall(SYS_write, trace, line, n);
    if (--left == 0) syscall(SYS_exit_group, 9);
}

static void on_file(const char *name, int fd) {
    if (!armed) return;
    char link[64], path[4097];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    path[n < 0 ? 0 : n] = 0;
    if (path[0] == '/') operation(name, path);
}

template <typename F> static F *next(F *, const char *name) { return (F *)dlsym(RTLD_NEXT, name); }
#define NEXT(name) static auto *real = next(name, #name)

extern "C" {
void arm(int k, const char *path) {
    trace = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    left = k;
    armed = 1;
}

#define OPEN(name, call) \
    int name(const char *path, int flags, ...) { \
        va_list arguments; va_start(arguments, flags); mode_t mode = va_arg(arguments, mode_t); va_end(arguments); \
        if (flags & (O_WRONLY | O_RDWR | O_CREAT)) operation("open", path); \
        return call; \
    }
OPEN(open, syscall(SYS_openat, AT_FDCWD, path, flags, mode))
OPEN(open64, syscall(SYS_openat, AT_FDCWD, path, flags, mode))

int rename(const char *a, const char *b) noexcept { NEXT(rename); operation("rename", a); return real(a, b); }
int mkdir(const char *path, mode_t mode) noexcept { NEXT(mkdir); operation("mkdir", path); return real(path, mode); }
int rmdir(const char *path) noexcept { NEXT(rmdir); operation("remove", path); return real(path); }
int unlink(const char *path) noexcept { NEXT(unlink); operation("remove", path); return real(path); }
int unlinkat(int fd, const char *path, int flags) noexcept {
    NEXT(unlinkat);
    operation("remove", path);
    return real(fd, path, flags);
}
int fsync(int fd) { NEXT(fsync); on_file("sync", fd); return real(fd); }
int ftruncate64(int fd, off64_t n) noexcept { NEXT(ftruncate64); on_file("write", fd); return real(fd, n); }
int ftruncate(int fd, off_t n) noexcept { NEXT(ftruncate); on_file("write", fd); return real(fd, n); }
ssize_t write(int fd, const void *from, size_t n) { NEXT(write); on_file("write", fd); return real(fd, from, n); }
ssize_t pwrite64(int fd, const void *from, size_t n, off64_t at) {
    NEXT(pwrite64);
    on_file("write", fd);
    return real(fd, from, n, at);
}
ssize_t pwrite(int fd, const void *from, size_t n, off_t at) {
    NEXT(pwrite);
    on_file("write", fd);
    return real(fd, from, n, at);
}
ssize_t sendfile(int to, int from, off_t *at, size_t n) noexcept {
    NEXT(sendfile);
    on_file("write", to);
    return real(to, from, at, n);
}
ssize_t sendfile64(int to, int from, off64_t *at, size_t n) noexcept {
    NEXT(sendfile64);
    on_file("write", to);
    return real(to, from, at, n);
}
}
"""

SAVES = """
import ctypes, itertools, json, os, shutil, sys
from pathlib import Path
import numpy as np
from mpitrain.records.checkpoint_writer import save
from support.lone_world import LoneWorld

library = ctypes.CDLL(os.environ["LD_PRELOAD"])
for name, (step, size) in json.loads(sys.argv[2]).items():
    root = Path(sys.argv[1]) / name
    for k in itertools.count(1):
        folder = root / "crashes" / str(k)
        shutil.copytree(root / "before", folder / "checkpoints")
        child = os.fork()
        if child == 0:
            library.arm(k, os.fsencode(folder / "trace"))
            world = LoneWorld(0, size, dead=range(1, size))
            save(folder / "checkpoints", step, {"saved": "new", "x": np.arange(3000.0)}, world)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 9), code
        if code == 0:
            break
"""


def write_unfinished(folder):
    partial = folder / ".step-00000009.partial"
    partial.mkdir()
    (partial / "rank-00000.h5").write_bytes(b"half of a file")


def write_replaced(folder):
    """What a crash between the two renames of a save leaves."""
    (folder / "step-00000003").rename(folder / "step-00000003.replaced")


SCENARIOS = {  # steps of the checkpoints that are there, the step that is saved, ranks (all but the first have died)
    "the first": ([], 3, 1),
    "the second": ([2], 3, 1),
    "the third": ([1, 2], 3, 1),
    "the same step again": ([2, 3], 3, 1),
    "the only step again": ([3], 3, 1),
    "after a crash": ([2], 3, 1),
    "the same step again after a crash": ([3], 3, 1),
    "with dead ranks": ([2], 3, 3),
}


def alive(size):
    """Rank 0 of ``size`` ranks, of which all others have died."""
    return LoneWorld(0, size, dead=range(1, size))


@pytest.fixture(scope="module")
def crashes(tmp_path_factory):
    """A folder of each scenario, with what a crash before each operation of the save has left."""
    library = tmp_path_factory.mktemp("crash") / "operations.so"
    build = ["c++", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(library), "-ldl"]
    subprocess.run(build, input=OPERATIONS, text=True, check=True)
    with tempfile.TemporaryDirectory(dir=FAST) as folder:  # in memory: hundreds of saves are synced
        for name, (steps, step, size) in SCENARIOS.items():
            before = Path(folder) / name / "before"
            before.mkdir(parents=True)
            for old in steps:
                save(before, old, {"saved": old}, alive(size))
            if "after a crash" in name:
                write_unfinished(before)
                if step in steps:
                    write_replaced(before)
        saves = json.dumps({name: (step, size) for name, (_, step, size) in SCENARIOS.items()})
        environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": str(TESTS)}
        subprocess.run([sys.executable, "-c", SAVES, folder, saves], env=environment, check=True, timeout=300)
        yield {name: Path(folder) / name / "crashes" for name in SCENARIOS}


def load_everywhere(folder, size):
    """Load the newest checkpoint as every rank would."""
    state = checkpoint.load_newest(folder, LoneWorld(0, size))
    for rank in range(1, size):
        assert checkpoint.load(checkpoint.latest(folder), LoneWorld(rank, size))["saved"] == state["saved"]
    return state["saved"]


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_crash_before_any_file_operation_leaves_a_complete_checkpoint(crashes, capfd, name):
    steps, _, size = SCENARIOS[name]
    capfd.readouterr()
    found = []
    for k in itertools.count(1):
        run = crashes[name] / str(k)
        if not run.exists():
            break
        trace = (run / "trace").read_text().splitlines()
        if not steps and checkpoint.latest(run / "checkpoints") is None:
            found.append("none")
        else:
            found.append(load_everywhere(run / "checkpoints", size))
            assert capfd.readouterr().err == "", f"a checkpoint that cannot be read, at operation {k}: {trace[-1]}"
        # The next save succeeds, and removes what the crash has left.
        save(run / "checkpoints", 4, {"saved": 4}, alive(size))
        assert load_everywhere(run / "checkpoints", size) == 4
        left = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert left[-1] == "step-00000004"
        assert len(left) <= KEEP
        assert all(path.startswith("step-") for path in left)

    old = steps[-1] if steps else "none"
    n_old = found.count(old)
    assert n_old > 5  # the folder; of each part: open, write, sync, rename; syncs of the folder
    assert found == [old] * n_old + ["new"] * (len(found) - n_old)  # one rename makes the difference
    assert "new" in found
    check_order(trace, size)


def check_order(trace, size):
    """Whatever is written is synced before the rename that publishes it, and this before anything is removed."""
    operations = [line.split(" ", 1) for line in trace]
    publish = max(k for k, (what, path) in enumerate(operations) if what == "rename" and Path(path).name == PARTIAL)
    written = {path for what, path in operations[:publish] if what == "write"}
    assert sorted(Path(path).name.split(".")[1] for path in written) == [f"rank-{r:05d}" for r in range(size)]
    for path in written:
        last = {what: k for k, (what, at) in enumerate(operations) if at == path}
        assert last["write"] < last["sync"] < last["rename"] < publish
    partial = operations[publish][1]
    assert max(k for k, step in enumerate(operations) if step == ["sync", partial]) > publish - 3
    assert operations[publish + 1] == ["sync", str(Path(partial).parent)]
    assert not [path for what, path in operations[publish:] if what in ("write", "open")]
