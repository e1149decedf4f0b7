"""The benchmark of a slow rank, run as users run it."""

from __future__ import annotations

import json

import pytest
from support.launching import launch

pytestmark = pytest.mark.launches


def test_two_ranks_measure_what_a_slow_rank_costs() -> None:
    words = ["--algorithms", "allreduce,easgd", "--seeds", "1", "--gradients", "120", "--json"]
    finished = launch(2, ["python", "-m", "benchmarks.training.stragglers", *words], timeout_seconds=120)
    assert finished.returncode == 0, finished.output
    document = json.loads(finished.output.splitlines()[-1])
    assert [row["method"] for row in document["results"]] == ["allreduce", "easgd"]
    assert all(row["retained_fraction"] > 0 for row in document["results"])
    assert [bar["bar"].partition(":")[0] for bar in document["bars"]] == ["easgd"]  # synchronous methods have no bar
