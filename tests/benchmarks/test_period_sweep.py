"""The reproduction of the period sweep: its gradient is one, a short run has the published shape and draws it."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, as Python imports it when it runs it: its folder is on the path."""
    return importlib.import_module("benchmarks.reproduce.period_sweep")


def test_gradient_is_that_of_the_loss(sweep: ModuleType) -> None:
    network = sweep.Network(n_hidden=4)
    x, y = network.train
    some = (x[:20], y[:20])
    rng = np.random.default_rng(1)
    w = network.start(0) + 0.1 * rng.normal(size=network.n)
    g, step = network.gradient_on(w, some), 1e-6
    for direction in rng.normal(size=(10, network.n)):
        slope = (network.loss(w + step * direction, some) - network.loss(w - step * direction, some)) / (2 * step)
        assert direction @ g == pytest.approx(slope, rel=1e-6, abs=1e-8)


def test_a_short_sweep_has_the_published_shape(
    sweep: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "LEARNING_RATES", {"downpour": (0.1,), "easgd": (0.4,), "eamsgd": (0.02,)})
    assert sweep.main(["--steps", "320", "--out", str(tmp_path)]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    document = json.loads(last)
    assert document["passed"]
    assert sum(line.startswith("criterion ") and line.endswith(" PASS") for line in lines) == len(document["criteria"])
    for runs in document["best"].values():
        assert [runs["1"]["bytes"] / runs[period]["bytes"] for period in ("4", "16", "64")] == [4, 16, 64]
        assert runs["1"]["accuracy"] > 0.9
    assert (tmp_path / "period_sweep.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("words", [["--steps", "100"], ["--steps", "0"], ["--seeds", "0"]])
def test_what_would_come_out_uneven_is_refused(
    sweep: ModuleType, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        sweep.main(words)
    assert "multiple of 64" in capsys.readouterr().err
