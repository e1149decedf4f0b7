"""`mpitrain watch`: one frame, lines in a pipe, a live view in a terminal; it ends with the run."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.launching import environment
from support.run_folders import finish, write_run

from mpitrain.cli import watch
from mpitrain.cli.main import main


def test_once_prints_a_frame_with_every_number_and_every_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run", [1.0, 25.0], state="running", n_ranks=3, alive=[0, 2])
    assert main(["watch", str(folder), "--once"]) == 0
    out = capsys.readouterr().out
    lines = [line.rstrip() for line in out.splitlines()]
    assert lines[0] == "run (easgd, digits, mlp)"
    assert lines[1].startswith("running")
    assert lines[1].endswith("25%")
    assert "loss             0.0385" in lines
    assert [line.split() for line in lines[-3:]] == [
        ["0", "10.0", "0%"],
        ["1", "5.0", "25%", "dead"],
        ["2", "5.0", "25%"],
    ]
    assert all(len(line) <= 80 for line in lines)
    assert "\x1b" not in out


def test_a_large_job_shows_its_dead_and_its_slowest_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alive = [rank for rank in range(40) if rank != 0]
    folder = write_run(tmp_path / "run", [1.0, 2.0], state="running", n_ranks=40, alive=alive)
    assert main(["watch", str(folder), "--once"]) == 0
    out = capsys.readouterr().out
    assert "the slowest 16 of 40 ranks" in out
    rows = [line.split() for line in out.splitlines() if line.split()[1:2] in (["10.0"], ["5.0"])]
    assert rows[0] == ["0", "10.0", "0%", "dead"]
    assert len(rows) == 16


def test_a_pipe_gets_a_line_for_each_new_state_and_the_view_ends_with_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(tmp_path / "run", [1.0, 2.0], state="running")
    looks: list[float] = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 5:
            finish(folder)

    monkeypatch.setattr(watch.time, "sleep", sleep)
    assert main(["watch", str(folder), "--every", "0.25"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert looks == [0.25] * 5
    assert [line.split(":")[1].split(",")[0].strip() for line in lines] == ["running 2%", "finished 100%"]


@pytest.mark.launches
def test_a_terminal_gets_a_live_view_that_ends_with_the_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [1.0, 2.0], state="running", config={"algorithm": "\x1b[2J"})
    parent, child = pty.openpty()
    command = [sys.executable, "-m", "mpitrain", "watch", str(folder), "--every", "0.05"]
    env = environment("active", {"TERM": "xterm", "COLUMNS": "100"})
    process = subprocess.Popen(command, stdin=child, stdout=child, stderr=child, env=env)
    os.close(child)
    seen = b""
    finished = threading.Event()

    def end_the_run() -> None:
        deadline = time.monotonic() + 120
        while seen.count(b"running") < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        finish(folder)
        finished.set()

    thread = threading.Thread(target=end_the_run)
    thread.start()
    try:
        while True:
            try:
                piece = os.read(parent, 65536)
            except OSError:  # the other side is closed
                break
            if not piece:
                break
            seen += piece
    finally:
        thread.join()
        os.close(parent)
    assert process.wait(60) == 0
    assert seen.count(b"running") >= 3  # it was redrawn
    assert b"finished" in seen
    assert b"\x1b[2J" not in seen  # the name of the method did not clear the screen
    assert b"\\x1b[2J" in seen


def test_ctrl_c_ends_the_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", interrupt)
    assert main(["watch", str(write_run(tmp_path / "run", [1.0], state="running"))]) == 0


def test_a_file_that_is_being_replaced_does_not_end_the_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "run", [1.0], state="running")
    looks: list[float] = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 1:
            (folder / "config.json").write_text("{")
        elif len(looks) == 3:
            (folder / "config.json").write_text("{}")
            finish(folder)

    monkeypatch.setattr(watch.time, "sleep", sleep)
    assert main(["watch", str(folder)]) == 0
    assert len(looks) == 3


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["nowhere"], "nowhere is not a folder"),
        (["."], "holds no run"),
        ([".", "--every", "0"], "--every must be more than 0"),
        ([".", "--every", "nan"], "--every must be more than 0"),
        ([], "the following arguments are required: RUN"),
    ],
)
def test_what_cannot_be_watched_is_refused_in_one_line(
    words: list[str],
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = main(["watch", *words])
    except SystemExit as error:
        code = int(str(error.code))
    assert code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert text in lines[0]
