"""B16: its rounds are rounds, and a short one passes and draws."""

import importlib
import json

import numpy as np
import pytest


@pytest.fixture
def script(monkeypatch):
    module = importlib.import_module("benchmarks.reproduce.gossip_spread")
    monkeypatch.setattr(module, "WORKERS", (2, 3, 4, 5, 6))
    return module


def test_it_passes_and_draws(script, tmp_path, capsys):
    assert script.main(["--rounds", "60", "--out", str(tmp_path)]) == 0
    *lines, document = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("criterion ") and line.endswith(" PASS") for line in lines) == 5
    assert json.loads(document)["formula"]["pull"][:5] == pytest.approx(
        [0, 0.1875, 0.2777778, 0.328125, 0.36], abs=1e-7
    )
    assert (tmp_path / "gossip_spread.png").read_bytes().startswith(b"\x89PNG")


def test_it_fails_where_the_formula_is_wrong(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(script.FORMULAS, "pull", script.FORMULAS["push"])
    assert script.main(["--rounds", "40", "--json", "--out", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert [one["passed"] for one in json.loads(line)["criteria"]] == [False, True, True, True, True]


@pytest.mark.parametrize("p", [2, 5, 8])
def test_all_pull_from_the_old_state(script, p):
    simulation = script.gossip("pull", p, 0, in_turn=True)
    x = np.random.default_rng(p).normal(size=(p, script.N))
    for worker, row in zip(simulation.workers, x, strict=True):
        worker.x.local[...] = row
    script.round_of_pulls(simulation)
    for i, after in enumerate(simulation.x()):
        distances = [np.abs(after - (x[i] + x[j]) / 2).max() for j in range(p) if j != i]
        assert min(distances) < 1e-15


def test_a_push_reaches_before_anybody_looks(script):
    simulation, x = script.gossip("push", 2, 0, in_turn=True), np.array([1.0, 5.0])
    for worker, value in zip(simulation.workers, x, strict=True):
        worker.x.local[...] = value
    script.round_of_pushes(simulation)
    assert (simulation.x() == 3.0).all()
