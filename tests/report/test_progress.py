"""The state of a run: numbers that follow from its rows, whatever state it is in and whatever its files hold."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from support.run_folders import write_run

from mpitrain.errors import UsageError
from mpitrain.records import lock_file
from mpitrain.report.progress import snapshot


def test_a_running_run_has_its_pace_its_shares_and_the_time_that_remains(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [1.0, 5.0, 20.0, 30.0], state="running", total=120.0, n_ranks=3)
    found = snapshot(folder)
    assert (found.state, found.done) == ("running", 0.25)
    assert found.remaining_seconds == pytest.approx(90.0)  # 30 of 120 s, at the pace of one second per second
    np.testing.assert_allclose(found.rates, [10, 5, 5])
    np.testing.assert_allclose(found.waiting, [0, 0.25, 0.25])
    assert found.numbers == {
        "time": "30.0 s",
        "ETA": "90.0 s",
        "step": "300",
        "loss": "0.0323",
        "test loss": "0.2500",
        "test metric": "accuracy 87.50%",
        "learning rate": "0.05",
        "samples/s": "640",
        "shares": "compute 50%, exchange 25%, waiting 25%",
        "staleness": "median 2",
        "ranks alive": "3 of 3",
        "last checkpoint": "-",
    }


def test_the_rates_are_those_of_the_last_seconds(tmp_path: Path) -> None:
    """A row of step 0 at 100 s: the ranks have stood still until 10 s ago."""
    from mpitrain.records.metrics import MetricsWriter
    from mpitrain.trainer.metrics import tables

    folder = write_run(tmp_path / "run", [], state="running")
    with MetricsWriter(folder / "metrics.h5", tables(2, [])) as metrics:
        for seconds, steps in ((0.0, 0), (100.0, 0), (110.0, 50)):
            metrics.append("ranks", seconds=seconds, steps=[steps, 2 * steps], waiting_seconds=[0, 0], alive=[1, 1])
            metrics.append("progress", seconds=seconds, samples=32 * steps, done=steps / 100)
    found = snapshot(folder)
    np.testing.assert_allclose(found.rates, [5, 10])
    assert found.numbers["samples/s"] == "160"
    assert found.remaining_seconds == pytest.approx(10.0)


def test_dead_ranks_and_the_newest_checkpoint_are_shown(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [1.0, 2.0], state="running", n_ranks=4, alive=[0, 2])
    for step in (9, 120):
        (folder / "checkpoints" / f"step-{step:08}").mkdir(parents=True)
    os.utime(folder / "checkpoints" / "step-00000120", (0, 0))
    found = snapshot(folder)
    assert found.alive.tolist() == [1, 0, 1, 0]
    assert found.numbers["ranks alive"] == "2 of 4"
    assert found.numbers["last checkpoint"].startswith("step 120, ")


@pytest.mark.parametrize("state", ["finished", "interrupted"])
def test_a_run_that_has_ended_has_no_time_left(tmp_path: Path, state: str) -> None:
    found = snapshot(write_run(tmp_path / "run", [1.0, 50.0], state=state))
    assert found.state == state
    assert found.done == (1.0 if state == "finished" else 0.5)
    assert np.isnan(found.remaining_seconds)


def test_a_run_is_interrupted_when_the_owner_of_its_lock_is_gone(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [1.0], state="running")
    assert snapshot(folder).state == "running"
    (folder / "lock").write_text(json.dumps({**lock_file.describe(), "pid": 0}))
    assert snapshot(folder).state == "interrupted"
    (folder / "lock").write_text(json.dumps({**lock_file.describe(), "machine": "another"}))
    assert snapshot(folder).state == "running"
    os.utime(folder / "lock", (0, 0))  # nobody has touched it for long
    assert snapshot(folder).state == "interrupted"


def test_a_run_that_has_just_begun_has_no_numbers_yet(tmp_path: Path) -> None:
    found = snapshot(write_run(tmp_path / "run", [], state="running"))
    assert set(found.numbers.values()) == {"-"}
    assert found.rates.size == 0
    (tmp_path / "run" / "metrics.h5").unlink()
    assert set(snapshot(tmp_path / "run").numbers.values()) == {"-"}


def test_texts_from_the_files_are_escaped(tmp_path: Path) -> None:
    evil = "\x1b[2J\x1b]0;owned\x07"
    config = {"algorithm": evil, "config": {"data": evil, "model": evil, "metric": evil}}
    folder = write_run(tmp_path / "ru\x1bn", [1.0, 2.0], state="running", config=config)
    found = snapshot(folder)
    assert "\x1b" not in found.line()
    assert "\\x1b[2J" in found.title
    assert "\\x1b[2J" in found.numbers["test metric"]
    assert not any("\x1b" in text for text in (found.title, *found.numbers.values()))


@pytest.mark.parametrize("name", ["config.json", "result.json", "metrics.h5"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    folder = write_run(tmp_path / "run", [1.0])
    (folder / name).write_bytes(b"[" * 100_000)
    with pytest.raises(UsageError, match=name.replace(".", r"\.")):
        snapshot(folder)
