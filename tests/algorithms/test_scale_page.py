"""The memory and the windows of a rank against the formulas of docs/scale.md."""

from __future__ import annotations

import gc
import re
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.quadratic import simulate

from mpitrain.algorithms import METHODS
from mpitrain.simulation.peer_memory import SimulatedPeerMemory

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scale.md"
ROW = re.compile(r"^\| `([\w-]+)` \| ([^|]+) \| (\d+) \|$", re.MULTILINE)
TABLE = {name: (formula, int(n_windows)) for name, formula, n_windows in ROW.findall(PAGE.read_text())}

N = 1 << 17
WINDOWS = {"vector": 1, "node_vector": 1, "shared_vector": 3, "mailboxes": 3}
CONSTANT = 0.25
"""Vectors of N elements: 128 KiB for samples, tables of the simulator, Python's objects."""

BYTES_OF_A_PLACE = 2048
"""Of another rank in the tables of a rank, at most: Python's lists and numbers, and the graphs of gossip methods."""


def test_the_table_has_every_method() -> None:
    assert TABLE.keys() == METHODS.keys()


@pytest.fixture(scope="module", autouse=True)
def nothing_older_is_searched() -> None:
    """Keep the objects of earlier tests and of libraries out of the many searches for garbage below."""
    simulate(METHODS["easgd"](), 2, start=np.ones(32, np.float32), eta=0.01).run(3)  # imports the compiler of kernels
    gc.collect()
    gc.freeze()


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Count the allocations of rank 0, by kind."""
    counted: Counter[str] = Counter()
    for kind in WINDOWS:
        original = getattr(SimulatedPeerMemory, kind)

        def allocate(self: Any, *arguments: Any, kind: str = kind, original: Any = original, **options: Any) -> Any:
            counted[kind] += self._world_rank == 0
            return original(self, *arguments, **options)

        monkeypatch.setattr(SimulatedPeerMemory, kind, allocate)
    return counted


def bytes_of_a_rank(name: str, p: int, n: int) -> float:
    """Return the memory of a worker after three steps, with ``n`` parameters of float32."""
    start = np.ones(n, np.float32)
    gc.collect()
    tracemalloc.start()
    simulation = simulate(METHODS[name](), p, start=start, eta=0.01)
    simulation.run(3)
    gc.collect()
    n_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return n_bytes / p


@pytest.mark.parametrize("name", METHODS)
def test_memory_and_windows_are_those_of_the_table(name: str, windows: Counter[str]) -> None:
    formula, n_windows = TABLE[name]
    simulate(METHODS[name](), 2, start=np.ones(32, np.float32), eta=0.01).run(3)  # compiles the kernels
    for p in (2, 6):
        windows.clear()
        found = bytes_of_a_rank(name, p, N) / (4 * N)
        expected = eval(formula, {"p": p, "n": N, "min": min})
        assert expected - CONSTANT < found < expected + CONSTANT
        assert sum(n * WINDOWS[kind] for kind, n in windows.items()) == n_windows


@pytest.mark.parametrize("name", [name for name, (formula, _) in TABLE.items() if "min" not in formula])
def test_among_more_ranks_a_rank_needs_more_for_their_places_only(name: str) -> None:
    few, many = (bytes_of_a_rank(name, p, 256) for p in (8, 32))
    assert many - few < 24 * BYTES_OF_A_PLACE


@pytest.mark.parametrize("name", [name for name, (formula, _) in TABLE.items() if "min" in formula])
def test_robust_methods_stay_below_their_limit_among_many_ranks(name: str) -> None:
    p, n = 64, 1 << 14
    limit = eval(TABLE[name][0], {"p": p, "n": n, "min": min}) * 4 * n
    assert bytes_of_a_rank(name, p, n) < limit + p * BYTES_OF_A_PLACE
