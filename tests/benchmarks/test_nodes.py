"""The benchmark of exchanges on more and more emulated nodes: its bars, its table, and two real nodes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def nodes(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("benchmarks.network.nodes")


def row(n_nodes: int, parameters: int, shards: int, requests: int) -> dict[str, Any]:
    counts = {"nodes": n_nodes, "parameters": parameters, "shards_elsewhere": shards, "requests": requests}
    return {**counts, "median_seconds": 2.5e-4}


def test_the_bars_count_requests(nodes: ModuleType) -> None:
    small = nodes.SIZES[0]
    good = [row(2, small, 1, 2), row(16, small, 1, 2), row(16, 10**6, 15, 30)]
    assert [bar["passed"] for bar in nodes.verdicts(good)] == [True, True]
    assert [bar["passed"] for bar in nodes.verdicts([*good, row(4, 10**6, 3, 7)])] == [False, True]
    assert [bar["passed"] for bar in nodes.verdicts([*good, row(32, small, 2, 4)])] == [True, False]


def test_every_row_is_in_the_table(nodes: ModuleType) -> None:
    assert any("26,122" in line and "0.25" in line for line in nodes.table([row(2, 26_122, 1, 2)]))


@pytest.mark.launches
def test_two_real_nodes_make_two_requests(nodes: ModuleType) -> None:
    rows = {row["parameters"]: row for row in nodes.measure(Path(sys.prefix), 2, 3)}
    assert rows[26_122]["requests"] == 2 * rows[26_122]["shards_elsewhere"] == 2
    assert rows[10**6]["requests"] == 2 * rows[10**6]["shards_elsewhere"] == 8
    assert all(row["median_seconds"] > 0 for row in rows.values())
