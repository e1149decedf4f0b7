"""Pictures of runs: curves, time shares, staleness, consensus distance, as PNG files.

Matplotlib is used through its objects alone, with no figure kept in global state, so that a program which plots itself
is left alone. Runs of one group (one method, several seeds) are one line, their median, in a band from the smallest to
the largest.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator, PercentFormatter

from mpitrain.metrics import Column
from mpitrain.report.runs import SHARES, Run
from mpitrain.report.style import BYTES, GRADIENTS, SECONDS, Series, legend, scale_x, scale_y, series_of, tidy

PathLike = str | os.PathLike[str]

SHARE_COLOURS = {"compute": "#009E73", "exchange": "#0072B2", "waiting": "#E69F00", "other": "#BBBBBB"}
DPI = 130
N_POINTS = 400  # of a drawn line
MOST_RAW = 6  # lines with their raw values faint behind them: more cannot be told apart
LAST_BIN = 32  # of a staleness histogram: "32 or more"


def running_median(x: Column, y: Column) -> tuple[Column, Column]:
    """`y` smoothed by the median of a window of a twentieth of its length, at no more than N_POINTS places.

    A short curve is left as it is: every one of its points is a part of its shape.
    """
    half = len(y) // 40
    centers = np.unique(np.linspace(0, len(y) - 1, min(len(y), N_POINTS)).astype(int)) if len(y) else np.empty(0, int)
    return x[centers], np.array([np.median(y[max(0, i - half) : i + half + 1]) for i in centers])


def draw_curves(runs: Sequence[Run], path: PathLike) -> bool:
    """Training loss, test loss and test accuracy against seconds, gradients and bytes. False without data."""
    rows = [("progress", "loss", "training loss"), ("evaluation", "test_loss", "test loss")]
    rows = [row for row in [*rows, ("evaluation", "test_accuracy", "test accuracy")] if _has(runs, row[0], row[1])]
    columns = [
        x for x in (SECONDS, GRADIENTS, BYTES) if any(_largest(runs, row[0], x.column, row[1]) > 0 for row in rows)
    ]
    if not (rows and columns):
        return False
    size = (0.8 + 3.7 * len(columns), 0.9 + 2.7 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(rows), len(columns), sharex="col", sharey="row", squeeze=False)
    series = series_of(runs)
    for axes_of_row, (table, y, label) in zip(grid, rows, strict=True):
        for axes, x in zip(axes_of_row, columns, strict=True):
            for one in series:
                _draw_line(axes, one, table, x.column, y, raw=y == "loss" and len(series) <= MOST_RAW)
            tidy(axes)
        axes_of_row[0].set_ylabel(label)
        scale_y(axes_of_row[0], y, np.concatenate([run.curve(table, "seconds", y)[1] for run in runs]))
    for axes, x in zip(grid[-1], columns, strict=True):
        ends = [_end([_largest([run], row[0], x.column, row[1]) for run in one.runs]) for one in series for row in rows]
        scale_x(axes, x, [end for end in ends if end > 0])
    legend(figure, series, size[0])
    figure.savefig(path, dpi=DPI)
    return True


def draw_consensus(runs: Sequence[Run], path: PathLike) -> bool:
    """The distance between the workers against gradients. False without data."""
    series = [one for one in series_of(runs) if any((_consensus(run)[1] > 0).any() for run in one.runs)]
    if not series:
        return False
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    for one in series:
        _draw_line(axes, one, "progress", "gradients", "consensus_distance")
    tidy(axes)
    axes.set_ylabel("consensus distance")
    curves = [_consensus(run) for one in series for run in one.runs]
    values = np.concatenate([distances for _, distances in curves])
    scale_y(axes, "consensus_distance", values[values > 0])
    scale_x(axes, GRADIENTS, [float(gradients[-1]) for gradients, _ in curves if len(gradients)])
    legend(figure, series, 7.2)
    figure.savefig(path, dpi=DPI)
    return True


def _consensus(run: Run) -> tuple[Column, Column]:
    return run.curve("progress", "gradients", "consensus_distance")


def draw_shares(runs: Sequence[Run], path: PathLike) -> bool:
    """Where the time went: one stacked bar per group (the mean of its runs). False without data."""
    bars = []
    for one in series_of(runs):
        shares = [run.shares() for run in one.runs if run.shares()]
        if shares:
            bars.append((one.label, {name: float(np.mean([s.get(name, 0) for s in shares])) for name in SHARES}))
    if not bars:
        return False
    figure = Figure(figsize=(8, 1.3 + 0.45 * len(bars)), layout="constrained")
    axes = figure.subplots()
    for row, (_, shares_of_bar) in enumerate(bars):
        left, rest = 0.0, max(0.0, 1 - sum(shares_of_bar.values()))
        for name, share in {**shares_of_bar, "other": rest}.items():
            axes.barh(row, share, left=left, height=0.7, color=SHARE_COLOURS[name], edgecolor="white", linewidth=0.8)
            if share >= 0.05:
                colour = "black" if name in ("waiting", "other") else "white"
                axes.text(left + share / 2, row, f"{share:.0%}", ha="center", va="center", fontsize=9, color=colour)
            left += share
    axes.set_yticks(range(len(bars)), [label for label, _ in bars])
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("share of the time, mean over the ranks")
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    patches = [Patch(color=colour, label=name) for name, colour in SHARE_COLOURS.items()]
    figure.legend(handles=patches, loc="outside upper center", ncols=len(patches), frameon=False)
    figure.savefig(path, dpi=DPI)
    return True


def draw_staleness(runs: Sequence[Run], path: PathLike) -> bool:
    """How old what a worker got was: one histogram per group (the sum of its runs). False without data."""
    histograms = []
    for one in series_of(runs):
        lasts = [run.column("staleness", "histogram") for run in one.runs]
        counts = np.nansum([last[-1] for last in lasts if len(last)], axis=0) if any(map(len, lasts)) else np.zeros(1)
        if counts.sum() > 0:
            histograms.append((one, counts / counts.sum()))
    if not histograms:
        return False
    last_used = max(int(np.flatnonzero(shares)[-1]) for _, shares in histograms)
    figure = Figure(figsize=(7.2, 0.9 + 1.35 * len(histograms)), layout="constrained")
    grid = figure.subplots(len(histograms), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (one, shares) in zip(grid, histograms, strict=True):
        axes.bar(np.arange(len(shares)), shares, width=0.85, color=one.colour)
        cumulative = np.cumsum(shares)
        median, p95 = (_bin_name(int(np.searchsorted(cumulative, q))) for q in (0.5 - 1e-9, 0.95 - 1e-9))
        axes.set_title(f"{one.label}: median {median}, 95 % at most {p95}", fontsize=10, loc="left")
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.yaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
        tidy(axes)
    grid[-1].set_xlim(-0.7, max(last_used, 4) + 0.7)
    grid[-1].xaxis.set_major_locator(MultipleLocator(1 if last_used <= 12 else 2 if last_used <= 20 else 4))
    grid[-1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: _bin_name(round(value))))
    grid[-1].set_xlabel("staleness (updates by others in between)")
    figure.supylabel("share of exchanges", fontsize=10)
    figure.savefig(path, dpi=DPI)
    return True


DRAWINGS: dict[str, Callable[[Sequence[Run], PathLike], bool]] = {
    "curves.png": draw_curves,
    "shares.png": draw_shares,
    "staleness.png": draw_staleness,
    "consensus.png": draw_consensus,
}


def _draw_line(axes: Axes, one: Series, table: str, x: str, y: str, *, raw: bool = False) -> None:
    """The runs of a series: a band, or one line; a noisy training loss is smoothed, and `raw` faint underneath."""
    curves = [run.curve(table, x, y) for run in one.runs]
    curves = [(a, b) for a, b in curves if len(a) and a[-1] > 0]  # all at 0: bytes of a run that sends none
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
        grid, values = _on_one_grid(curves)
        axes.fill_between(grid, values.min(axis=0), values.max(axis=0), color=one.colour, alpha=0.18, linewidth=0)
        axes.plot(grid, np.median(values, axis=0), color=one.colour, linestyle=one.dash, linewidth=1.6)


def _on_one_grid(curves: Sequence[tuple[Column, Column]]) -> tuple[Column, Column]:
    """Values (curves, points) of all curves at the same points; one that has ended keeps its last value."""
    start, stop = max(a[0] for a, _ in curves), _end([a[-1] for a, _ in curves])
    grid = np.linspace(min(start, stop), stop, N_POINTS)
    return grid, np.stack([np.interp(grid, a, b) for a, b in curves])


def _end(ends: Sequence[float]) -> float:
    """Where the line of several runs ends: half of them have."""
    return float(np.median(ends))


def _has(runs: Sequence[Run], table: str, y: str) -> bool:
    return any(len(run.curve(table, "seconds", y)[0]) for run in runs)


def _largest(runs: Sequence[Run], table: str, x: str, y: str) -> float:
    return max((float(run.curve(table, x, y)[0][-1]) for run in runs if len(run.curve(table, x, y)[0])), default=0.0)


def _bin_name(index: int) -> str:
    return f"{LAST_BIN}+" if index >= LAST_BIN else str(index)
