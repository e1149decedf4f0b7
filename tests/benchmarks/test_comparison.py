"""What a comparison makes of its runs, by hand-made curves whose answers are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

NAN = float("nan")


@pytest.fixture(scope="module")
def comparison(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("benchmarks.comparison.tables")


def run(accuracies: list[float], **changes: Any) -> dict[str, Any]:
    """A run evaluated every 2 seconds, 100 gradients and 4000 bytes."""
    points = [
        {"seconds": 2.0 * k, "gradients": 100 * k, "bytes": 4000 * k, "test_accuracy": accuracy}
        for k, accuracy in enumerate(accuracies)
    ]
    n = len(points) - 1
    result = {"algorithm": "x", "settings": {"a": 1}, "evaluation": points, "test_accuracy": accuracies[-1]}
    result |= {"test_loss": 0.5, "train_loss": NAN, "seconds": 2.0 * n, "gradients": 100 * n, "bytes_sent": 4000 * n}
    return {
        **result,
        "shares": {"waiting": 0.25},
        "n_nonfinite": 0,
        "steps_of_ranks": [50 * n] * 2,
        "out": "d",
        **changes,
    }


@pytest.mark.parametrize(
    ("ys", "target", "crossing"),
    [
        ([0.0, 0.4, 0.8], 0.6, 15.0),
        ([0.0, 0.4, 0.8], 0.4, 10.0),
        ([0.0, 0.4, 0.8], 0.9, None),
        ([0.7, 0.4, 0.8], 0.6, 0.0),
        ([0.0, 0.8, 0.2, 0.9], 0.4, 5.0),  # the first time counts
        ([0.0, NAN, 0.8], 0.4, 10.0),  # through what is missing
        ([NAN, NAN, 0.8], 0.4, 20.0),
        ([NAN, NAN], 0.4, None),
        ([], 0.4, None),
    ],
)
def test_the_first_crossing(comparison: ModuleType, ys: list[float], target: float, crossing: float | None) -> None:
    found = comparison.first_crossing([10.0 * k for k in range(len(ys))], ys, target)
    assert found == (None if crossing is None else pytest.approx(crossing))


@settings(deadline=None)
@given(ys=st.lists(st.integers(0, 100), min_size=1, max_size=8), target=st.integers(0, 100))
def test_the_first_crossing_is_that_of_a_fine_grid(load: Callable[..., ModuleType], ys: list[int], target: int) -> None:
    steps = 2000
    grid = np.linspace(0, len(ys) - 1, steps * max(len(ys) - 1, 1) + 1)
    above = np.flatnonzero(np.interp(grid, np.arange(len(ys)), ys) >= target - 1e-9)
    found = load("benchmarks.comparison.tables").first_crossing(range(len(ys)), ys, target)
    assert (found is None) == (len(above) == 0)
    if found is not None:
        assert abs(found - grid[above[0]]) <= 1 / steps


def test_a_median_exists_where_more_than_half_arrive(comparison: ModuleType) -> None:
    assert comparison.median_reached([3.0, None, 1.0]) == 3.0
    assert comparison.median_reached([1.0, 2.0, None, 4.0]) == 3.0
    assert comparison.median_reached([1.0, None]) is None
    assert comparison.median_reached([None]) is None


def test_the_default_target_is_what_all_reach(comparison: ModuleType) -> None:
    assert comparison.default_target([run([0.1, 0.58, 0.571]), run([0.1, 0.9])]) == 0.58
    assert comparison.default_target([run([0.1, 0.99]), run([0.1, 0.97])]) == 0.95
    assert comparison.default_target([run([0.1, 0.99]), run([NAN, NAN])]) == 0.0


def test_a_row_sums_its_runs_up(comparison: ModuleType) -> None:
    runs = [run([0.0, 0.5, 0.9]), run([0.0, 0.8, 0.8]), run([0.0, 0.2, 0.7, 0.7])]
    row = comparison.summarise(runs, 0.75)
    assert (row["n_runs"], row["n_reached"]) == (3, 2)
    # Reached at: 2 + 2*.25/.4 = 3.25 s, 2*.75/.8 = 1.875 s, never.
    assert row["seconds_to_target"] == pytest.approx(3.25)
    assert row["gradients_to_target"] == pytest.approx(162.5)
    assert row["bytes_to_target"] == pytest.approx(6500)
    assert row["test_accuracy_mean"] == pytest.approx(0.8)
    assert row["test_accuracy_std"] == pytest.approx(0.1)
    assert (row["test_accuracy_min"], row["test_accuracy_max"]) == (0.7, 0.9)
    assert row["gradients_per_second"] == pytest.approx(50)
    assert row["bytes_per_gradient"] == pytest.approx(40)
    assert row["waiting_share"] == pytest.approx(0.25)


def test_the_table_says_what_was_not_reached(comparison: ModuleType) -> None:
    rows = [comparison.summarise([run([0.1, one])], 0.6) for one in (0.5, 0.7)]
    lines = comparison.table(rows)
    assert "time to 60 %" in lines[0]
    assert "0 of 1" in lines[2]
    assert "1 of 1" in lines[3]
    assert len({len(line) for line in lines}) == 1
    assert not math.isfinite(comparison.run_document(run([0.1, 0.7]), 3, 0.6)["train_loss"])  # None once it is JSON
