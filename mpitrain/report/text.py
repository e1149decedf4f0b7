"""Tables and numbers as people read them; "-" for what is not known."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence


def table(columns: Mapping[str, Sequence[str]], left: Collection[str] = ()) -> list[str]:
    """The lines of a Markdown table whose columns line up as plain text too.

    Args:
        columns: Heading and cells of each column; all of the same length.
        left: The columns that are aligned to the left.
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
    """As the format says."""
    return "-" if value is None else form.format(value)


def duration(seconds: float | None) -> str:
    """In seconds, minutes or hours."""
    if seconds is None or seconds < 120:
        return number(seconds, "{:.2f} s" if seconds is not None and seconds < 10 else "{:.1f} s")
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def size(n_bytes: float | None) -> str:
    """In B, kB, MB or GB of powers of ten."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes is not None and n_bytes >= factor:
            return f"{n_bytes / factor:.3g} {unit}"
    return number(n_bytes, "{:.0f} B")
