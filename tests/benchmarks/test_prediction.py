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


def test_the_worst_prediction_is_the_verdict(monkeypatch, capsys):
    measured = {4: 10.0, 3: 10.0, 2: 10.0}
    predicted = {4: 11.4, 3: 8.6, 2: 8.4}

    def train(cluster, folder, name, n, steps):
        return {"seconds": measured[n], "gradients": n * steps}

    def simulate(cluster, run, name, n, gradients):
        return {"seconds": predicted[n], "staleness": [gradients, 0]}

    monkeypatch.setattr(prediction, "train", train)
    monkeypatch.setattr(prediction, "simulate", simulate)
    monkeypatch.setattr(prediction, "staleness_of", lambda folder: [1, 1])
    assert prediction.main(["--algorithms", "downpour", "--steps", "5"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    (bar,) = document["bars"]
    assert (bar["passed"], bar["text"]) == (False, "0.84 with 2 ranks")
    assert [row["predicted_over_measured"] for row in document["runs"]] == pytest.approx([1.14, 0.86, 0.84])
    assert [row["staleness_distance"] for row in document["runs"]] == [0.5] * 3


def test_ranks_that_do_not_divide_evenly_among_hosts_are_refused(capsys):
    with pytest.raises(SystemExit):
        prediction.main(["--hosts", "2", "--ranks", "4,3"])
    assert "3 ranks cannot be divided evenly among 2 hosts" in capsys.readouterr().err


@pytest.mark.parametrize(("ratio", "passed"), [(1.14, True), (0.86, True), (1.16, False), (0.84, False)])
def test_a_prediction_is_within_the_tolerance_or_not(ratio, passed):
    rows = [{"algorithm": "easgd", "hosts": 2, "ranks": n, "predicted_over_measured": ratio} for n in (4, 2)]
    (bar,) = prediction.verdicts(rows)
    assert bar["passed"] == passed
    assert bar["text"] == f"{ratio:.2f} with 4 ranks on 2 hosts"
