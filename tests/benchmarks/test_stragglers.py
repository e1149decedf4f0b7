"""The benchmark of a slow rank."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest


@pytest.mark.ranks(2)
def test_two_ranks_measure_what_a_slow_rank_costs(
    load: Callable[[str], ModuleType],
    world: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--algorithms", "allreduce,easgd", "--seeds", "1", "--gradients", "60", "--json"]
    monkeypatch.setattr(sys, "argv", ["stragglers", *words])
    assert load("benchmarks.training.stragglers").main() == 0
    output = capsys.readouterr().out
    if world.rank == 0:
        document = json.loads(output.splitlines()[-1])
        assert [row["method"] for row in document["results"]] == ["allreduce", "easgd"]
        assert all(row["retained_fraction"] > 0 for row in document["results"])
        assert [bar["bar"].partition(":")[0] for bar in document["bars"]] == ["easgd"]  # synchronous ones have no bar
