"""Run `mpitrain` commands without a launcher, each in a fork of one process that has imported torch.

Importing torch takes two seconds of a core; a fork takes milliseconds. The fork imports mpi4py.MPI itself and with that
starts MPI, as in a process of its own.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.launching import Finished, _end_session, environment, python


class Warm:
    """A process that forks for each command. A context manager.

    Args:
        extra_env: Environment variables of all commands.
    """

    def __init__(self, extra_env: Mapping[str, str]) -> None:
        tests = str(Path(__file__).resolve().parents[1])
        env = environment("active", {**extra_env, "PYTHONPATH": tests})
        self._process = subprocess.Popen(
            [python("active"), "-m", "support.warm"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
            start_new_session=True,
        )

    def __enter__(self) -> Warm:
        return self

    def __exit__(self, *exception: object) -> None:
        _end_session(self._process)
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()

    def run(self, *arguments: str, cwd: str | Path, timeout_seconds: float = 150.0) -> Finished:
        """Run `mpitrain` with these arguments."""
        start = time.monotonic()
        assert self._process.stdin is not None and self._process.stdout is not None  # noqa: PT018
        with tempfile.NamedTemporaryFile() as output:
            request = {"arguments": arguments, "cwd": str(cwd), "output": output.name}
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            ready, _, _ = select.select([self._process.stdout], [], [], timeout_seconds)
            code = json.loads(self._process.stdout.readline()) if ready else -1
            text = Path(output.name).read_text(errors="replace")
        return Finished(code, text, time.monotonic() - start, not ready)


def serve() -> int:
    """Fork for each request on stdin and write the exit code of its command; return a command's code in its fork."""
    for name in ("h5py", "mpitrain.cli.train", "mpitrain.kernels", "numba", "torch"):
        importlib.import_module(name)
    assert "mpi4py.MPI" not in sys.modules  # importing it starts MPI
    while line := os.fdopen(0, "rb", 0, closefd=False).readline():
        pid = os.fork()
        if not pid:
            return run(json.loads(line))
        _, status = os.waitpid(pid, 0)
        os.write(1, b"%d\n" % os.waitstatus_to_exitcode(status))
    return 0


def run(request: dict[str, Any]) -> int:
    """Run the command of a request in this process."""
    from mpitrain.cli.main import main

    output = os.open(request["output"], os.O_WRONLY | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for there, here in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(there, here)
    os.chdir(request["cwd"])
    sys.argv[1:] = request["arguments"]
    return main()


if __name__ == "__main__":
    sys.exit(serve())
