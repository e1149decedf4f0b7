"""One job at a time trains in a run folder; a job that was killed blocks it only briefly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import small_models

from mpitrain.errors import UsageError
from mpitrain.records import lock_file
from mpitrain.trainer import runlock
from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.loop import train
from mpitrain.trainer.runlock import RunLock

TAKE = """
import sys, time
from pathlib import Path
from mpitrain.trainer.runlock import RunLock
RunLock(Path(sys.argv[1])).acquire()
print("taken", flush=True)
time.sleep(600)
"""


@pytest.fixture
def path(tmp_path, monkeypatch) -> Path:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "lock"


def leave(path: Path, seconds_ago: float = 0.0, **changes: object) -> None:
    """A lock of another machine, unless the changes make it one of this."""
    path.write_text(json.dumps({**lock_file.describe(), "host": "other", "machine": "other", **changes}))
    when = path.stat().st_mtime - seconds_ago
    os.utime(path, (when, when))


def is_taken(path: Path, run: str = "") -> bool:
    lock = RunLock(path, run)
    try:
        lock.acquire()
    except UsageError:
        return False
    assert lock_file.read(path) == {**lock_file.describe(), "run": run}
    lock.release()
    assert not list(path.parent.iterdir())
    return True


def test_a_free_folder_is_taken_and_given_back(path):
    assert is_taken(path)
    assert is_taken(path)


def test_a_living_owner_on_this_machine_keeps_others_out_and_a_killed_one_does_not(path):
    with subprocess.Popen([sys.executable, "-c", TAKE, path], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "taken\n"
            with pytest.raises(UsageError, match=rf"is in use by process {other.pid} on .*: wait for its end"):
                RunLock(path).acquire()
            assert [file.name for file in path.parent.iterdir()] == ["lock"]
        finally:
            other.kill()
    assert is_taken(path)


def test_a_number_of_a_process_that_another_one_has_now_does_not_matter(path):
    here = lock_file.describe()
    leave(path, machine=here["machine"], pid=os.getppid(), started="1")
    assert is_taken(path)


@pytest.mark.parametrize(("owner", "mine", "taken"), [("7", "7", True), ("8", "7", False), ("", "", False)])
def test_the_next_lead_of_a_run_takes_the_lock_from_a_dead_one_on_another_host(path, owner, mine, taken):
    leave(path, run=owner)
    assert is_taken(path, mine) is taken


@pytest.mark.parametrize(("seconds_ago", "taken"), [(0, False), (100, False), (130, True)])
def test_an_owner_on_another_machine_keeps_others_out_while_it_touches_the_file(path, seconds_ago, taken):
    leave(path, seconds_ago)
    assert is_taken(path) is taken


@pytest.mark.parametrize(("job", "restart", "taken"), [("7", "1", True), ("7", "0", False), ("8", "1", False)])
def test_a_job_that_was_requeued_to_another_machine_goes_on_at_once(path, monkeypatch, job, restart, taken):
    leave(path, job="7", restart="0")
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
    assert is_taken(path) is taken


@pytest.mark.parametrize("text", ["", "half of", "[]"])
def test_a_file_without_an_owner_counts_while_it_is_fresh(path, text):
    path.write_text(text)
    assert not is_taken(path)
    os.utime(path, (1, 1))
    assert is_taken(path)


def test_it_is_touched_while_it_is_held(path, monkeypatch):
    monkeypatch.setattr(runlock, "SECONDS_BETWEEN_TOUCHES", 0.01)
    lock = RunLock(path)
    lock.acquire()
    os.utime(path, (1, 1))
    while path.stat().st_mtime == 1:  # a test that hangs is ended
        lock._released.wait(0.01)
    lock.release()


def test_a_file_that_another_job_took_over_stays(path):
    lock = RunLock(path)
    lock.acquire()
    leave(path)
    lock.release()
    assert path.exists()


@pytest.mark.ranks(1, 2, 3)
def test_a_second_job_is_refused_on_all_ranks_and_an_error_gives_the_folder_back(world, mpi_tmp_path):
    folder = Path(mpi_tmp_path) / "run"
    config = TrainConfig(model="support.small_models:watched", epochs=None, steps=5, quiet=True, out=str(folder))
    if world.rank == 0:
        folder.mkdir()
        leave(folder / "lock")
    world.barrier()
    with pytest.raises(UsageError, match="is in use by process"):
        train(config, world)
    world.barrier()
    if world.rank == 0:
        (folder / "lock").unlink()

    def fail(n: int) -> None:
        seen.append((folder / "lock").exists())
        raise ArithmeticError

    seen: list[bool] = []
    small_models.on_batch = fail
    try:
        with pytest.raises(ArithmeticError):
            train(config, world)
    finally:
        small_models.on_batch = None
    world.barrier()
    assert not (folder / "lock").exists()
