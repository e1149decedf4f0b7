"""A run that ends early for any reason ends all ranks soon, and its newest checkpoint is usable."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.launching import ROOT, Finished, _end_session, _session_members, environment, installed, launch

pytestmark = pytest.mark.launches

IN_TIME_SECONDS = 250.0  # a hang would last for ever
ENDS_WITHIN_SECONDS = 250.0
EXTRA = {"PYTHONPATH": str(ROOT / "tests")}
FOR_EVER = ["--minutes", "100", "--checkpoint-every", "20"]


def command(*arguments: str, out: Path) -> list[str]:
    return ["mpitrain", "train", "--quiet", *arguments, "--out", str(out)]


def run_until(
    there_is: Callable[[], object], act: Callable[[subprocess.Popen[bytes]], None], arguments: list[str], mpi: str
) -> Finished:
    """Start a run on 2 ranks, act on it once a condition holds, and wait for its end."""
    out = Path(arguments[arguments.index("--out") + 1]).with_suffix(".log")
    with out.open("wb") as log:
        process = subprocess.Popen(
            [str(ROOT / "jobs" / "local.sh"), "2", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment(mpi, EXTRA),
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + IN_TIME_SECONDS
            while not there_is():
                assert process.poll() is None, out.read_text()
                assert time.monotonic() < deadline, out.read_text()
                time.sleep(0.02)
            began = time.monotonic()
            act(process)
            process.wait(ENDS_WITHIN_SECONDS)
            seconds = time.monotonic() - began
            deadline = time.monotonic() + ENDS_WITHIN_SECONDS  # of processes that have just been killed
            while _session_members(process.pid):
                assert time.monotonic() < deadline, "a process was left behind"
                time.sleep(0.02)
        finally:
            _end_session(process)
    return Finished(process.returncode, out.read_text(errors="replace"), seconds, False)


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("checkpoints/step-*"))


@pytest.mark.parametrize("mpi", installed())
def test_the_launcher_passes_the_signal_on_that_saves_and_stops(mpi: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = command("--minutes", "100", "--checkpoint-every", "0", out=run)
    done = run_until(run.joinpath("metrics.h5").exists, lambda p: p.send_signal(signal.SIGUSR1), arguments, mpi)
    assert done.returncode == 3, done.output
    assert done.output.count(f"continue on 2 ranks with: mpitrain train --resume {run}") == 1
    assert "Traceback" not in done.output
    assert len(checkpoints(run)) == 1
    assert not (run / "result.json").exists()


def rank_pid(launcher: int, rank: int) -> int:
    """Return the process number of a rank of this launch."""
    for pid in _session_members(launcher):
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        if any(f"{name}={rank}".encode() in variables for name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK")):
            return pid
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.parametrize(("algorithm", "number"), [("easgd", signal.SIGTERM), ("allreduce", signal.SIGINT)])
def test_a_signal_to_any_rank_saves_and_stops_all(algorithm: str, number: signal.Signals, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = command("--algorithm", algorithm, "--minutes", "100", "--checkpoint-every", "0", out=run)
    done = run_until(
        run.joinpath("metrics.h5").exists, lambda p: os.kill(rank_pid(p.pid, 1), number), arguments, "openmpi"
    )
    assert done.returncode == 128 + number, done.output
    assert done.output.count(f"continue on 2 ranks with: mpitrain train --resume {run}") == 1
    assert "Traceback" not in done.output
    assert "was killed" not in done.output
    assert len(checkpoints(run)) == 1
    assert not (run / "result.json").exists()


def test_a_rank_killed_by_the_host_is_named_with_the_way_to_resume(tmp_path: Path) -> None:
    """Open MPI ends the others a quarter of a second later: it is stopped until one of them has said it."""
    run = tmp_path / "run"

    def kill_rank_0(launcher: subprocess.Popen[bytes]) -> None:
        launcher.send_signal(signal.SIGSTOP)
        os.kill(rank_pid(launcher.pid, 0), signal.SIGKILL)

    arguments = command("--model", "support.small_models:continues_the_launcher", *FOR_EVER, out=run)
    done = run_until(lambda: checkpoints(run), kill_rank_0, arguments, "openmpi")
    assert done.returncode not in (0, 2, 3, 4), done.output
    line = (
        rf"rank 0 \(process \d+ on \S+\) was killed or crashed in step \d+: resume with: mpitrain train --resume {run}"
    )
    assert len(re.findall(line, done.output)) == 1, done.output


@pytest.mark.parametrize("mpi", installed()[-1:])
def test_an_interrupt_ends_all_ranks(mpi: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = run_until(lambda: checkpoints(run), lambda p: p.send_signal(signal.SIGINT), command(*FOR_EVER, out=run), mpi)
    assert done.returncode != 0
    assert not (run / "result.json").exists()


def test_a_killed_rank_ends_all_and_the_newest_checkpoint_is_good(tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = command("--model", "support.small_models:kills_rank_1_after_a_checkpoint", *FOR_EVER, out=run)
    done = launch(2, arguments, timeout_seconds=IN_TIME_SECONDS, extra_env={**EXTRA, "RUN": str(run)})
    assert not done.timed_out
    assert done.returncode not in (0, 2, 3), done.output
    assert not (run / "result.json").exists()
    assert checkpoints(run)
    before = int(checkpoints(run)[-1].removeprefix("step-"))
    resume = ["mpitrain", "train", "--resume", str(run), "--steps", str(before + 9), "--json"]
    elsewhere = {**EXTRA, "RUN": str(tmp_path / "elsewhere")}
    done = launch(2, resume, timeout_seconds=IN_TIME_SECONDS, extra_env=elsewhere)
    assert done.returncode == 0, done.output
    result = json.loads(done.output.splitlines()[-1])
    assert result["steps_of_ranks"][0] == before + 9
    assert (run / "result.json").exists()


@pytest.mark.parametrize("mpi", installed()[-1:])
def test_an_exception_in_a_model_on_one_rank_ends_all_with_its_traceback(mpi: str, tmp_path: Path) -> None:
    arguments = command(
        "--model", "support.small_models:raises_at_step_3_of_rank_1", "--minutes", "100", out=tmp_path / "run"
    )
    done = launch(2, arguments, mpi=mpi, timeout_seconds=IN_TIME_SECONDS, extra_env=EXTRA)
    assert not done.timed_out
    assert done.returncode not in (0, 2, 3), done.output
    assert "rank 1 of 2 failed:\nTraceback (most recent call last):" in done.output
    assert "ArithmeticError: a reason of the model's own" in done.output
    assert done.output.count("Traceback") == 1


def test_a_run_that_is_stopped_without_a_folder_says_so(tmp_path: Path) -> None:
    marker = tmp_path / "started"
    (tmp_path / "telling.py").write_text(
        "from support import small_models\n"
        "def model():\n"
        f"    return small_models.Watched(lambda n: n == 5 and open({str(marker)!r}, 'w').close())\n"
    )
    process = subprocess.Popen(
        ["mpitrain", "train", "--quiet", "--model", "telling:model", "--minutes", "100"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=tmp_path,
        env=environment("openmpi", EXTRA),
        text=True,
    )
    try:
        deadline = time.monotonic() + IN_TIME_SECONDS
        while not marker.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGUSR1)
        output, _ = process.communicate(timeout=ENDS_WITHIN_SECONDS)
    finally:
        process.kill()
    assert process.returncode == 3
    assert output.startswith("mpitrain: stopped at step ")
    assert output.endswith("; the run cannot be continued: there was no --out\n")
