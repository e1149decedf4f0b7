"""The scaling table: speed-up and efficiency against formulas, repetitions, unfinished runs, and the files."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpitrain.errors import UsageError
from mpitrain.report.runs import Run
from mpitrain.report.scaling import scaling, table, write_scaling


def run(ranks: int, rate: float, *, algorithm: str = "easgd", nodes: int | None = None) -> Run:
    world = {"nodes": nodes or ranks}
    result = {"algorithm": algorithm, "ranks": ranks, "samples_per_second": rate, "world": world}
    return Run(f"{algorithm}-{ranks}", algorithm, {}, result)


def test_speed_up_and_efficiency_are_relative_to_the_fewest_ranks() -> None:
    rows = scaling([run(8, 600.0), run(2, 200.0), run(4, 380.0)])
    assert [row["ranks"] for row in rows] == [2, 4, 8]
    assert [row["speed_up"] for row in rows] == pytest.approx([1, 1.9, 3])
    assert [row["efficiency"] for row in rows] == pytest.approx([1, 0.95, 0.75])


def test_repetitions_count_by_their_median() -> None:
    rows = scaling([run(1, 90.0), run(1, 100.0), run(1, 500.0), run(2, 150.0)])
    assert [row["runs"] for row in rows] == [3, 1]
    assert (rows[0]["samples_per_second"], rows[0]["speed_up"]) == (100.0, 1.0)
    assert rows[1]["efficiency"] == pytest.approx(0.75)


def test_each_algorithm_is_compared_with_itself() -> None:
    rows = scaling([run(1, 100.0), run(2, 200.0), run(1, 10.0, algorithm="sgp"), run(2, 15.0, algorithm="sgp")])
    assert [(row["algorithm"], row["efficiency"]) for row in rows] == [
        ("easgd", 1.0),
        ("easgd", 1.0),
        ("sgp", 1.0),
        ("sgp", 0.75),
    ]


def test_as_many_ranks_on_other_nodes_are_another_row() -> None:
    rows = scaling([run(4, 400.0, nodes=1), run(4, 300.0, nodes=2)])
    assert [(row["nodes"], row["speed_up"]) for row in rows] == [(1, 1.0), (2, 0.75)]


def test_unfinished_runs_are_named_and_left_out(tmp_path: Path) -> None:
    document = write_scaling([run(1, 100.0), Run("later", "later", {})], tmp_path / "out")
    assert [row["ranks"] for row in document["scaling"]] == [1]
    assert document["unfinished"] == ["later"]
    with pytest.raises(UsageError, match="none of these runs has finished"):
        scaling([Run("later", "later", {})])


def test_the_page_holds_the_table_and_the_plot(tmp_path: Path) -> None:
    document = write_scaling([run(1, 100.0), run(2, 190.0)], tmp_path)
    page = (tmp_path / "scaling.md").read_text()
    assert all(line in page for line in table(document["scaling"]))
    assert "95%" in page
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
