"""Curves of runs: losses and accuracy against time, gradients and bytes; the workers' distance from the consensus.

The runs of a group (one method, several seeds) are drawn as one line, their median, in a band from the smallest to the
largest value. In a figure, all axes of losses, and all axes of distances, have the same kind of scale: linear or
logarithmic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mpitrain.records.metrics import Column
from mpitrain.report.runs import Run
from mpitrain.report.style import (
    BYTES,
    COLOURS,
    DPI,
    GRADIENTS,
    N_POINTS,
    SECONDS,
    Dash,
    PathLike,
    Series,
    add_title,
    legend,
    scale_x,
    scale_y,
    series_of,
    tidy,
)

MOST_RAW = 6  # lines with faint raw values behind them; more would be illegible
LOSSES = (("progress", "loss", "training loss"), ("evaluation", "test_loss", "test loss"))
ACCURACY = ("evaluation", "test_accuracy", "test accuracy")
LOOKS: tuple[tuple[str, Dash], ...] = ((COLOURS[0], "-"), (COLOURS[1], "-"))
"""Colour and dash of the training loss, or the accuracy, and of the test loss of a single run."""


def running_median(x: Column, y: Column) -> tuple[Column, Column]:
    """Smooth `y` by a running median, and return at most N_POINTS points.

    The window is a twentieth of the curve. A short curve is not smoothed.
    """
    half = len(y) // 40
    centers = np.unique(np.linspace(0, len(y) - 1, min(len(y), N_POINTS)).astype(int)) if len(y) else np.empty(0, int)
    return x[centers], np.array([np.median(y[max(0, i - half) : i + half + 1]) for i in centers])


def draw_curves(runs: Sequence[Run], path: PathLike) -> bool:
    """Draw training loss, test loss and test accuracy against seconds, gradients and bytes.

    A single run has one panel for its losses and one for its accuracy, because its gradients, seconds and bytes are
    almost proportional.
    """
    if len(runs) == 1:
        return _draw_single(runs[0], path)
    rows = [row for row in (*LOSSES, ACCURACY) if _has(runs, row[0], row[1])]
    columns = [
        x for x in (SECONDS, GRADIENTS, BYTES) if any(_largest(runs, row[0], x.column, row[1]) > 0 for row in rows)
    ]
    if not (rows and columns):
        return False
    size = (0.8 + 3.7 * len(columns), 0.9 + 2.7 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(rows), len(columns), sharex="col", sharey="row", squeeze=False)
    series, losses = series_of(runs), _values(runs, [row[:2] for row in LOSSES])
    for axes_of_row, (table, y, label) in zip(grid, rows, strict=True):
        for axes, x in zip(axes_of_row, columns, strict=True):
            for one in series:
                _draw_line(axes, one, table, x.column, y, raw=y == "loss" and len(series) <= MOST_RAW)
            tidy(axes)
        axes_of_row[0].set_ylabel(label)
        values = _values(runs, [(table, y)])
        scale_y(axes_of_row[0], y, values, deciding=losses if y != "test_accuracy" else values)
    for axes, x in zip(grid[-1], columns, strict=True):
        ends = [_end([_largest([run], row[0], x.column, row[1]) for run in one.runs]) for one in series for row in rows]
        scale_x(axes, x, [end for end in ends if end > 0])
    legend(figure, series, size[0])
    add_title(figure, runs)
    figure.savefig(path, dpi=DPI)
    return True


def _draw_single(run: Run, path: PathLike) -> bool:
    losses = [row for row in LOSSES if _has([run], row[0], row[1])]
    panels = [rows for rows in (losses, [ACCURACY] if _has([run], *ACCURACY[:2]) else []) if rows]
    if not panels:
        return False
    figure = Figure(figsize=(0.6 + 4.6 * len(panels), 3.9), layout="constrained")
    (series,) = series_of([run])
    for axes, rows in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for k, (table, y, label) in enumerate(rows):
            one = Series(label, series.runs, *LOOKS[k])
            _draw_line(axes, one, table, "gradients", y, raw=y == "loss")
            axes.lines[-1].set_label(label)
        tidy(axes)
        axes.set_ylabel(rows[0][2] if len(rows) == 1 else "loss")
        values = _values([run], [row[:2] for row in rows])
        scale_y(axes, rows[0][1], values)
        if len(rows) > 1:
            axes.legend(frameon=False, fontsize=9)
        scale_x(axes, GRADIENTS, [_largest([run], rows[-1][0], "gradients", rows[-1][1])])
        _add_time(axes, run)
    add_title(figure, [run])
    figure.savefig(path, dpi=DPI)
    return True


def _add_time(axes: Axes, run: Run) -> None:
    """Add the time as a second axis above the gradients, if both increase."""
    gradients, seconds = run.curve("progress", "gradients", "seconds")
    both = (np.diff(gradients, prepend=0) > 0) & (np.diff(seconds, prepend=0) > 0)
    gradients, seconds = np.concatenate([[0], gradients[both]]), np.concatenate([[0], seconds[both]])
    if len(gradients) < 2:
        return
    rate = seconds[-1] / gradients[-1]  # beyond the last row

    def to_seconds(x: Any) -> Any:
        return np.interp(x, gradients, seconds) + rate * np.maximum(np.asarray(x) - gradients[-1], 0)

    def to_gradients(x: Any) -> Any:
        return np.interp(x, seconds, gradients) + np.maximum(np.asarray(x) - seconds[-1], 0) / rate

    above = axes.secondary_xaxis("top", functions=(to_seconds, to_gradients))
    scale_x(above, SECONDS, [float(seconds[-1])])  # type: ignore[arg-type]
    above.tick_params(labelsize=8)


def draw_consensus(runs: Sequence[Run], path: PathLike) -> bool:
    """Draw the distance of the workers from the consensus against gradients, and the elastic energy if there is one."""
    rows = [("consensus_distance", "distance of the workers"), ("elastic_energy", "elastic energy")]
    rows = [row for row in rows if any((_spread(run, row[0])[1] > 0).any() for run in runs)]
    if not rows:
        return False
    figure = Figure(figsize=(7.2, 1.2 + 3.0 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
    shown: list[Series] = []
    values = [np.concatenate([_spread(run, name)[1] for run in runs]) for name, _ in rows]
    values = [column[column > 0] for column in values]
    widest = max(values, key=lambda column: float(column.max() / column.min()))
    for axes, column, (name, label) in zip(grid, values, rows, strict=True):
        series = [one for one in series_of(runs) if any((_spread(run, name)[1] > 0).any() for run in one.runs)]
        shown += [one for one in series if one not in shown]
        for one in series:
            _draw_line(axes, one, "progress", "gradients", name)
        tidy(axes)
        axes.set_ylabel(label)
        scale_y(axes, name, column, deciding=widest)
    ends = [_spread(run, "consensus_distance")[0] for one in shown for run in one.runs]
    scale_x(grid[-1], GRADIENTS, [float(gradients[-1]) for gradients in ends if len(gradients)])
    if len(runs) > 1:
        legend(figure, shown, 7.2)
    add_title(figure, runs)
    figure.savefig(path, dpi=DPI)
    return True


def _spread(run: Run, name: str) -> tuple[Column, Column]:
    return run.curve("progress", "gradients", name)


def _draw_line(axes: Axes, one: Series, table: str, x: str, y: str, *, raw: bool = False) -> None:
    """Draw the runs of a series as a line, in a band if there are several.

    The training loss is smoothed; `raw` draws its values faintly underneath.
    """
    curves = [run.curve(table, x, y) for run in one.runs]
    curves = [(a, b) for a, b in curves if len(a) and a[-1] > 0]  # a run that sends nothing has all bytes at 0
    if table == "progress" and y == "loss":
        if raw and len(curves) == 1:
            a, b = curves[0]
            every = -(-len(a) // (4 * N_POINTS))
            axes.plot(a[::every], b[::every], color=one.colour, linewidth=0.6, alpha=0.25)
        curves = [running_median(a, b) for a, b in curves]
    marker: dict[str, Any] = (
        {"marker": "o", "markersize": 3} if table == "evaluation" and all(len(a) <= 25 for a, _ in curves) else {}
    )
    if len(curves) == 1:
        axes.plot(*curves[0], color=one.colour, linestyle=one.dash, linewidth=1.6, **marker)
    elif curves:
        grid, values = on_one_grid(curves)
        axes.fill_between(grid, values.min(axis=0), values.max(axis=0), color=one.colour, alpha=0.18, linewidth=0)
        axes.plot(grid, np.median(values, axis=0), color=one.colour, linestyle=one.dash, linewidth=1.6)


def on_one_grid(curves: Sequence[tuple[Column, Column]]) -> tuple[Column, Column]:
    """Return common points on the x axis, and the values (curves, points) of all curves at these points.

    After its end, a curve keeps its last value.
    """
    start, stop = max(a[0] for a, _ in curves), _end([a[-1] for a, _ in curves])
    grid = np.linspace(min(start, stop), stop, N_POINTS)
    return grid, np.stack([np.interp(grid, a, b) for a, b in curves])


def _end(ends: Sequence[float]) -> float:
    """Return the end of the line of several runs: the median of their ends."""
    return float(np.median(ends))


def _has(runs: Sequence[Run], table: str, y: str) -> bool:
    return any(len(run.curve(table, "seconds", y)[0]) for run in runs)


def _largest(runs: Sequence[Run], table: str, x: str, y: str) -> float:
    return max((float(run.curve(table, x, y)[0][-1]) for run in runs if len(run.curve(table, x, y)[0])), default=0.0)


def _values(runs: Sequence[Run], columns: Sequence[tuple[str, str]]) -> Column:
    return np.concatenate([run.curve(table, "seconds", y)[1] for run in runs for table, y in columns])
