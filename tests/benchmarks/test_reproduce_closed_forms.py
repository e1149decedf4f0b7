"""The reproductions of closed forms, on small grids: they pass, draw a picture and end with a document."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

SMALL = {
    "admm_stability": ("--points", "12"),
    "input_spread": ("--samples", "1000", "--steps", "5000"),
    "downpour_phase": ("--rounds", "80", "--most", "12"),
}


@pytest.mark.parametrize("name", SMALL)
def test_a_reproduction_passes_and_draws(
    name: str, load: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load(f"benchmarks.reproduce.{name}").main([*SMALL[name], "--out", str(tmp_path / "new")]) == 0
    lines = capsys.readouterr().out.splitlines()
    document = json.loads(lines[-1])
    assert document["name"] == name
    assert document["passed"]
    assert sum(line.startswith("criterion ") and line.endswith(" PASS") for line in lines) == len(document["criteria"])
    assert (tmp_path / "new" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_only_the_document_with_json(
    load: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load("benchmarks.reproduce.admm_stability").main(["--points", "4", "--json", "--out", str(tmp_path)])
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["name"] == "admm_stability"


def test_a_missed_criterion_is_an_exit_code(
    load: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # At a small curvature DOWNPOUR converges where Hermans saw it diverge.
    assert (
        load("benchmarks.reproduce.downpour_phase").main(
            ["--eh", "0.001", "--rounds", "80", "--most", "20", "--out", str(tmp_path)]
        )
        == 1
    )
    *lines, document = capsys.readouterr().out.splitlines()
    assert any(line.endswith("converges MISSED") for line in lines)
    assert not json.loads(document)["passed"]


def test_the_helper_prints_criteria_and_plain_json(
    load: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = load("benchmarks.reproduce.figure")
    options = figure.parser("One line.\n\nMore.").parse_args(["--out", str(tmp_path)])
    outcome = figure.Outcome("nothing", options)
    outcome.criterion("a third is small", np.float64(1 / 3), np.bool_(True))
    code = outcome.conclude(values=np.arange(3), largest=float("nan"), nested={"one": (np.float32(0.5),)})
    first, last = capsys.readouterr().out.splitlines()
    assert first == "criterion a third is small: 0.3333 PASS"
    document = json.loads(last)
    assert (code, document["values"], document["largest"]) == (0, [0, 1, 2], None)
    assert document["nested"] == {"one": [0.5]}
    assert document["figure"] is None
    assert figure.parser("One line.\n\nMore.").description == "One line."
    with pytest.raises(AssertionError):
        figure.Outcome("empty", argparse.Namespace(out=tmp_path, json=True)).conclude()


@pytest.mark.parametrize(("q", "n"), [(0.1, 4), (0.3, 8), (0.05, 16)])
def test_the_measured_growth_is_the_radius(load: Callable[[str], ModuleType], q: float, n: int) -> None:
    from mpitrain import theory

    phase = load("benchmarks.reproduce.downpour_phase")
    per_round = phase.growth(phase.METHODS["DOWNPOUR"](1), n, np.array([q]), 400)[0]
    assert per_round == pytest.approx(theory.delayed_radius(q, n) ** n, rel=0.02)
