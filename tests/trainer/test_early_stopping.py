"""The end of a run at a target, or without progress."""

from __future__ import annotations

import pytest

from mpitrain.trainer.early_stopping import EarlyStopping
from mpitrain.trainer.objective_options import Target
from mpitrain.trainer.ranking import Ranking
from mpitrain.trainer.run import Point

NAN = float("nan")


def points(losses, metrics=None):
    return [
        Point(0.0, 0, 0, 0, 0.0, 0.0, test_loss=loss, test_metric=metric)
        for loss, metric in zip(losses, metrics or losses, strict=True)
    ]


def reasons(stopping, *values):
    """Return the decision after each evaluation."""
    return [stopping.reason(points(*(column[: k + 1] for column in values))) for k in range(len(values[0]))]


def test_a_target_is_reached_from_its_side():
    losses, metrics = [3.0, 2.0, 1.0, 0.5], [0.2, 0.6, 0.9, 0.8]
    rises = EarlyStopping(Ranking(Target("accuracy", 0.9), higher_is_better=True), None)
    assert reasons(rises, losses, metrics) == ["", "", "target", ""]
    falls = EarlyStopping(Ranking(Target("mae", 0.5), higher_is_better=False), None)
    assert reasons(falls, losses, [3.0, 0.6, 0.5, 0.1]) == ["", "", "target", "target"]
    of_loss = EarlyStopping(Ranking(Target("loss", 1.0), higher_is_better=True), None)
    assert reasons(of_loss, losses, metrics) == ["", "", "target", "target"]


def test_patience_counts_evaluations_without_a_new_best():
    stopping = EarlyStopping(Ranking(None, higher_is_better=True), 2)
    assert reasons(stopping, [3.0, 2.0, 2.5, 1.0, 1.0, 1.2]) == ["", "", "", "", "", "patience"]
    assert reasons(stopping, [NAN, NAN, 3.0, NAN, NAN]) == ["", "", "", "", "patience"]


def test_patience_counts_by_what_the_target_names():
    losses, metrics = [3.0, 2.0, 1.0, 0.5], [0.2, 0.6, 0.6, 0.5]
    assert (
        reasons(EarlyStopping(Ranking(Target("accuracy", 0.9), higher_is_better=True), 2), losses, metrics)[-1]
        == "patience"
    )
    assert reasons(EarlyStopping(Ranking(None, higher_is_better=True), 2), losses, metrics)[-1] == ""


def test_a_run_goes_on_before_the_first_evaluation():
    assert EarlyStopping(Ranking(None, higher_is_better=True), 1).reason([]) == ""


@pytest.mark.parametrize(("text", "name", "value"), [("accuracy=.9", "accuracy", 0.9), ("loss=1e-3", "loss", 1e-3)])
def test_a_target_is_a_name_and_a_number(text, name, value):
    assert Target.parse(text) == Target(name, value)
