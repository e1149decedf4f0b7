"""The reproduction of what a leader escapes from: its gradients are those of its losses, a short run has the shape."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest


@pytest.fixture
def escape(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, as Python imports it when it runs it: its folder is on the path."""
    return importlib.import_module("benchmarks.reproduce.leader_escape")


@pytest.mark.parametrize("rank", [1, 3])
def test_gradient_is_that_of_the_loss_and_a_factor_is_a_solution(escape: ModuleType, rank: int) -> None:
    problem = escape.Completion(rank, seed=0)
    rng = np.random.default_rng(1)
    x, step = rng.normal(size=escape.SIZE * rank), 1e-5
    g = problem.gradient(0, x)
    for direction in rng.normal(size=(10, x.size)):
        slope = (problem.loss(0, x + step * direction) - problem.loss(0, x - step * direction)) / (2 * step)
        assert direction @ g == pytest.approx(slope, rel=1e-6)
    values, vectors = np.linalg.eigh(problem.matrix)
    factor = (vectors[:, -rank:] * np.sqrt(values[-rank:])).ravel()
    assert problem.loss(0, factor) < 1e-25
    assert np.abs(problem.gradient(0, factor)).max() < 1e-12


def test_a_follower_rests_at_the_root_of_a_quadratic(escape: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(escape, "RATIOS", np.array([0.1, 0.2, 0.24]))
    leader, follower, _ = escape.double_well("LGD")
    np.testing.assert_allclose(leader, 1, atol=1e-12)
    np.testing.assert_allclose(follower, -0.5 - np.sqrt(0.25 - escape.RATIOS), atol=1e-9)
    trapped, other, center = escape.double_well("EAGD")
    np.testing.assert_allclose(trapped, np.sqrt(1 - escape.RATIOS), atol=1e-9)
    np.testing.assert_allclose(other, -trapped, atol=1e-9)
    np.testing.assert_allclose(center, 0, atol=1e-9)


def test_a_short_run_has_the_published_shape(
    escape: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(escape, "WELL_STEPS", 6000)
    monkeypatch.setattr(escape, "RATIOS", np.array([0.2, 0.245, 0.255, 0.4, 0.6, 0.66, 0.69, 0.8]))
    monkeypatch.setattr(escape, "PULLS", (0.01, 0.1))
    assert escape.main(["--steps", "200", "--seeds", "1", "--ranks", "1", "--out", str(tmp_path)]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    document = json.loads(last)
    assert document["passed"]
    assert sum(line.startswith("criterion ") and line.endswith(" PASS") for line in lines) == len(document["criteria"])
    assert document["largest_trapping_ratio"] == {"EAGD": 0.66, "LGD": 0.245}
    assert (tmp_path / "leader_escape.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("words", [["--steps", "30"], ["--steps", "0"], ["--seeds", "0"], ["--ranks", "41"]])
def test_what_cannot_be_run_is_refused(
    escape: ModuleType, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        escape.main(words)
    assert words[0] in capsys.readouterr().err
