"""B8 and B9: short ones pass and draw, and they tell when they do not."""

import json

import numpy as np
import pytest


@pytest.fixture
def rescue(load, monkeypatch):
    module = load("benchmarks.reproduce.adag_rescue")
    monkeypatch.setattr(module, "PERIODS", (1, 3))
    return module


@pytest.fixture
def staleness(load, monkeypatch):
    module = load("benchmarks.reproduce.staleness")
    monkeypatch.setattr(module, "WORKERS", (3, 8))
    return module


def document_of(capsys):
    *lines, last = capsys.readouterr().out.splitlines()
    return lines, json.loads(last)


def test_adag_rescues_agn(rescue, tmp_path, capsys):
    assert rescue.main(["--rounds", "24", "--seeds", "1", "--out", str(tmp_path)]) == 0
    lines, document = document_of(capsys)
    assert sum(line.startswith("criterion ") and line.endswith(" PASS") for line in lines) == 5
    assert (tmp_path / "adag_rescue.png").read_bytes().startswith(b"\x89PNG")
    assert {row["method"] for row in document["rows"]} >= {"one worker alone", *rescue.METHODS}


def test_nothing_needs_a_rescue_at_a_small_learning_rate(rescue, tmp_path, capsys):
    assert rescue.main(["--rounds", "6", "--seeds", "1", "--lr", "0.01", "--json", "--out", str(tmp_path)]) == 1
    lines, document = document_of(capsys)
    assert not lines
    assert [one["passed"] for one in document["criteria"]] == [True, True, True, False, False]


def test_gradients_are_those_of_the_loss(rescue, monkeypatch):
    digits, rng = rescue.Digits(), np.random.default_rng(0)
    weights, direction = rng.normal(size=(2, digits.n_weights))
    monkeypatch.setattr(rescue, "BATCH", digits.y.size)

    class All:
        def integers(self, n, size):
            return np.arange(n)

    monkeypatch.setattr(rescue.np.random, "default_rng", lambda seed: All())
    slope = digits.gradients(0)(0, weights) @ direction
    h = 1e-5
    rise = digits.loss(weights + h * direction) - digits.loss(weights - h * direction)
    assert slope == pytest.approx(rise / (2 * h), rel=1e-6)
    assert digits.loss(np.zeros(digits.n_weights)) == pytest.approx(np.log(10))


def test_mean_staleness_is_n_minus_1(staleness, tmp_path, capsys):
    assert staleness.main(["--commits", "1200", "--out", str(tmp_path)]) == 0
    lines, document = document_of(capsys)
    assert sum(line.startswith("criterion ") and line.endswith(" PASS") for line in lines) == 5
    assert (tmp_path / "staleness.png").read_bytes().startswith(b"\x89PNG")
    assert [row["mean"] for row in document["staleness"] if row["kind"] == "in turn"] == [2, 7]


def test_a_straggler_is_not_a_machine_like_the_others(staleness, tmp_path, capsys, monkeypatch):
    # The mean is n - 1 even so; but then it is not "in turn" any more.
    monkeypatch.setitem(staleness.KINDS, "in turn", lambda n, seed: staleness.VirtualTime([3.0, *[1.0] * (n - 1)]))
    assert staleness.main(["--commits", "1200", "--json", "--out", str(tmp_path)]) == 1
    _, document = document_of(capsys)
    assert [one["passed"] for one in document["criteria"]] == [True, True, True, False, True]
