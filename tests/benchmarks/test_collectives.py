"""The bars of the exchange and the all-reduce, by ratios whose verdicts are known; how often what is called; and that
the tree and the gossip give what is measured beside them.
"""

from __future__ import annotations

import importlib
import time
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from mpitrain.collectives.world.world import World

ONE_RANK = pytest.mark.ranks(1)  # what imports these scripts starts MPI
ON_RANKS = pytest.mark.ranks(1, 2, 3)

K, M = 2**10, 2**20


@pytest.fixture
def collectives(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return importlib.import_module("benchmarks.micro.collectives")


def rows(n_bytes: int, **changes: float) -> list[dict[str, Any]]:
    """Of one size, each just good enough for its bar at 32 MiB."""
    kinds = ("Allocate", "Create", "server")
    ratios = {"exchange": 1.15, **dict.fromkeys(kinds, 3.0), "MPI_Allreduce": 3.0, "gloo": 10.0} | changes
    names = {kind: f"Get/Put, {kind}" for kind in kinds}
    made = [{"bytes": n_bytes, "operation": name, "ratio": None} for name in ("local pass", "all-reduce")]
    return made + [{"bytes": n_bytes, "operation": names.get(k, k), "ratio": ratio} for k, ratio in ratios.items()]


def missed(bars: list[dict[str, Any]]) -> list[str]:
    return [bar["bar"] for bar in bars if not bar["passed"]]


@ONE_RANK
def test_what_just_meets_its_bars_passes(collectives: ModuleType) -> None:
    bars = collectives.verdicts([*rows(32 * M), *rows(4 * M, gloo=20.0)], 2)
    assert len(bars) == 9  # six of 32 MiB, two of 4 MiB, one of all sizes
    assert missed(bars) == []


@ONE_RANK
@pytest.mark.parametrize(
    ("n_bytes", "changes", "told"),
    [
        (32 * M, {"exchange": 1.16}, "32 MiB: exchange"),
        (32 * M, {"Allocate": 2.9}, "Get/Put, Allocate"),
        (32 * M, {"Create": 2.9}, "Get/Put, Create"),
        (32 * M, {"server": 2.9}, "Get/Put, server"),
        (32 * M, {"MPI_Allreduce": 2.9}, "than MPI_Allreduce"),
        (32 * M, {"gloo": 9.9}, "than gloo"),
        (4 * M, {"gloo": 19.9}, "20 x faster than gloo"),
        (4 * M, {"MPI_Allreduce": 2.9, "gloo": 20.0}, "4 MiB: all-reduce at least 3 x"),
        (1 * K, {"MPI_Allreduce": 0.99}, "never slower"),
        (1 * K, {"Allocate": 0.66}, "1 KiB: exchange at most 1.5 x"),
        (16 * K, {"Allocate": 0.66}, "16 KiB: exchange at most 1.5 x"),
    ],
)
def test_each_bar_can_be_missed(collectives: ModuleType, n_bytes: int, changes: dict[str, float], told: str) -> None:
    (bar,) = missed(collectives.verdicts(rows(n_bytes, **changes), 2))
    assert told in bar


@ONE_RANK
def test_the_size_at_which_the_all_reduce_gains_least_is_named(collectives: ModuleType) -> None:
    measured = [*rows(512, MPI_Allreduce=0.1), *rows(4 * K, MPI_Allreduce=1.5), *rows(64 * K, MPI_Allreduce=2.0)]
    (bar,) = (one for one in collectives.verdicts(measured, 2) if "never slower" in one["bar"])
    assert "least at 4 KiB" in bar["bar"]
    assert (bar["ratio"], bar["passed"]) == (1.5, True)


@ONE_RANK
def test_other_numbers_of_ranks_have_no_bars(collectives: ModuleType) -> None:
    assert collectives.verdicts(rows(32 * M), 4) == []


@ONE_RANK
def test_the_default_sizes_hold_those_of_the_bars(collectives: ModuleType) -> None:
    sizes = collectives.sizes_of(collectives.SIZES)
    assert {*collectives.EXCHANGE_AT_MOST, *collectives.ALL_REDUCE_AT_LEAST, K} <= set(sizes)
    assert set(collectives.sizes_of(collectives.SIZES_OF_FORMS)) <= set(sizes)


@ONE_RANK
def test_sizes_are_read_with_blanks(collectives: ModuleType) -> None:
    assert collectives.sizes_of("1K, 256M") == [K, 256 * M]


@ONE_RANK
@pytest.mark.parametrize(
    ("n_bytes", "asked", "n_repeats"),
    [(4 * K, 20, 20), (4 * M, 30, 30), (32 * M, 20, 12), (32 * M, 7, 7), (256 * M, 20, 5), (256 * M, 2, 2)],
)
def test_large_vectors_have_fewer_repeats(collectives: ModuleType, n_bytes: int, asked: int, n_repeats: int) -> None:
    assert collectives.repeats_of(n_bytes, asked) == n_repeats


@ONE_RANK
@pytest.mark.parametrize(
    ("seconds", "n_bytes", "n_calls"),
    [
        (2e-6, 1 * K, 256),  # as many as a vector of this size may have
        (2e-6, 4 * K, 64),
        (1e-3, 1 * K, 20),
        (0.1, 1 * K, 1),
        (2e-6, 4 * M, 1),
    ],
)
def test_what_is_slow_is_called_less_often(collectives: ModuleType, seconds: float, n_bytes: int, n_calls: int) -> None:
    assert collectives.calls_that_fit(seconds, n_bytes) == n_calls


@ONE_RANK
def test_each_row_has_its_own_number_of_calls(collectives: ModuleType, world: World) -> None:
    called = {"all-reduce": 0, "gloo": 0}

    def fast() -> None:
        called["all-reduce"] += 1

    def slow() -> None:
        called["gloo"] += 1
        time.sleep(0.006)

    quick, lasting = collectives.rows_in_turns(world, {"all-reduce": fast, "gloo": slow}, 4 * K, 2)
    assert (quick["n_calls"], quick["n_repeats"], quick["ratio"]) == (64, 2, None)
    assert 1 <= lasting["n_calls"] <= 3
    assert (lasting["n_repeats"], lasting["reference"]) == (2, "all-reduce")
    n_trials = 2 * (collectives.TRIALS + 2)  # each once for the caches' sake; two rounds warm up
    assert called == {"all-reduce": n_trials + 2 * 65, "gloo": n_trials + 2 * (1 + lasting["n_calls"])}


@ON_RANKS
@pytest.mark.parametrize("n", [1, 1000, 300_001])  # the last in more than one chunk of the tree
def test_the_forms_give_what_is_measured_beside_them(collectives: ModuleType, world: World, n: int) -> None:
    mine = (np.arange(n) % 17 + world.rank).astype(np.float32)
    everybody = world.comm.allgather(mine)
    neighbours = {(world.rank + hop) % world.size for hop in (-1, 0, 1)}
    expected = {
        "tree reduce + broadcast": sum(everybody),
        "MPI_Reduce + Bcast": sum(everybody),
        "gossip": sum(everybody[k] for k in neighbours) / np.float32(len(neighbours)),
        "MPI_Sendrecv + NumPy": sum(everybody[k] for k in neighbours) / np.float32(len(neighbours)),
    }
    forms = collectives.Forms(world, n)
    assert set(forms.operations) == set(expected)
    assert {collectives.REFERENCES[name]: name for name in expected if name in collectives.REFERENCES} == {
        "tree reduce + broadcast": "MPI_Reduce + Bcast",
        "gossip": "MPI_Sendrecv + NumPy",
    }
    for name, operation in forms.operations.items():
        for _ in range(3):  # a gossip has two mailboxes
            forms.vectors[name][:] = mine
            operation()
            np.testing.assert_allclose(forms.vectors[name], expected[name], rtol=1e-6)
    forms.free()
