"""The reproduction of the table of attacks: its gradients, who is caught, and a run too short to succeed."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest


@pytest.fixture
def byzantine(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, imported as Python does when it runs it: its folder is on the path."""
    return importlib.import_module("benchmarks.reproduce.byzantine")


def test_gradients_are_those_of_the_cross_entropy(byzantine: ModuleType) -> None:
    rng = np.random.default_rng(0)
    n = sum(int(np.prod(shape)) for shape in byzantine.SHAPES)
    x, pixels, labels = 0.3 * rng.normal(size=n), rng.normal(size=(3, 4, 64)), rng.integers(10, size=(3, 4))

    def losses(at: np.ndarray) -> np.ndarray:
        z = byzantine.logits(at, pixels)[1]
        p = np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True)
        return -np.log(np.take_along_axis(p, labels[..., None], -1))[..., 0].mean(axis=1)

    g, h = byzantine.gradients(x, pixels, labels), 1e-6
    assert g.shape == (3, n)
    for _ in range(20):
        d = rng.normal(size=n)
        np.testing.assert_allclose(g @ d, (losses(x + h * d) - losses(x - h * d)) / (2 * h), rtol=1e-5, atol=1e-8)


def test_flipped_labels_are_the_attackers_only(byzantine: ModuleType) -> None:
    honest, flipped = byzantine.Digits(1, 4), byzantine.Digits(1, 4, flipped=1)
    same = [
        np.array_equal(honest.gradient(rank, honest.start), flipped.gradient(rank, flipped.start)) for rank in range(4)
    ]
    assert same == [True, True, True, False]


def test_attackers_that_flip_labels_are_caught(byzantine: ModuleType) -> None:
    cell = byzantine.run("double safeguard", "label-flip", 120, seed=1)
    assert len(cell.caught) == byzantine.ATTACKERS
    assert cell.n_lost == 0
    assert cell.accuracy > 75
    assert not byzantine.run("mean", "label-flip", 20, seed=1).caught


def test_a_short_run_draws_the_whole_table_and_says_what_it_missed(
    byzantine: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert byzantine.main(["--steps", "20", "--out", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    document = json.loads(lines[-1])
    assert set(document["accuracy_percent"]) == {"ideal baseline", *byzantine.RULES}
    for row in document["accuracy_percent"].values():
        assert set(row) == set(byzantine.ATTACKS)
        assert all(0 <= value <= 100 for value in row.values())
    assert any(line.endswith("excludes all attackers. Value: the number that it excludes: 0 MISSED") for line in lines)
    assert not document["passed"]
    assert (tmp_path / "byzantine.png").read_bytes().startswith(b"\x89PNG")
