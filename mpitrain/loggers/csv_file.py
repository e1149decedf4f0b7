"""The logger that writes ``RUN/log.csv``, a table with a row per call."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpitrain.errors import UsageError
from mpitrain.records.durable import replace_text

NAME = "log.csv"


class CSVLogger:
    """A CSV file with a column ``step`` and a column for each name. A cell is empty if a row lacks its name.

    A continued file loses the rows of the steps that are made again. A new name rewrites the file with a new column.

    Args:
        folder: The folder of the file.

    Raises:
        UsageError: There is no folder.
    """

    def __init__(self, folder: Path | None) -> None:
        if folder is None:
            raise UsageError("a CSV log needs a folder")
        self._path = folder / NAME
        self._names: list[str] = []
        self._file: io.TextIOWrapper | None = None
        self._is_new = True

    def begin(self, config: Mapping[str, Any]) -> None:
        """Create the folder."""
        self._path.parent.mkdir(parents=True, exist_ok=True)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append a row, and write it to the file at once."""
        if self._file is None or any(name not in self._names for name in values):
            self._rewrite(step, values)
        assert self._file is not None
        csv.writer(self._file, lineterminator="\n").writerow([step, *(values.get(name, "") for name in self._names)])
        self._file.flush()

    def _rewrite(self, step: int, values: Mapping[str, float]) -> None:
        """Write the file again with the columns of ``values``, and leave it open to append to it."""
        if self._file is not None:
            self._file.close()
            self._file = None
        rows = _read(self._path)
        if self._is_new:  # this object has not written yet: the rows are those of a run that continues
            rows = [row for row in rows if int(row["step"]) < step]
            self._is_new = False
        known = dict.fromkeys(name for row in rows[:1] for name in row if name != "step")
        self._names = list(known | dict.fromkeys(values))
        text = io.StringIO()
        writer = csv.DictWriter(text, ["step", *self._names], restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        replace_text(self._path, text.getvalue())
        self._file = self._path.open("a", encoding="utf-8", newline="\n")

    def end(self, result: Mapping[str, Any] | None) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _read(path: Path) -> list[dict[str, str]]:
    """Return the complete rows of a file, without the last one if a killed process has left a part of it."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    rows = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
    # A row with more or fewer cells than the header is not one of ours.
    complete = (row for row in rows if None not in row and None not in row.values())
    return [row for row in complete if row.get("step", "").isdigit()]
