"""The CSV log: the table that a spreadsheet would have after the same calls."""

from __future__ import annotations

import csv
from pathlib import Path

from mpitrain.loggers.csv_file import CSVLogger


def table(path: Path) -> list[list[str]]:
    with (path / "log.csv").open(newline="") as file:
        return list(csv.reader(file))


def logged(folder: Path, *rows: tuple[int, dict[str, float]]) -> CSVLogger:
    """Return a logger that has begun and written the rows; it is not closed."""
    one = CSVLogger(folder)
    one.begin({})
    for step, values in rows:
        one.log(step, values)
    return one


def test_a_row_is_in_the_file_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    one = logged(tmp_path / "new", (1, {"a": 1.5, "b": -2.0}))
    assert table(tmp_path / "new") == [["step", "a", "b"], ["1", "1.5", "-2.0"]]
    one.log(2, {"b": 3.0})
    assert table(tmp_path / "new")[2:] == [["2", "", "3.0"]]


def test_a_new_name_becomes_a_column_and_no_row_is_lost(tmp_path: Path) -> None:
    logged(tmp_path, (1, {"a": 1.0}), (1, {'b, "c"\nd': 2.0}), (3, {"a": 4.0})).end({})
    assert table(tmp_path) == [
        ["step", "a", 'b, "c"\nd'],
        ["1", "1.0", ""],
        ["1", "", "2.0"],
        ["3", "4.0", ""],
    ]


def test_a_continued_log_replaces_the_steps_that_are_made_again(tmp_path: Path) -> None:
    logged(tmp_path, *((step, {"a": float(step)}) for step in (1, 2, 3, 4))).end(None)
    logged(tmp_path, (3, {"a": 30.0}), (3, {"c": 1.0})).end({})
    assert table(tmp_path) == [
        ["step", "a", "c"],
        ["1", "1.0", ""],
        ["2", "2.0", ""],
        ["3", "30.0", ""],
        ["3", "", "1.0"],
    ]


def test_the_rest_of_a_row_that_a_killed_process_has_left_is_dropped(tmp_path: Path) -> None:
    logged(tmp_path, (1, {"a": 1.0}), (2, {"a": 2.0}))
    with (tmp_path / "log.csv").open("a") as file:
        file.write("3,0.")
    logged(tmp_path, (4, {"a": 4.0}))
    assert [row[0] for row in table(tmp_path)] == ["step", "1", "2", "4"]


def test_a_file_of_another_kind_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_bytes(b"\xff\x00 no table\nat all\n")
    logged(tmp_path, (1, {"a": 1.0}))
    assert table(tmp_path) == [["step", "a"], ["1", "1.0"]]
