"""Whole jobs that are killed at random moments, and resumed: ``python -m benchmarks.chaos --whole-job 100``.

Each job trains the digits with one of the methods, and saves every second step. All its processes are killed
(SIGKILL): at a random moment, or, a third of them, while a checkpoint is written. It is then resumed, a third of the
jobs on another number of ranks. A job has gone on if the resumed one ends with exit code 0 and a result and leaves
nothing in /dev/shm; if it is synchronous and has as many ranks as before, its parameters must be those of a job that
was not killed, bit for bit. A job that is killed before its first checkpoint is started again in a new folder.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.chaos_runs import LIMIT_SECONDS, ROOT, finished, left_in_memory
from mpitrain.algorithms import METHODS
from mpitrain.records import checkpoint

ALGORITHMS = "allreduce,easgd,slowmo,gossip,sgp,downpour"
STEPS = 120


@dataclass(frozen=True)
class Job:
    """One job that was killed and resumed.

    Attributes:
        algorithm: Of the run.
        ranks, resumed_on: The numbers of ranks before and after.
        aim: ``any`` or ``checkpoint``.
        went_on: Whether the resumed job did what it should.
        reason: Why not.
    """

    algorithm: str
    ranks: int
    resumed_on: int
    aim: str
    went_on: bool
    reason: str = ""


def kill_and_resume(
    number: int, rng: random.Random, n_ranks: int, names: Sequence[str], references: dict[str, Path]
) -> Job:
    """Run one job, kill it, and resume it.

    Args:
        number: Of the job: a third is aimed at checkpoints, and another third is resumed on other ranks.
        rng: Draws the moment and the other number of ranks.
        n_ranks: The number of ranks.
        names: The methods, in turn.
        references: Finished runs that were not killed, by method; this function adds to them.
    """
    name, turn = names[number % len(names)], number + number // len(names)
    aim = "checkpoint" if turn % 3 == 0 else "any"
    others = [size for size in range(1, n_ranks + 2) if size != n_ranks]
    after = rng.choice(others) if turn % 3 == 1 else n_ranks
    is_exact = METHODS[name]().is_synchronous and after == n_ranks
    if is_exact and name not in references:
        references[name] = Path(tempfile.mkdtemp(prefix="mpitrain-chaos-")) / "run"
        finished(train(n_ranks, name, references[name]))
    folder = Path(tempfile.mkdtemp(prefix="mpitrain-chaos-"))
    try:
        before = set(os.listdir("/dev/shm"))
        _kill_at(rng, train(n_ranks, name, folder / "run"), folder / "run", aim)
        for name_of_memory in left_in_memory(before):  # of processes that could not remove it
            Path("/dev/shm", name_of_memory).unlink(missing_ok=True)
        if checkpoint.latest(folder / "run" / "checkpoints") is None:
            shutil.rmtree(folder / "run", ignore_errors=True)
            command = train(after, name, folder / "run")
        else:
            command = [*launcher(after), "train", "--quiet", "--resume", str(folder / "run")]
        output, code = finished(command)
        has_result, left = (folder / "run" / "result.json").exists(), left_in_memory(before)
        reason = "" if code == 0 and has_result else f"exit code {code}\n{output[-2000:]}"
        reason = reason or (f"left in /dev/shm: {left}" if left else "")
        if not reason and is_exact and not same_end(folder / "run", references[name]):
            reason = "its parameters are not those of the job that was not killed"
        return Job(name, n_ranks, after, aim, not reason, reason)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def launcher(n_ranks: int) -> list[str]:
    """Return the words that start mpitrain on some ranks."""
    return [str(ROOT / "jobs" / "local.sh"), str(n_ranks), sys.executable, "-m", "mpitrain"]


def train(n_ranks: int, algorithm: str, out: Path) -> list[str]:
    """Return the command of a job."""
    options = ["--quiet", "--algorithm", algorithm, "--steps", str(STEPS), "--checkpoint-every", "2", "--out", str(out)]
    return [*launcher(n_ranks), "train", *options, "--timeout", str(LIMIT_SECONDS / 2)]


def _kill_at(rng: random.Random, command: list[str], run: Path, aim: str) -> None:
    """Start a job, and kill all its processes at a random moment of its training, or while a checkpoint is written."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline, moment = time.monotonic() + LIMIT_SECONDS, None
    step = 2 * rng.randrange(1, STEPS // 2 - 2)
    while process.poll() is None and time.monotonic() < deadline:
        saved = checkpoint.latest(run / "checkpoints")
        if saved is not None and int(saved.name.split("-")[1].split(".")[0]) >= step:
            moment = moment or time.monotonic() + rng.uniform(0, 0.3)
            is_saving = any((run / "checkpoints").glob(".step-*.partial"))
            if is_saving if aim == "checkpoint" else time.monotonic() > moment:
                break
        time.sleep(0.001)
    for pid in _with_children(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.5)


def _with_children(pid: int) -> list[int]:
    """Return a process and all that it has started, also through others."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def same_end(run: Path, other: Path) -> bool:
    """Return whether the last checkpoints of two runs hold the same parameters, bit for bit."""
    ends = [checkpoint.newest_parts(folder / "checkpoints") for folder in (run, other)]
    return len(ends[0]) == len(ends[1]) and all(
        np.array_equal(np.asarray(a["optimizer"]["parameters"]), np.asarray(b["optimizer"]["parameters"]))
        for a, b in zip(*ends, strict=True)
    )
