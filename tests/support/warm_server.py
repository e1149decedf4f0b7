"""A warm process: it has imported torch and forks for each Python command of the tests' launches (warm_start.cpp).

    python warm_server.py LISTENER SESSIONS OWNER

Importing torch takes two seconds of a core; a fork takes milliseconds. A fork runs the program of the process that asks
with its arguments, environment, open files, working directory, limits and priority. MPI starts after the fork, as in a
process of its own. What a fork cannot reproduce is refused, and the command starts as usual: other options of the
interpreter, another environment of packages, variables that libraries read when they are imported, namespaces.

The fork leads a session of its own. A file `PARENT-FORK` in SESSIONS says to which session it belongs. The process ends
with its OWNER.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import io
import os
import pkgutil
import resource
import runpy
import selectors
import signal
import socket
import struct
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

MODULES = ("h5py", "matplotlib.figure", "mpi4py", "numba", "pytest", "torch")
NOT_SHARED = ("mpi4py.MPI", "mpitrain.collectives.world.watchdog")
"""Modules that start MPI, or open a pipe, when they are imported."""
MOST_FILES = 250
FIRST_OF_IMPORTS = (
    300  # files that imported modules open have larger numbers, and those of the process that asks smaller
)
FIRST_FREE = 600  # the files of the process that asks are moved there before they get their numbers
STARTED, ENDED, KILLED = 1, 2, 3

# Variables that the interpreter or a library reads when it starts. MPITRAIN_ and OMPI_ are read when a world starts.
READ_AT_IMPORT = ("PYTHON", "LD_", "OMP_", "MKL_", "KMP_", "NUMBA_", "NUMPY_", "OPENBLAS_", "TORCH", "PYTORCH", "HDF5_")
READ_AT_IMPORT += ("LC_", "LANG", "MALLOC_", "GLIBC_", "GOMP_", "MPI4PY_", "MPL", "TZ")
NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")


class Refused(Exception):
    """The process that asks must start Python itself."""


@dataclass
class Request:
    """The program of the process that asks. `files` maps its numbers of open files to those of this process."""

    pid: int
    files: dict[int, int]
    arguments: list[str] = field(default_factory=list)
    environ: dict[str, str] = field(default_factory=dict)

    def proc(self, name: str) -> str:
        return f"/proc/{self.pid}/{name}"

    def read(self) -> None:
        """Read the arguments and the environment, and refuse what a fork cannot reproduce."""
        words = [os.fsdecode(word) for word in Path(self.proc("cmdline")).read_bytes().split(b"\0")[:-1]]
        pairs = [os.fsdecode(pair) for pair in Path(self.proc("environ")).read_bytes().split(b"\0") if b"=" in pair]
        self.environ = dict(pair.split("=", 1) for pair in pairs)
        self.arguments = words[1:]
        while self.arguments[:1] == ["-u"]:
            del self.arguments[0]
        if not self.arguments or (self.arguments[0][:1] == "-" and self.arguments[0] not in ("-c", "-m")):
            raise Refused("options of the interpreter")
        if os.path.dirname(self._program(words[0])) != os.path.dirname(sys.executable):
            raise Refused("another environment of packages")
        if _read_at_import(self.environ) != _read_at_import(os.environ):
            raise Refused("variables that libraries read when they are imported")
        if any(os.readlink(self.proc(f"ns/{name}")) != os.readlink(f"/proc/self/ns/{name}") for name in NAMESPACES):
            raise Refused("other namespaces")
        if not {0, 1, 2} <= self.files.keys() or max(self.files) >= FIRST_OF_IMPORTS:
            raise Refused("a closed standard stream, or files with large numbers")
        if os.getuid() != os.stat(self.proc("")).st_uid:
            raise Refused("another user")
        for folder in self.first_folders():
            if _shadows(folder):
                raise Refused(f"{folder} replaces modules that this process has imported")

    def _program(self, name: str) -> str:
        """Return the path of the interpreter."""
        if "/" in name:
            return os.path.normpath(os.path.join(os.readlink(self.proc("cwd")), name))
        folders = self.environ.get("PATH", "").split(os.pathsep)
        paths = (os.path.join(folder, name) for folder in folders)
        return next((path for path in paths if os.access(path, os.X_OK)), name)

    def first_folders(self) -> list[str]:
        """Return the entries of sys.path before those of the interpreter."""
        here = os.readlink(self.proc("cwd"))
        first = {"-c": "", "-m": here}.get(self.arguments[0])
        if first is None:
            script = os.path.realpath(os.path.join(here, self.arguments[0]))
            if not os.path.isfile(script):
                raise Refused("no script")
            first = os.path.dirname(script)
        variable = self.environ.get("PYTHONPATH", "")
        return [first, *(os.path.join(here, entry) for entry in variable.split(os.pathsep) if variable)]


def _read_at_import(environ: Mapping[str, str]) -> dict[str, str]:
    others = ("PYTHONPATH", "LD_LIBRARY_PATH")
    return {name: environ[name] for name in environ if name.startswith(READ_AT_IMPORT) and name not in others}


def _shadows(folder: str) -> bool:
    """Return whether a folder that comes first on sys.path has other files for modules that are imported."""
    try:
        names = {name.partition(".")[0]: name for name in os.listdir(folder or ".")}
    except OSError:
        return False
    if "sitecustomize" in names or "usercustomize" in names:
        return True
    for name in names.keys() & sys.modules.keys():
        file = getattr(sys.modules[name], "__file__", None)
        ours = os.path.dirname(file) if file and os.path.basename(file).startswith("__init__.") else file
        theirs = os.path.join(folder, names[name])
        is_code = os.path.isfile(os.path.join(theirs, "__init__.py")) or theirs.endswith((".py", ".so"))
        if is_code and (ours is None or os.path.realpath(ours) != os.path.realpath(theirs)):
            return True
    return False


class Server:
    """The loop of the warm process.

    Args:
        listener: The socket that asking processes connect to.
        sessions: The folder for the files that name the sessions of forks.
        owner: The process with which this one ends.
    """

    def __init__(self, listener: socket.socket, sessions: Path, owner: int) -> None:
        self._listener, self._sessions = listener, sessions
        self._selector = selectors.DefaultSelector()
        self._links: dict[int, socket.socket] = {}  # of each running fork, to the process that asked
        self._wakeup = os.pipe()
        for end in self._wakeup:
            os.set_blocking(end, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wakeup[1])
        self._selector.register(listener, selectors.EVENT_READ)
        self._selector.register(self._wakeup[0], selectors.EVENT_READ)
        self._owner = os.pidfd_open(owner)
        self._selector.register(self._owner, selectors.EVENT_READ)

    def serve(self) -> Request | None:
        """Fork for each request; return the request in its fork, and None at the end of the owner."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._listener:
                    request = self._accept()
                    if request is not None:
                        return request
                elif key.fileobj == self._wakeup[0]:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._wakeup[0], 4096)
                    self._reap()
                elif key.fileobj == self._owner:
                    for fork in self._links:
                        _kill(fork)
                    return None
                else:  # the process that asked is gone
                    self._selector.unregister(key.fileobj)
                    _kill(key.data)

    def _accept(self) -> Request | None:
        link, _ = self._listener.accept()
        pid = struct.unpack("3i", link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        content, files, _, _ = socket.recv_fds(link, 4 * MOST_FILES, MOST_FILES)
        numbers = struct.unpack(f"{len(content) // 4}i", content)
        request = Request(pid, dict(zip(numbers, files)))
        try:
            request.read()
            session = os.getsid(pid)
            fork = os.fork()
            if not fork:
                os.setsid()
                self._close(link)
                return request
            self._sessions.joinpath(f"{session}-{fork}").touch()
            self._links[fork] = link
            self._selector.register(link, selectors.EVENT_READ, fork)
            self._send(link, STARTED, fork)
        except (Refused, OSError, UnicodeError) as reason:
            print(f"refused: {reason}: {request.arguments}", flush=True)
            link.close()
        finally:
            if os.getpid() == SERVER:
                for file in files:
                    os.close(file)
        return None

    def _close(self, link: socket.socket) -> None:
        """Close the files of the warm process in its fork, by the objects that would close their numbers later."""
        signal.set_wakeup_fd(-1)
        for own in (self._selector, self._listener, link, *self._links.values()):
            own.close()
        for file in (*self._wakeup, self._owner):
            os.close(file)

    def _reap(self) -> None:
        while self._links:
            fork, status = os.waitpid(-1, os.WNOHANG)
            if not fork:
                break
            link = self._links.pop(fork)
            with contextlib.suppress(KeyError):
                self._selector.unregister(link)
            code = os.waitstatus_to_exitcode(status)
            self._send(link, *((ENDED, code) if code >= 0 else (KILLED, -code)))
            link.close()
        for name in os.listdir(self._sessions):
            if not _has_processes(int(name.partition("-")[2])):
                self._sessions.joinpath(name).unlink(missing_ok=True)

    @staticmethod
    def _send(link: socket.socket, kind: int, value: int) -> None:
        with contextlib.suppress(OSError):
            link.send(struct.pack("2i", kind, value))


def _has_processes(session: int) -> bool:
    try:
        os.killpg(session, 0)
    except ProcessLookupError:
        return False
    return True


def _kill(fork: int) -> None:
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError):
            kill(fork, signal.SIGKILL)


