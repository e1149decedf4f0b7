"""The benchmark of the simulator's predictions, with runs of known times."""

import json

import pytest

from benchmarks.training import prediction


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [([2, 2], [5, 5], 0.0), ([4, 0], [0, 1], 1.0), ([3, 1], [1, 1], 0.25), ([0, 0], [1, 0], None)],
)
def test_histograms_are_compared_by_their_frequencies(one, other, expected):
    assert prediction.distance(one, other) == expected


def test_predictions_within_the_tolerance_are_counted(monkeypatch, capsys):
    measured = {4: 10.0, 3: 10.0, 2: 10.0}
    predicted = {4: 11.4, 3: 8.6, 2: 8.4}
    monkeypatch.setattr(
        prediction, "train", lambda launcher, folder, name, n, steps: {"seconds": measured[n], "gradients": n * steps}
    )
    monkeypatch.setattr(
        prediction, "simulate", lambda run, name, n, gradients: {"seconds": predicted[n], "staleness": [gradients, 0]}
    )
    monkeypatch.setattr(prediction, "staleness_of", lambda folder: [1, 1])
    assert prediction.main(["--algorithms", "downpour", "--steps", "5"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["agree"] == 2
    assert [row["predicted_over_measured"] for row in document["runs"]] == pytest.approx([1.14, 0.86, 0.84])
    assert [row["staleness_distance"] for row in document["runs"]] == [0.5] * 3
