"""A command that starts as a fork of a warm process behaves as one that starts as usual."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.launching import WARM, WARM_FOLDER, _session_members, environment, launch, python, warm_processes

pytestmark = [
    pytest.mark.launches,
    pytest.mark.skipif(environment("active").get("LD_PRELOAD") is None, reason="no C++ compiler"),
]

IN_TIME_SECONDS = 150.0
STATE = """
import os, resource, signal, sys, time
print(sys.argv, __name__, sys.path[0] == "", os.getcwd(), os.getppid(), sys.stdin.read(), os.environ.get("SEEN"))
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler, signal.getsignal(signal.SIGUSR1))
print(os.umask(0), resource.getrlimit(resource.RLIMIT_NOFILE)[0], open("/proc/self/comm").read(), os.getpriority(0, 0))
print([number for number in range(3, 200) if os.path.exists(f"/proc/self/fd/{number}")])
print("no newline at the end", file=sys.stderr, end="")
sys.exit(7)
"""
IS_WARM = "import sys; print('torch' in sys.modules)"
WAITING = """
import signal, sys, time
def stop(number, frame):
    print("heard", number, flush=True)
    sys.exit(9)
signal.signal(signal.SIGUSR1, stop)
print("waiting", flush=True)
while True:
    time.sleep(0.05)
"""


@pytest.fixture(scope="module", autouse=True)
def warm() -> Iterator[None]:
    """The warm processes of this run of tests, or some of this file."""
    if os.environ.get(WARM_FOLDER):
        yield
    else:
        with warm_processes(["active"]):
            yield


def output_of(words: list[str], cwd: Path, **variables: str) -> tuple[int, str]:
    done = subprocess.run(
        ["bash", "-c", 'umask 027; ulimit -n 200; "$@"; echo $?', "bash", *words],
        input="read",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd,
        env=environment("active", variables),
        check=False,
        timeout=IN_TIME_SECONDS,
    )
    lines = done.stdout.splitlines()
    return int(lines[-1].rpartition("end")[2]), "\n".join(lines)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + IN_TIME_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_warm_process_has_imported_torch_and_a_usual_one_has_not() -> None:
    command = [python("active"), "-c", IS_WARM]
    assert launch(0, command, mpi="active").output == "True\n"
    for variables in ({WARM: ""}, {"PYTHONHASHSEED": "1"}, {"LD_PRELOAD": ""}):
        assert launch(0, command, mpi="active", extra_env=variables).output == "False\n", variables
    assert launch(0, [command[0], "-I", *command[1:]], mpi="active").output == "False\n"


@pytest.mark.parametrize("form", ["-c", "-m", "script"])
def test_the_program_finds_the_same_state(tmp_path: Path, form: str) -> None:
    script = tmp_path / "program.py"
    script.write_text(STATE)
    words = {"-c": ["-c", STATE], "-m": ["-m", "program"], "script": ["program.py"]}[form]
    found = [
        output_of([python("active"), *words, "a", "b c"], tmp_path, SEEN="a\nb", PYTHONPATH=str(tmp_path), **variables)
        for variables in ({}, {WARM: ""})
    ]
    warm, usual = (
        (code, [word for word in text.split() if not word.isdigit() or len(word) < 4]) for code, text in found
    )
    assert warm == usual  # but for the numbers of processes
    assert warm[0] == 7


def test_a_module_that_replaces_an_imported_one_is_found(tmp_path: Path) -> None:
    (tmp_path / "h5py.py").write_text("stand_in = True")
    program = "import h5py, sys; print(hasattr(h5py, 'stand_in'), 'torch' in sys.modules)"
    extra = {"PYTHONPATH": str(tmp_path)}
    assert launch(0, [python("active"), "-c", program], mpi="active", extra_env=extra).output == "True False\n"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGABRT])
def test_the_death_of_a_fork_is_that_of_the_process(number: signal.Signals) -> None:
    program = f"import os, sys; assert 'torch' in sys.modules; os.kill(os.getpid(), {int(number)})"
    done = launch(0, [python("active"), "-c", program], mpi="active")
    assert done.returncode == -number, done.output


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGKILL])
def test_a_signal_to_the_process_reaches_its_fork(tmp_path: Path, number: signal.Signals) -> None:
    log = tmp_path / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [python("active"), "-c", WAITING], stdout=out, env=environment("active"), start_new_session=True
        )
    until(lambda: log.read_text().startswith("waiting"))
    assert len(_session_members(process.pid)) == 2
    process.send_signal(number)
    assert process.wait(IN_TIME_SECONDS) == (9 if number == signal.SIGUSR1 else -number)
    assert ("heard" in log.read_text()) == (number == signal.SIGUSR1)
    until(lambda: not _session_members(process.pid))


def test_ranks_of_a_launch_have_different_orders_of_sets() -> None:
    """A collective call for each name of a set hangs where ranks have different orders; the tests are to see that."""
    program = "import sys; print('torch' in sys.modules, hash('a name'))"
    lines = launch(2, [python("active"), "-c", program], mpi="active").output.splitlines()
    assert all(line.startswith("True ") for line in lines)
    assert len(set(lines)) == 2
