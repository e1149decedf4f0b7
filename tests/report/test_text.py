"""Numbers as the tables show them."""

from __future__ import annotations

import pytest

from mpitrain.report import text


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (None, "-"),
        (0.0, "0.00 s"),
        (9.994, "9.99 s"),
        (10.0, "10.0 s"),
        (119.94, "119.9 s"),
        (120.0, "2.0 min"),
        (5400.0, "90.0 min"),
        (7200.0, "2.0 h"),
        (90_000.0, "25.0 h"),
    ],
)
def test_durations_are_in_seconds_minutes_or_hours(seconds: float | None, shown: str) -> None:
    assert text.duration(seconds) == shown


@pytest.mark.parametrize(
    ("n_bytes", "shown"),
    [(None, "-"), (0, "0 B"), (999, "999 B"), (1000, "1 kB"), (2_340_000, "2.34 MB"), (1e6, "1 MB"), (5e9, "5 GB")],
)
def test_sizes_are_in_powers_of_a_thousand(n_bytes: float | None, shown: str) -> None:
    assert text.size(n_bytes) == shown


def test_a_table_is_aligned() -> None:
    lines = text.table({"name": ["a", "longer"], "n": ["1", "1,000"]}, left=("name",))
    assert lines == ["| name   |     n |", "|--------|------:|", "| a      |     1 |", "| longer | 1,000 |"]
