"""B16: a short run passes and draws; a wrong formula and a faulty method fail."""

import importlib
import json

import numpy as np
import pytest

from mpitrain.algorithms.gossip.gossip import Pull, Push


@pytest.fixture
def script(monkeypatch):
    module = importlib.import_module("benchmarks.reproduce.gossip_spread")
    monkeypatch.setattr(module, "WORKERS", (2, 3, 4))
    return module


def passed(script, capsys, tmp_path, *words):
    code = script.main(["--rounds", "60", "--json", "--out", str(tmp_path), *words])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    results = [one["passed"] for one in document["criteria"]]
    assert code == (not all(results))
    return results


def test_it_passes_and_draws(script, tmp_path, capsys):
    assert script.main(["--rounds", "60", "--out", str(tmp_path)]) == 0
    *lines, document = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("criterion ") and line.endswith(" PASS") for line in lines) == 4
    assert json.loads(document)["formula"]["pull"] == pytest.approx([1 / 4, 2 / 3, 19 / 24])
    assert (tmp_path / "gossip_spread.png").read_bytes().startswith(b"\x89PNG")


def test_it_fails_where_the_formula_is_wrong(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(script.FORMULAS, "pull", script.FORMULAS["push"])
    assert passed(script, capsys, tmp_path) == [False, True, True, True]


def test_it_fails_if_a_pull_reads_an_old_state(script, tmp_path, capsys, monkeypatch):
    average_with = Pull.average_with

    def late(self, peer):
        old, self.old = getattr(self, "old", self._x.local.copy()), self._x.local.copy()
        average_with(self, peer)
        self._x.local[...] += 0.5 * (old - self.old)

    monkeypatch.setattr(Pull, "average_with", late)
    assert not all(passed(script, capsys, tmp_path))


def test_it_fails_if_a_version_is_averaged_with_twice(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Pull, "_version_of", lambda self, peer: np.nan)
    assert passed(script, capsys, tmp_path) == [True, True, True, False]


def test_it_fails_if_a_push_is_lost(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Push, "receive", lambda self: None)
    assert passed(script, capsys, tmp_path) == [True, True, False, True]