def become(request: Request) -> None:
    """Take over the state of the process that asks, but for its number and its session."""
    ignored = int(
        next(line for line in Path(request.proc("status")).read_text().splitlines() if "SigIgn" in line)[7:], 16
    )
    for number in signal.valid_signals() - {
        signal.SIGKILL,
        signal.SIGSTOP,
        signal.SIGINT,
        signal.SIGPIPE,
        signal.SIGXFSZ,
    }:
        signal.signal(number, signal.SIG_IGN if ignored >> (number - 1) & 1 else signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN if ignored >> (signal.SIGINT - 1) & 1 else signal.default_int_handler)
    os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, request.pid))
    os.sched_setaffinity(0, os.sched_getaffinity(request.pid))
    status = Path(request.proc("status")).read_text().splitlines()
    os.umask(int(next(line for line in status if line.startswith("Umask:")).split()[1], 8))
    Path("/proc/self/comm").write_text(Path(request.proc("comm")).read_text().strip())
    parent = int(next(line for line in status if line.startswith("PPid:")).split()[1])
    os.getppid = lambda: parent
    os.chdir(request.proc("cwd"))
    os.environ.clear()
    os.environ.update(request.environ)
    os.environ.pop("MPITRAIN_TESTS_WARM", None)  # what the program itself starts, starts as usual
    moved = {number: fcntl.fcntl(file, fcntl.F_DUPFD, FIRST_FREE) for number, file in request.files.items()}
    for file in request.files.values():
        os.close(file)
    for number, file in moved.items():
        os.dup2(file, number)
        os.close(file)
    for limit in {getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")}:
        resource.setrlimit(limit, resource.prlimit(request.pid, limit))
    sys.stdin = sys.__stdin__ = open(0, encoding=sys.stdin.encoding, errors=sys.stdin.errors, closefd=False)  # noqa: SIM115
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__ = _stream(sys.stdout), _stream(sys.stderr)
    sys.path[:0] = request.first_folders()


def _stream(stream: Any) -> io.TextIOWrapper:
    """Return a new stream for the file of an unbuffered one."""
    return io.TextIOWrapper(
        io.FileIO(stream.fileno(), "w", closefd=False),
        encoding=stream.encoding,
        errors=stream.errors,
        newline="\n",
        line_buffering=os.isatty(stream.fileno()),
        write_through=True,
    )


def run(request: Request) -> None:
    """Run the program as the interpreter would."""
    first, *rest = request.arguments
    if first == "-m":
        sys.argv = [rest[0], *rest[1:]]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        module = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(module))
    else:
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name="__main__")


