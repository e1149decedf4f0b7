"""Plots of runs as PNG files: time shares, staleness, metrics of the method; ``curves`` has the others.

Figures are created as objects, without pyplot's global state, so that a calling program's own plots are unaffected.

A function that draws returns False, and writes no file, if the runs have no data for its plot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from matplotlib import rc_context, rcParamsDefault
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator, PercentFormatter

from mpitrain.collectives.world.statistics import SHARES, SMALLEST_DISTANCE_EXPONENT, STALENESS_BINS
from mpitrain.records.metrics import Column
from mpitrain.report.curves import draw_consensus, draw_curves
from mpitrain.report.runs import Run
from mpitrain.report.style import COLOURS, DPI, N_POINTS, PathLike, Series, add_title, series_of, tidy


def own_style() -> AbstractContextManager[None]:
    """Return a context in which matplotlib uses its defaults, and does not interpret ``$`` in a name as mathematics."""
    style = {name: value for name, value in rcParamsDefault.items() if "backend" not in name}
    return rc_context({**style, "text.parse_math": False})


SHARE_COLOURS = {"compute": "#009E73", "exchange": "#0072B2", "waiting": "#E69F00", "other": "#BBBBBB"}
MOST_PANELS = 8  # metrics of methods
MOST_WORKERS = 8  # lines of a panel


def draw_method(runs: Sequence[Run], path: PathLike) -> bool:
    """Draw the methods' own metrics (such as the leader, push weights or removed workers) against time.

    Each metric of a run has a panel. Each worker is a line in the panel.
    """
    panels = [
        (run, name, values)
        for run in runs
        for name, values in run.metrics.get("method", {}).items()
        if name != "seconds" and values.ndim == 2 and np.isfinite(values).any()
    ][:MOST_PANELS]
    if not panels:
        return False
    figure = Figure(figsize=(7.2, 0.6 + 1.7 * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, (run, name, values) in zip(grid, panels, strict=True):
        seconds = run.column("method", "seconds")
        n = min(len(seconds), len(values))
        every = -(-n // N_POINTS) or 1
        shown = np.unique(np.linspace(0, values.shape[1] - 1, min(values.shape[1], MOST_WORKERS)).astype(int))
        for k, worker in enumerate(shown):
            axes.plot(
                seconds[:n:every],
                values[:n:every, worker],
                color=COLOURS[k % len(COLOURS)],
                linewidth=1.2,
                drawstyle="steps-post",
                label=f"worker {worker}",
            )
        axes.set_title(f"{run.label}: {name.replace('_', ' ')}", fontsize=10, loc="left")
        tidy(axes)
    grid[-1].set_xlabel("seconds")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), frameon=False, fontsize=9)
    add_title(figure, runs)
    figure.savefig(path, dpi=DPI)
    return True


def draw_shares(runs: Sequence[Run], path: PathLike) -> bool:
    """Draw the shares of time: a stacked bar for each group, with the mean over its runs."""
    bars = []
    for one in series_of(runs):
        shares = [run.shares() for run in one.runs if run.shares()]
        if shares:
            bars.append((one.label, {name: float(np.mean([s.get(name, 0) for s in shares])) for name in SHARES}))
    if not bars:
        return False
    figure = Figure(figsize=(8, 1.6 + 0.45 * len(bars)), layout="constrained")
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
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
    add_title(figure, runs)
    figure.savefig(path, dpi=DPI)
    return True


def draw_staleness(runs: Sequence[Run], path: PathLike) -> bool:
    """Draw the staleness of exchanges: a histogram for each group, summed over its runs.

    There are two measures of staleness: the number of updates by other workers since a worker's last exchange with the
    center, and the distance by which these updates have moved the center.
    """
    histograms = []
    for one in series_of(runs):
        updates = last_histogram(one, "histogram")
        if updates is not None:
            histograms.append((one, updates, last_histogram(one, "distance")))
    if not histograms:
        return False
    last_used = max(int(np.flatnonzero(shares)[-1]) for _, shares, _ in histograms)
    moved = [distances for _, _, distances in histograms if distances is not None]
    used = np.flatnonzero(np.sum(moved, axis=0)[1:]) + 1 if moved else np.empty(0, int)
    # The first bin is no move at all, far below the others: it is drawn just left of the smallest move.
    at_zero = int(used[0]) - 2 if len(used) else 0
    figure = Figure(figsize=(7.2 + 3.6 * bool(moved), 0.9 + 1.35 * len(histograms)), layout="constrained")
    grid = figure.subplots(len(histograms), 1 + bool(moved), sharex="col", squeeze=False)
    for row, (one, shares, distances) in zip(grid, histograms, strict=True):
        row[0].bar(np.arange(len(shares)), shares, width=0.85, color=one.colour)
        cumulative = np.cumsum(shares)
        median, p95 = (bin_name(int(np.searchsorted(cumulative, q))) for q in (0.5 - 1e-9, 0.95 - 1e-9))
        row[0].set_title(f"{one.label}: median {median}, 95 % at most {p95}", fontsize=10, loc="left")
        if distances is not None:
            row[1].bar([at_zero, *range(1, len(distances))], distances, width=0.85, color=one.colour)
            middle = int(np.searchsorted(np.cumsum(distances), 0.5 - 1e-9))
            median = f"below {distance_name(middle + 1)}" if middle else "0"
            row[1].set_title(f"median {median}", fontsize=10, loc="left")
        for axes in row:
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axes.yaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
            tidy(axes)
    left = grid[-1][0]
    left.set_xlim(-0.7, max(last_used, 4) + 0.7)
    left.xaxis.set_major_locator(MultipleLocator(1 if last_used <= 12 else 2 if last_used <= 20 else 4))
    left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: bin_name(round(value))))
    left.set_xlabel("staleness (updates by others in between)")
    if moved:
        right = grid[-1][1]
        ticks = np.unique(np.linspace(used[0], used[-1], min(len(used), 5)).astype(int)) if len(used) else used
        right.set_xticks([at_zero, *ticks], ["0", *map(distance_name, ticks)])
        right.set_xlim(at_zero - 0.7, (used[-1] if len(used) else 4) + 0.7)
        right.set_xlabel("distance the center has moved meanwhile")
    figure.supylabel("share of exchanges", fontsize=10)
    add_title(figure, runs)
    figure.savefig(path, dpi=DPI)
    return True


def draw_scaling(rows: Sequence[Mapping[str, Any]], path: PathLike) -> None:
    """Draw samples per second and efficiency against ranks, with linear scaling as a dotted line.

    Args:
        rows: The rows of `report.scaling.scaling`.
        path: The file.
    """
    figure = Figure(figsize=(8.2, 3.6), layout="constrained")
    rate_axes, efficiency_axes = figure.subplots(1, 2)
    for k, algorithm in enumerate(dict.fromkeys(row["algorithm"] for row in rows)):
        ours = [row for row in rows if row["algorithm"] == algorithm]
        ranks = np.array([row["ranks"] for row in ours])
        rates = np.array([row["samples_per_second"] for row in ours])
        colour = COLOURS[k % len(COLOURS)]
        rate_axes.plot(ranks, rates[0] * ranks / ranks[0], ":", color=colour, linewidth=1)
        rate_axes.plot(ranks, rates, "o-", color=colour, label=algorithm)
        efficiency_axes.plot(ranks, [row["efficiency"] for row in ours], "o-", color=colour)
    rate_axes.set_ylabel("samples per second")
    rate_axes.set_ylim(bottom=0)
    rate_axes.legend(frameon=False)
    efficiency_axes.set_ylabel("efficiency")
    efficiency_axes.yaxis.set_major_formatter(PercentFormatter(1))
    efficiency_axes.set_ylim(bottom=0)
    for axes in (rate_axes, efficiency_axes):
        axes.set_xlabel("ranks")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        tidy(axes)
    figure.savefig(path, dpi=DPI)


def last_histogram(one: Series, name: str) -> Column | None:
    """Return a histogram at the end of the runs, with a sum of 1; None if nothing was counted."""
    lasts = [run.column("staleness", name) for run in one.runs]
    lasts = [last[-1] for last in lasts if len(last)]
    counts = np.nansum(lasts, axis=0) if lasts else np.zeros(1)
    return counts / counts.sum() if counts.sum() > 0 else None


DRAWINGS: dict[str, Callable[[Sequence[Run], PathLike], bool]] = {
    "curves.png": draw_curves,
    "shares.png": draw_shares,
    "staleness.png": draw_staleness,
    "consensus.png": draw_consensus,
    "method.png": draw_method,
}


def bin_name(index: int) -> str:
    """Format the name of a bin in a histogram of numbers of updates."""
    return f"{index}+" if index == STALENESS_BINS - 1 else str(index)


def distance_name(index: int) -> str:
    """Format the lower end of a bin in a histogram of distances."""
    return f"{2.0 ** (index + SMALLEST_DISTANCE_EXPONENT - 1):.1g}"
