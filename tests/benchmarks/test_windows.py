"""The table of one-sided operations: sizes and rows by hand; what is timed does what its name says; the whole run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from mpitrain.errors import UsageError

ONE_RANK = pytest.mark.ranks(1)  # what imports these scripts starts MPI
ON_RANKS = pytest.mark.ranks(2, 3)
MOVES = ("put", "get", "accumulate")


@pytest.fixture
def windows(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("benchmarks.micro.windows")


@pytest.fixture
def timing(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("benchmarks.micro.timing")


@pytest.fixture
def one_sided(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("benchmarks.micro.one_sided")


@ONE_RANK
@pytest.mark.parametrize(
    ("words", "most", "sizes"),
    [
        ("8,64,1K", "256M", [8, 64, 1024]),
        ("4M, 1k,4M,8", "4M", [8, 1024, 4 * 2**20]),
        ("8,16M", "8M", [8]),
        ("1G", "1G", [2**30]),
        ("9", "1K", [8]),  # whole elements
    ],
)
def test_sizes(windows: ModuleType, words: str, most: str, sizes: list[int]) -> None:
    assert windows.sizes_of(words, most) == sizes


@ONE_RANK
@pytest.mark.parametrize(
    ("words", "most", "told"),
    [
        ("8,three", "1M", "--sizes"),
        ("8", "much", "--most"),
        ("2", "1M", "--sizes"),
        ("8,64", "4", "left|more than"),
        ("8", "2G", "1G"),
    ],
)
def test_sizes_that_are_none(windows: ModuleType, words: str, most: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        windows.sizes_of(words, most)


@ONE_RANK
def test_the_default_sizes_are_a_dozen_up_to_the_largest(windows: ModuleType) -> None:
    sizes = windows.sizes_of(windows.SIZES, windows.MOST)
    assert (len(sizes), sizes[0], sizes[-1]) == (12, 8, 256 * 2**20)


@pytest.mark.parametrize("word", ["8 B", "1 KiB", "256 KiB", "1.5 MiB", "2 GiB"])
def test_names_of_sizes(timing: ModuleType, word: str) -> None:
    number, unit = word.split()
    n_bytes = float(number) * {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[unit]
    assert timing.name_of(int(n_bytes)) == word


def test_small_vectors_are_called_several_times(timing: ModuleType) -> None:
    assert [timing.calls_of(n_bytes) for n_bytes in (0, 8, 2**16, 2**18, 2**28)] == [256, 256, 4, 1, 1]


def test_in_a_round_each_is_called_once_before_its_clock_starts(timing: ModuleType) -> None:
    seen: list[str] = []
    operations = {name: lambda name=name: seen.append(name) for name in "ab"}
    seconds = timing.one_round(operations, 3, lambda: seen.append("begin"))
    assert seen == ["a", "begin", "a", "a", "a", "b", "begin", "b", "b", "b"]
    assert len(seconds) == 2
    assert min(seconds) > 0


@ONE_RANK
@pytest.mark.parametrize(("most", "seconds", "n_rounds"), [(5, 1e9, 5), (20, 0.0, 5), (2, 0.0, 2)])
def test_rounds_end(
    windows: ModuleType, monkeypatch: pytest.MonkeyPatch, most: int, seconds: float, n_rounds: int
) -> None:
    monkeypatch.setattr(windows, "SECONDS_OF_A_SET", seconds)
    numbers = iter(range(100))
    made = windows.rounds(lambda: [float(next(numbers)), 0.5], most, bool)
    assert made[0] == pytest.approx(np.arange(1, n_rounds + 1))  # the first one has warmed up
    assert made.shape == (2, n_rounds)


@ONE_RANK
def test_another_rank_decides_whether_there_is_one_more_round(windows: ModuleType) -> None:
    answers = iter([True, True, False])
    assert windows.rounds(lambda: [1.0], 1, lambda _: next(answers)).shape == (1, 2)


def test_rows_are_medians_and_their_ratios(timing: ModuleType) -> None:
    seconds = np.array([[1.0, 9.0, 2.0], [8.0, 4.0, 6.0]])
    ours, theirs = timing.rows_of(["ours", "theirs"], seconds, {"theirs": "ours"}, n_bytes=12_000_000_000, n_calls=4)
    assert (ours["median_seconds"], ours["reference"], ours["ratio"]) == (2.0, None, None)
    assert (theirs["median_seconds"], theirs["ratio"], theirs["n_repeats"], theirs["n_calls"]) == (6.0, 3.0, 3, 4)
    assert theirs["p95_seconds"] == pytest.approx(7.8)
    assert (timing.beside(ours), timing.beside(theirs)) == ("", "3.00 x ours")
    assert timing.gb_per_s(theirs) == "2.00"


@ONE_RANK
def test_what_the_vectors_take(windows: ModuleType) -> None:
    n = 2 * windows.LARGEST_IN_PIECES
    assert windows.shared_bytes(n, 2) == 7 * n  # 2 vectors on each of 2 ranks, 3 centers
    n = windows.LARGEST_IN_PIECES
    assert windows.shared_bytes(n, 2) == 11 * n  # a third vector on each, 5 centers


def transfers(timing: ModuleType) -> list[dict[str, Any]]:
    """Of 4 KiB and 1 MiB: each transfer takes 2 and 4 times as long as its limit."""
    limits = {"local copy": 1e-6, "local sum": 2e-6}
    references = {
        f"{move}, {kind}": "local sum" if move == "accumulate" else "local copy"
        for kind in ("Allocate", "Create")
        for move in MOVES
    }
    names = [*limits, *references]
    rows = []
    for n_bytes in (2**12, 2**20):
        slower = {"Allocate": 2, "Create": 4}
        seconds = [limits.get(name) or slower[name.split(", ")[1]] * limits[references[name]] for name in names]
        rows += timing.rows_of(
            names, np.array(seconds)[:, None] * n_bytes / 2**12, references, n_bytes=n_bytes, n_calls=1
        )
    return rows


@ONE_RANK
def test_both_windows_stand_side_by_side(windows: ModuleType, timing: ModuleType) -> None:
    head, _, *lines = windows.table_of_transfers(transfers(timing))
    assert len(lines) == 2 * len(MOVES)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[:3] for row in cells[:3]] == [
        ["4 KiB", "put", "local copy"],
        ["4 KiB", "get", "local copy"],
        ["4 KiB", "accumulate", "local sum"],
    ]
    assert cells[2][3:] == ["2.00", "2.05", "4.00", "1.02", "2.00 x limit", "8.00", "0.51", "4.00 x limit"]
    assert head.count("|") == len(cells[0]) + 1
    assert cells[5][3] == "512"  # 256 times the vector


@ONE_RANK
def test_what_was_left_out_is_said(windows: ModuleType, timing: ModuleType) -> None:
    rows = timing.rows_of(["ours", "theirs"], np.ones((2, 3)), {"theirs": "ours"}, n_bytes=8, n_calls=1)
    document = {
        "results": {"calls": rows, "transfers": transfers(timing), "exchanges": rows},
        "left_out": [{"bytes": 2**28, "reason": "no room"}],
        "world": {"ranks": 2, "mpi": "an MPI"},
        "machine": {"cores": 2, "processor": "a processor"},
        "load_average": {"before": [0.25, 0, 0]},
    }
    shown = windows.show(document)
    assert "without 256 MiB: no room" in shown
    assert shown.startswith("2 ranks on 2 cores (a processor), an MPI; load 0.2")


@ONE_RANK
@pytest.mark.parametrize("n", [1, 2, 15, 1000, 1001, 2500, 64_000])
@pytest.mark.parametrize("n_ranks", [1, 2, 3, 5])
def test_pieces_cover_the_vector_once(one_sided: ModuleType, n: int, n_ranks: int) -> None:
    for pieces, longest in ((one_sided.chunks(n, n_ranks), 1000), (one_sided.tensors(n, n_ranks), n)):
        visited = np.concatenate([np.arange(n)[piece.part] for piece in pieces])
        assert sorted(visited) == list(range(n))
        assert all(1 <= piece.size <= longest for piece in pieces)
        memory = [(piece.window, piece.home, piece.at + k) for piece in pieces for k in range(piece.size)]
        assert len(set(memory)) == n  # no two elements at the same place
        assert {home for _, home, _ in memory} <= set(range(n_ranks))


@ONE_RANK
def test_long_vectors_are_spread_over_the_ranks(one_sided: ModuleType) -> None:
    assert len(one_sided.tensors(64_000, 3)) == one_sided.TENSORS
    for pieces in (one_sided.chunks(60_000, 3), one_sided.tensors(60_000, 3)):
        at_homes = np.bincount([piece.home for piece in pieces], [piece.size for piece in pieces])
        assert at_homes == pytest.approx([20_000] * 3, rel=0.1)
    assert {piece.size for piece in one_sided.chunks(48_000, 3)} == {1000}


@ON_RANKS
@pytest.mark.parametrize("n", [2, 1000, 40_001])
def test_transfers_arrive(world: Any, windows: ModuleType, one_sided: ModuleType, n: int) -> None:
    subject = one_sided.Transfers(world, n)
    windows.attend(world)
    if world.rank == 0:
        values = np.arange(n, dtype=np.float32) % 101
        call = subject.operations
        for kind in one_sided.KINDS:
            subject.data[:] = values
            call[f"put, {kind}"]()
            subject.data[:] = 1
            call[f"accumulate, {kind}"]()
            call[f"accumulate, {kind}"]()
            subject.data[:] = -1
            call[f"get, {kind}"]()
            assert np.array_equal(subject.data, values + 2)
    windows.attend(world)
    subject.free()


@ON_RANKS
@pytest.mark.parametrize("subject", ["Calls", "Transfers", "Exchanges"])
def test_every_operation_has_something_beside_it(world: Any, windows: ModuleType, one_sided: ModuleType, subject: str):
    arguments: dict[str, Any] = {"Calls": {}, "Transfers": {"n": 8}, "Exchanges": {"n": 3000, "in_pieces": True}}
    made = getattr(one_sided, subject)(world, **arguments[subject])
    limits = {"empty call", "local copy", "local sum", "local pass"}
    assert set(made.references) == set(made.operations) - limits
    assert set(made.references.values()) <= set(made.operations)
    windows.attend(world)
    if world.rank == 0 or subject == "Exchanges":
        for operation in made.operations.values():
            for _ in range(3):
                operation()
    windows.attend(world)
    made.free()


@ON_RANKS
@pytest.mark.parametrize("form", ["chunks", "tensors"])
def test_an_exchange_in_pieces_is_the_elastic_exchange(
    world: Any, windows: ModuleType, one_sided: ModuleType, form: str
) -> None:
    n = 2345
    pieces = one_sided.chunks(n, world.size, 100) if form == "chunks" else one_sided.tensors(n, world.size)
    start = np.random.default_rng(0).normal(size=(world.size, n))
    x = start[world.rank].astype(np.float32)
    subject = one_sided.InPieces(world, x, pieces)
    center, alpha = np.zeros(n), one_sided.RATE
    for rank in [*range(world.size), 0]:  # one after the other; rank 0 twice
        windows.attend(world)
        if rank == world.rank:
            subject.exchange()
        # Zhang, Choromanska, LeCun 2015 (arXiv 1412.6651), eq. 5-6
        difference = start[rank] - center
        start[rank] -= alpha * difference
        center += alpha * difference
    windows.attend(world)
    assert x == pytest.approx(start[world.rank], abs=1e-6)
    subject.free()


@ON_RANKS
def test_what_does_not_fit_is_told_on_all_ranks(world: Any, windows: ModuleType) -> None:
    assert windows.no_room(world, 8) is None
    assert "shared memory" in windows.no_room(world, 2**56)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("only_json", [True, False])
def test_two_ranks_make_the_table(
    windows: ModuleType,
    world: Any,
    only_json: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--sizes", "8,4K,16M", "--most", "64K", "--repeats", "2", *["--json"][: int(only_json)]]
    monkeypatch.setattr(sys, "argv", ["windows", *words])
    assert windows.main() == 0
    output = capsys.readouterr().out.splitlines()
    assert bool(output) == (world.rank == 0)
    *lines, last = world.comm.bcast(output)
    document = json.loads(last)
    if only_json:
        assert not lines
    else:
        vectors = [line.split("|")[1].strip() for line in lines if line.startswith("|")]
        assert vectors.count("8 B") == vectors.count("4 KiB") == 3 + 6
    results = document["results"]
    assert [{row["bytes"] for row in rows} for rows in results.values()] == [{8}, {8, 2**12}, {8, 2**12}]
    assert all(row["median_seconds"] > 0 for rows in results.values() for row in rows)
    assert document["left_out"] == []
    assert {"versions", "world", "machine", "load_average"} <= document.keys()


@ONE_RANK
def test_one_rank_has_no_target(
    windows: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["windows"])
    assert windows.main() == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "2 or more ranks" in err
