"""Formatting of tables and numbers; an unknown number is "-"."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence


def table(columns: Mapping[str, Sequence[str]], left: Collection[str] = ()) -> list[str]:
    """Return the lines of a Markdown table, with columns that are also aligned in plain text.

    Args:
        columns: The cells of each column, by its heading. All columns have the same length.
        left: The columns to align to the left.
    """
    widths = {name: max(len(name), *map(len, cells)) for name, cells in columns.items()}

    def line(cells: Mapping[str, str]) -> str:
        padded = (cell.ljust(widths[k]) if k in left else cell.rjust(widths[k]) for k, cell in cells.items())
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (widths[k] + 2) if k in left else "-" * (widths[k] + 1) + ":" for k in columns)
    n_rows = len(next(iter(columns.values())))
    rows = [line({name: cells[i] for name, cells in columns.items()}) for i in range(n_rows)]
    return [line({name: name for name in columns}), f"|{rule}|", *rows]


def number(value: float | None, form: str) -> str:
    """Format a number."""
    return "-" if value is None else form.format(value)


def duration(seconds: float | None) -> str:
    """Format a duration in seconds, minutes or hours."""
    if seconds is None or seconds < 120:
        return number(seconds, "{:.2f} s" if seconds is not None and seconds < 10 else "{:.1f} s")
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def size(n_bytes: float | None) -> str:
    """Format a size in B, kB, MB or GB, where 1 kB is 1000 B."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes is not None and n_bytes >= factor:
            return f"{n_bytes / factor:.3g} {unit}"
    return number(n_bytes, "{:.0f} B")
