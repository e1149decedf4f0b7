"""What the benchmark of the start makes of what it measured, and of its commands."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def startup(load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("benchmarks.micro.startup")


def test_what_a_launcher_set_is_not_passed_on(startup: ModuleType) -> None:
    launched = {
        "OMPI_COMM_WORLD_RANK": "1",
        "PMIX_RANK": "1",
        "PMI_RANK": "1",
        "PRTE_X": "1",
        "HOME": "/h",
        "PATH": "/bin",
    }
    env = startup.environment(launched, Path("/venv"))
    assert env == {"HOME": "/h", "PATH": "/venv/bin:/bin", "VIRTUAL_ENV": "/venv", "OMP_NUM_THREADS": "1"}


def test_turns_leave_the_first_out(startup: ModuleType) -> None:
    seen: list[str] = []

    def take(name: str) -> float:
        seen.append(name)
        return float(len(seen))

    seconds = startup.turns({"a": lambda: take("a"), "b": lambda: take("b")}, 2)
    assert "".join(seen) == "ababab"
    assert seconds == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def test_the_last_rank_counts(startup: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "11.times").write_text("102.5\n102.75\n103.0\n")
    (tmp_path / "12.times").write_text("102.25\n103.5\n")
    assert startup.first_step(tmp_path, 100.0, 2) == (2.5, 3.5)


@pytest.mark.parametrize("notes", [["1\n2\n"], ["1\n2\n", "1\n"], ["1\n2\n"] * 3])
def test_passes_that_are_missing_are_told(startup: ModuleType, tmp_path: Path, notes: list[str]) -> None:
    for pid, text in enumerate(notes):
        (tmp_path / f"{pid}.times").write_text(text)
    with pytest.raises(RuntimeError, match="two training passes of 2 ranks"):
        startup.first_step(tmp_path, 0.0, 2)


def test_imports_are_counted_without_the_interpreter(startup: ModuleType) -> None:
    imports = {"pass": [0.02, 0.04, 0.02], "import mpitrain": [0.12, 0.24, 0.13], "import torch": [1.0, 2.0, 3.0]}
    rows = {row["what"]: row for row in startup.rows_of(imports, {"first step": [3.0, 5.0, 4.0]})}
    assert rows["interpreter"]["median_seconds"] == pytest.approx(0.02)
    assert rows["import mpitrain"]["median_seconds"] == pytest.approx(0.11)
    assert (rows["first step"]["least_seconds"], rows["first step"]["most_seconds"]) == (3.0, 5.0)
    assert len(startup.table(list(rows.values()))) == 2 + 4


@pytest.mark.parametrize(("imported", "step", "passed"), [(0.29, 3.9, [True, True]), (0.3, 4.0, [False, False])])
def test_bars(startup: ModuleType, imported: float, step: float, passed: list[bool]) -> None:
    rows = [{"what": "import mpitrain", "median_seconds": imported}, {"what": "first step", "median_seconds": step}]
    bars = startup.verdicts(rows, 2)
    assert [bar["passed"] for bar in bars] == passed
    assert [bar["seconds"] for bar in bars] == [imported, step]
    assert len(startup.verdicts(rows, 4)) == 1  # the bar of the first step is for 2 ranks


def test_a_command_that_fails_is_told_with_what_it_printed(startup: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"failed \(3\):\nbroken"):
        startup.run([sys.executable, "-c", "print('broken'); raise SystemExit(3)"], {}, tmp_path)


def test_a_command_that_does_not_end_is_ended(
    startup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(startup, "LIMIT_SECONDS", 0.2)
    with pytest.raises(RuntimeError, match="more than"):
        startup.run([sys.executable, "-c", "import time; time.sleep(600)"], {}, tmp_path)


def test_the_model_notes_its_training_passes_only(
    startup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    (tmp_path / "noting_model.py").write_text(startup.MODEL)
    monkeypatch.syspath_prepend(str(tmp_path))
    from noting_model import Noting

    model = Noting(shape=(4,), n_classes=2)
    model(torch.zeros(1, 4))
    model.eval()(torch.zeros(1, 4))
    model.train()(torch.zeros(1, 4))
    began, made = startup.first_step(tmp_path, 0.0, 1)
    assert 0 < began <= made
    (notes,) = tmp_path.glob("*.times")
    assert len(notes.read_text().split()) == 2
