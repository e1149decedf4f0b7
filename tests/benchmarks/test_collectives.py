"""The bars of the exchange and the all-reduce, by ratios whose verdicts are known."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
pytestmark = pytest.mark.ranks(1)  # what imports these scripts starts MPI

K, M = 2**10, 2**20


@pytest.fixture
def collectives(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("collectives")


def rows(n_bytes: int, **changes: float) -> list[dict[str, Any]]:
    """Of one size, each just good enough for its bar at 32 MiB."""
    ratios = {"exchange": 1.15, "Allocate": 3.0, "Create": 3.0, "MPI_Allreduce": 3.0, "gloo": 10.0} | changes
    names = {"Allocate": "Get/Put, Allocate", "Create": "Get/Put, Create"}
    made = [{"bytes": n_bytes, "operation": name, "ratio": None} for name in ("local pass", "all-reduce")]
    return made + [{"bytes": n_bytes, "operation": names.get(k, k), "ratio": ratio} for k, ratio in ratios.items()]


def missed(bars: list[dict[str, Any]]) -> list[str]:
    return [bar["bar"] for bar in bars if not bar["passed"]]


def test_what_just_meets_its_bars_passes(collectives: ModuleType) -> None:
    bars = collectives.verdicts([*rows(32 * M), *rows(4 * M, gloo=20.0)], 2)
    assert len(bars) == 8  # five of 32 MiB, two of 4 MiB, one of all sizes
    assert missed(bars) == []


@pytest.mark.parametrize(
    ("n_bytes", "changes", "told"),
    [
        (32 * M, {"exchange": 1.16}, "32 MiB: exchange"),
        (32 * M, {"Allocate": 2.9}, "Get/Put, Allocate"),
        (32 * M, {"Create": 2.9}, "Get/Put, Create"),
        (32 * M, {"MPI_Allreduce": 2.9}, "than MPI_Allreduce"),
        (32 * M, {"gloo": 9.9}, "than gloo"),
        (4 * M, {"gloo": 19.9}, "20 x faster than gloo"),
        (4 * M, {"MPI_Allreduce": 2.9, "gloo": 20.0}, "4 MiB: all-reduce at least 3 x"),
        (1 * K, {"MPI_Allreduce": 0.99}, "never slower"),
    ],
)
def test_each_bar_can_be_missed(collectives: ModuleType, n_bytes: int, changes: dict[str, float], told: str) -> None:
    (bar,) = missed(collectives.verdicts(rows(n_bytes, **changes), 2))
    assert told in bar


def test_the_size_at_which_the_all_reduce_gains_least_is_named(collectives: ModuleType) -> None:
    measured = [*rows(512, MPI_Allreduce=0.1), *rows(4 * K, MPI_Allreduce=1.5), *rows(64 * K, MPI_Allreduce=2.0)]
    (bar,) = collectives.verdicts(measured, 2)
    assert "least at 4 KiB" in bar["bar"]
    assert (bar["ratio"], bar["passed"]) == (1.5, True)


def test_other_numbers_of_ranks_have_no_bars(collectives: ModuleType) -> None:
    assert collectives.verdicts(rows(32 * M), 4) == []


def test_the_default_sizes_hold_those_of_the_bars(collectives: ModuleType) -> None:
    sizes = [collectives.size_of(word) for word in collectives.SIZES.split(",")]
    assert {*collectives.EXCHANGE_AT_MOST, *collectives.ALL_REDUCE_AT_LEAST, K} <= set(sizes)
