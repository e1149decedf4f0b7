"""The figures and the bars of the kernels' benchmark, by times whose ratios are known."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def kernels(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("benchmarks.micro.kernels")


def timed(**seconds: float) -> dict[str, dict[str, float]]:
    return {name: {"median_seconds": s, "p95_seconds": 2 * s} for name, s in seconds.items()}


def test_bytes_and_lines_differ_where_an_array_is_only_read(kernels: ModuleType) -> None:
    seconds = timed(mpitrain=1e-3, limit=0.9e-3, numpy=5e-3, torch=2e-3)
    row = kernels.row_of("step", seconds, 1_000_000, 20, 3)  # 3 arrays, one of them only read
    assert row["mpitrain_gb_per_s"] == pytest.approx(20.0)
    assert row["limit_gb_per_s"] == pytest.approx(24 / 0.9)
    assert row["limit_fraction"] == pytest.approx(0.75)
    assert row["lines_fraction"] == pytest.approx(0.9)
    assert row["of_numpy"] == pytest.approx(5.0)


def row(name: str, n_updated: int, lines: float = 1.0, moved: float = 1.0, numpy: float = 5.0) -> dict[str, Any]:
    return {"kernel": name, "n_updated": n_updated, "lines_fraction": lines, "limit_fraction": moved, "of_numpy": numpy}


def test_only_fused_kernels_have_bars(kernels: ModuleType) -> None:
    bars = kernels.verdicts([row("a", 2), row("b", 3), row("scale", 1, 0.1, 0.1, 0.1)], 8_000_000)
    assert [(bar["passed"], bar["missed_by"]) for bar in bars] == [(True, [])] * 3
    assert kernels.verdicts([row("scale", 1)], 8_000_000) == []
    assert kernels.verdicts([row("a", 2)], 1000) == []  # in a cache


def test_the_worst_is_the_figure(kernels: ModuleType) -> None:
    rows = [row("a", 2, moved=0.8), row("b", 2, moved=0.7, numpy=3.9), row("c", 2)]
    lines, moved, numpy = kernels.verdicts(rows, 8_000_000)
    assert lines["passed"]
    assert (moved["ratio"], moved["missed_by"]) == (0.7, ["a", "b"])
    assert "least: b; 1 of 3 pass" in moved["bar"]
    assert (numpy["ratio"], numpy["passed"], numpy["missed_by"]) == (3.9, False, ["b"])


def test_what_counts_as_fused(kernels: ModuleType) -> None:
    rows = [kernels.bench_kernel(kernel, 16, 1) for kernel in kernels.library()[:2]]
    found = {one["kernel"]: one["n_updated"] for one in rows}
    assert found["elastic_exchange"] == 2
    assert kernels.bench_reduction("reduce_sum", 3, 16, 1)["n_updated"] == 0
    assert kernels.bench_reduction("reduce_broadcast", 3, 16, 1)["n_updated"] == 3
