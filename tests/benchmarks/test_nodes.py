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


def row(n_nodes: int, parameters: int, shards: int, homes: int, messages: int) -> dict[str, Any]:
    elsewhere = {"shards_elsewhere": shards, "homes_elsewhere": homes}
    return {"nodes": n_nodes, "parameters": parameters, **elsewhere, "messages": messages, "median_seconds": 2.5e-4}


def test_the_bars_count_messages(nodes: ModuleType) -> None:
    small = nodes.SIZES[0]
    good = [row(2, small, 1, 1, 2), row(16, small, 1, 1, 2), row(2, 10**6, 4, 1, 5), row(16, 10**6, 15, 15, 30)]
    assert [bar["passed"] for bar in nodes.verdicts(good)] == [True, True, True]
    assert [bar["passed"] for bar in nodes.verdicts([*good, row(2, 10**6, 4, 1, 6)])] == [False, True, True]
    assert [bar["passed"] for bar in nodes.verdicts([*good, row(4, 10**6, 4, 2, 7)])] == [True, True, True]
    assert [bar["passed"] for bar in nodes.verdicts([*good, row(4, 10**6, 4, 2, 9)])] == [True, False, True]
    assert [bar["passed"] for bar in nodes.verdicts([*good, row(32, small, 2, 2, 4)])] == [True, True, False]


def test_every_row_is_in_the_table(nodes: ModuleType) -> None:
    assert any("26,122" in line and "0.25" in line for line in nodes.table([row(2, 26_122, 1, 1, 2)]))


@pytest.mark.launches
def test_two_real_nodes_send_a_message_to_the_home_and_one_with_each_shard(nodes: ModuleType) -> None:
    rows = {row["parameters"]: row for row in nodes.measure(Path(sys.prefix), 2, 3)}
    assert rows[26_122]["messages"] == 1 + rows[26_122]["shards_elsewhere"] == 2
    assert rows[10**6]["messages"] == 1 + rows[10**6]["shards_elsewhere"] == 5
    assert all(row["median_seconds"] > 0 for row in rows.values())
