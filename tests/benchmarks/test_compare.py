"""The comparison of methods from end to end, as users start it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.launching import launch

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.ranks(2)
def test_two_ranks_compare_the_default_methods(
    load: Callable[[str], ModuleType],
    world: Any,
    mpi_tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = mpi_tmp_path / "out"
    budget = ("--seeds", "2", "--gradients", "120", "--evaluations", "5", "--test-samples", "100")
    monkeypatch.setattr(sys, "argv", ["compare.py", *budget, "--straggler", "1:6", "--out", str(out)])
    assert load("benchmarks.compare").main() == 0
    output = capsys.readouterr().out
    if world.rank:
        assert output == ""
    else:
        check(output.splitlines(), out)


def check(lines: list[str], out: Path) -> None:
    """Check the output of rank 0 and the files."""
    document = json.loads(lines[-1])
    assert document == json.loads((out / "compare.json").read_text())
    names = ["allreduce", "gossip", "easgd"]
    assert [row["algorithm"] for row in document["rows"]] == names
    assert {row["n_runs"] for row in document["rows"]} == {2}
    assert sorted((one["algorithm"], one["seed"]) for one in document["runs"]) == sorted(
        (name, seed) for name in names for seed in (0, 1)
    )
    for name in names:
        assert sum(line.startswith(f"| {name} ") for line in lines) == 1
    pictures = [Path(file) for file in document["files"] if file.endswith(".png")]
    assert {"curves.png", "shares.png"} <= {picture.name for picture in pictures}
    assert all(picture.read_bytes().startswith(PNG) for picture in pictures)
    for one in document["runs"]:
        fast, slow = one["steps_of_ranks"]
        assert one["gradients"] == fast + slow >= 120
        if one["algorithm"] == "allreduce":
            assert fast == slow
        assert (Path(one["out"]) / "result.json").exists()
        assert json.loads((Path(one["out"]) / "config.json").read_text())["config"]["straggler"] == [1, 6.0]
    assert {"versions", "world", "machine", "load_average", "settings"} <= document.keys()


@pytest.mark.launches
def test_a_wrong_algorithm_is_one_line(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["python", "benchmarks/compare.py", "--algorithms", "easgd,nosuch", "--out", str(out)]
    finished = launch(2, command, timeout_seconds=250)
    assert finished.returncode == 2, finished.output
    errors = [line for line in finished.output.splitlines() if "error" in line and "nosuch" in line]
    assert len(errors) == 1
    assert "Traceback" not in finished.output
    assert "warming up" not in finished.output
    assert not out.exists()
