"""The comparison of methods from end to end, as users start it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.launching import launch

pytestmark = pytest.mark.launches

PNG = b"\x89PNG\r\n\x1a\n"


def test_two_ranks_compare_the_default_methods(tmp_path: Path) -> None:
    out = tmp_path / "out"
    budget = ("--seeds", "2", "--gradients", "120", "--evaluations", "5", "--test-samples", "100")
    finished = launch(
        2,
        ["python", "benchmarks/compare.py", *budget, "--straggler", "1:6", "--out", str(out)],
        timeout_seconds=240,
    )
    assert finished.returncode == 0, finished.output
    lines = finished.output.splitlines()
    document = json.loads([line for line in lines if line.startswith("{")][-1])
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
        assert (fast == slow) == (one["algorithm"] == "allreduce")  # who waits for nobody leaves the slow one behind
        assert (Path(one["out"]) / "result.json").exists()
    assert {"versions", "world", "machine", "load_average", "settings"} <= document.keys()


def test_a_wrong_algorithm_is_one_line(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["python", "benchmarks/compare.py", "--algorithms", "easgd,nosuch", "--out", str(out)]
    finished = launch(2, command, timeout_seconds=120)
    assert finished.returncode == 2, finished.output
    errors = [line for line in finished.output.splitlines() if "error" in line and "nosuch" in line]
    assert len(errors) == 1
    assert "Traceback" not in finished.output
    assert "warming up" not in finished.output
    assert not out.exists()