class Refusing(MetaPathFinder):
    """An importer that refuses the modules of which each process needs its own."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname in NOT_SHARED:
            raise ImportError(fullname)


def import_shared() -> None:
    """Import the libraries, and all modules of mpitrain that do not import MPI.

    Raises:
        RuntimeError: A module opened a pipe or a socket, which all forks would share.
    """
    import numba

    import mpitrain

    refusing = Refusing()
    sys.meta_path.insert(0, refusing)
    names = [module.name for module in pkgutil.walk_packages(mpitrain.__path__, "mpitrain.")]
    for name in [*MODULES, *(name for name in names if not name.endswith("__main__"))]:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    sys.meta_path.remove(refusing)
    numba.njit(lambda x: x)(1.0)  # numba imports the half of itself when it compiles
    for file in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if int(file) >= FIRST_OF_IMPORTS and ":" in (opened := os.readlink(f"/proc/self/fd/{file}")):
                raise RuntimeError(f"an imported module has opened {opened}: add it to NOT_SHARED")


def main() -> Request | None:
    """Import, then serve."""
    number, sessions, owner = sys.argv[1:]
    listener = socket.socket(fileno=int(number))
    listener.set_inheritable(False)
    del sys.path[0]  # the folder of this file
    occupied = [os.open(os.devnull, os.O_RDONLY) for _ in range(FIRST_OF_IMPORTS)]
    import_shared()
    for file in occupied:
        os.close(file)
    gc.collect()
    gc.freeze()
    return Server(listener, Path(sessions), int(owner)).serve()


SERVER = os.getpid()

if __name__ == "__main__":
    asked = main()
    if asked is not None:
        become(asked)
        run(asked)
