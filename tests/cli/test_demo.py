"""`mpitrain demo`: a whole training on ranks, started by the command itself, from any folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.launching import installed, launch, python

from mpitrain.cli import demo
from mpitrain.cli.main import main


@pytest.mark.launches
def test_the_demo_trains_on_its_ranks_and_prints_the_report(tmp_path: Path) -> None:
    words = ["demo", "--ranks", "2", "--epochs", "2", "--out", "tried"]
    done = launch(0, [python("active"), "-m", "mpitrain", *words], mpi="active", timeout_seconds=200, cwd=tmp_path)
    assert done.returncode == 0, done.output
    assert "mpirun -n 2 mpitrain train --algorithm easgd" in done.output
    assert "| easgd" in done.output  # the table of the report
    result = json.loads((tmp_path / "tried" / "result.json").read_text())
    assert (result["ranks"], result["algorithm"], result["complete"]) == (2, "easgd", True)


@pytest.mark.launches
@pytest.mark.parametrize("mpi", installed()[-1:])  # the demo above is launched by the first
def test_its_launcher_starts_ranks_of_the_mpi_of_this_python(mpi: str, tmp_path: Path) -> None:
    starts = "from mpitrain.cli.launcher import launch; raise SystemExit(launch(2, ['info', '--json']))"
    done = launch(0, [python(mpi), "-c", starts], mpi=mpi, timeout_seconds=200, cwd=tmp_path)
    assert done.returncode == 0, done.output
    assert json.loads(done.output.splitlines()[-1])["world"]["ranks"] == 2


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--ranks", "0"], "--ranks must be from 1 to 64, not 0"),
        (["--ranks", "65"], "--ranks must be from 1 to 64, not 65"),
        (["--epochs", "0"], "--epochs must be more than 0, not 0"),
        (["--epochs", "nan"], "--epochs must be more than 0, not nan"),
        (["--out", "."], ". already holds a run"),
    ],
)
def test_a_demo_that_cannot_run_starts_no_rank(
    words: list[str],
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "launch", lambda *_: pytest.fail("it has started ranks"))
    (tmp_path / "config.json").write_text("{}")
    assert main(["demo", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert text in lines[0]


def test_the_exit_code_is_that_of_the_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[object] = []

    def fails(n_ranks: int, words: list[str]) -> int:
        launched.append((n_ranks, words[-1]))
        return 7

    monkeypatch.setattr(demo, "launch", fails)
    assert main(["demo", "--out", str(tmp_path / "-x")]) == 7
    assert launched == [(4, f"--out={tmp_path / '-x'}")]
