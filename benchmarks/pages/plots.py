"""The plots of the benchmarks. Lines of Open MPI are solid, those of MPICH dashed; MPICH's bars are hatched.

Each ``draw_...`` takes the results of one benchmark and returns None where there is nothing to draw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from benchmarks.micro.timing import name_of
from benchmarks.pages.results import MPI_NAMES, MPIS, Result
from mpitrain.report.style import COLOURS, Dash, tidy

DASHES: dict[str, Dash] = {"openmpi": "-", "mpich": "--"}
MARKERS = {"openmpi": "o", "mpich": "s"}
BAR_RANKS = 2  # of the plots against the size of a vector

SUMS = ("all-reduce", "MPI_Allreduce", "gloo")
EXCHANGES = ("exchange", "Get/Put, Allocate", "Get/Put, Create", "Get/Put, server")
FORMS = ("tree reduce + broadcast", "MPI_Reduce + Bcast", "gossip", "MPI_Sendrecv + NumPy")

GREY, PALE = "#555555", "#BBBBBB"
LIMIT_COLOURS = {"local pass": "#000000", "local copy": "#000000", "local sum": "#888888"}


def sized(result: Result, rows: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return the sizes in bytes, ascending, and the median seconds of one operation."""
    points = sorted((row["bytes"], row["median_seconds"]) for row in rows if row["operation"] == name)
    return [n_bytes for n_bytes, _ in points], [seconds for _, seconds in points]


def bytes_axis(axes: Axes, sizes: Sequence[int]) -> None:
    """Label powers of four with their names, as many as fit."""
    smallest, largest = int(np.log2(min(sizes))), int(np.log2(max(sizes)))
    step = max(2, -(-(largest - smallest) // 6))
    ticks = [2**k for k in range(smallest, largest + 1, step)]
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: short(n)))
    axes.set_xlabel("bytes of the vector")


def short(n_bytes: float) -> str:
    """Format bytes as ``4K``."""
    for unit, factor in (("G", 2**30), ("M", 2**20), ("K", 2**10)):
        if n_bytes >= factor:
            return f"{n_bytes / factor:g}{unit}"
    return f"{n_bytes:g}"


def plain_log_y(axes: Axes, label: str) -> None:
    """Make the y axis logarithmic, with plain numbers instead of powers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel(label)


def against_size(
    grid: Any,
    results: Sequence[Result],
    panels: Sequence[tuple[str, Sequence[tuple[str, str]]]],
    rows_of: Callable[[Result], list[dict[str, Any]]],
) -> None:
    """Draw time above and bandwidth below, one column per set of operations.

    Args:
        grid: (2, panels) axes.
        results: A line each, if it has the operation.
        panels: Title of each column, and its operations with the words for them.
        rows_of: What is drawn of a result.
    """
    for (above, below), (title, names) in zip(grid.T, panels, strict=True):
        sizes: list[int] = []
        drawn = []
        colours = iter(COLOURS)
        for name, label in names:
            colour = LIMIT_COLOURS.get(name) or next(colours)
            for result in results:
                mpi = result.mpi or MPIS[0]
                x, seconds = sized(result, rows_of(result), name)
                if not x:
                    continue
                style = {
                    "color": colour,
                    "linestyle": DASHES[mpi],
                    "marker": MARKERS[mpi],
                    "markersize": 3,
                    "linewidth": 1.5,
                }
                above.plot(x, 1e6 * np.array(seconds), **style)
                below.plot(x, np.array(x) / np.array(seconds) / 1e9, **style)
                sizes += x
            if any(sized(result, rows_of(result), name)[0] for result in results):
                drawn.append(Line2D([], [], color=colour, linewidth=2, label=label))
        above.set_title(title, fontsize=10, loc="left")
        above.legend(handles=drawn, frameon=False, fontsize=8, loc="upper left")
        for axes in (above, below):
            tidy(axes)
            bytes_axis(axes, sizes)
        above.set_xlabel("")
        plain_log_y(above, "microseconds")
        below.set_ylabel("GB/s of the vector")
        below.set_ylim(bottom=0)


def legend_of_mpis(figure: Figure, results: Sequence[Result], *, bars: bool = False) -> None:
    """Add a legend of the MPIs, if there are two."""
    mpis = [mpi for mpi in MPIS if any(result.mpi == mpi for result in results)]
    if len(mpis) < 2:
        return
    handles: list[Any] = []
    for mpi in mpis:
        label = MPI_NAMES[mpi]
        if bars:
            handles.append(
                Patch(facecolor=PALE, edgecolor="white", hatch="" if mpi == "openmpi" else "////", label=label)
            )
        else:
            line = Line2D([], [], color=GREY, linestyle=DASHES[mpi], marker=MARKERS[mpi], markersize=4, label=label)
            handles.append(line)
    figure.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False, fontsize=9)


def of_pairs(results: Sequence[Result]) -> list[Result]:
    """Return the results with the number of ranks that the bars are for."""
    return [result for result in results if result.ranks == BAR_RANKS]


def having(results: Sequence[Result], names: Sequence[str]) -> list[Result]:
    """Return the results that measured any of these operations."""
    return [result for result in results if any(row["operation"] in names for row in result.document["results"])]


def draw_collectives(results: Sequence[Result]) -> Figure | None:
    """Draw all-reduces, exchanges, tree and gossip, each beside what it replaces, against the vector's size."""
    shown = of_pairs(results)
    names = {"All-reduce": SUMS, "Exchange with the center": (*EXCHANGES, "local pass"), "Tree and gossip": FORMS}
    words = {"all-reduce": "ours"}
    panels = [
        (title, [(n, words.get(n, n)) for n in of_one]) for title, of_one in names.items() if having(shown, of_one)
    ]
    if not panels:
        return None
    figure = Figure(figsize=(1 + 4.3 * len(panels), 7), layout="constrained")
    grid = figure.subplots(2, len(panels), squeeze=False)
    against_size(grid, shown, panels, lambda result: result.document["results"])
    legend_of_mpis(figure, shown)
    return figure


def sizes_of_all(results: Sequence[Result], names: Sequence[str]) -> list[int]:
    """Return the sizes, ascending, at which each result has some of these operations."""
    of_each = [{row["bytes"] for row in result.document["results"] if row["operation"] in names} for result in results]
    return sorted(set.intersection(*of_each)) if of_each else []


def draw_ranks(results: Sequence[Result], names: Sequence[str] = (*SUMS, *EXCHANGES)) -> Figure | None:
    """Draw some operations on more ranks, at each size that was measured with all numbers of ranks."""
    results = having(results, names)
    counts = sorted({result.ranks for result in results if result.ranks})
    sizes = sizes_of_all(results, names)
    if len(counts) < 2 or not sizes:
        return None
    figure = Figure(figsize=(5 * len(sizes), 4.6), layout="constrained")
    for axes, n_bytes in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        for colour, name in zip(COLOURS, names, strict=False):
            for mpi in MPIS:
                found = [
                    (result.ranks, 1e3 * row["median_seconds"])
                    for result in results
                    for row in result.document["results"]
                    if result.mpi == mpi and (row["bytes"], row["operation"]) == (n_bytes, name)
                ]
                points = sorted(found)
                if points:
                    style = {"color": colour, "linestyle": DASHES[mpi], "marker": MARKERS[mpi], "markersize": 4}
                    axes.plot(*zip(*points, strict=True), **style)
        axes.set_title(f"vectors of {name_of(n_bytes)}", fontsize=10, loc="left")
        tidy(axes)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(counts))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:g}"))
        axes.set_xlabel("ranks")
        plain_log_y(axes, "milliseconds")
    handles = [
        Line2D([], [], color=colour, linewidth=2, label=name) for colour, name in zip(COLOURS, names, strict=False)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=(len(names) + 1) // 2, frameon=False, fontsize=9)
    legend_of_mpis(figure, results)
    return figure


def draw_windows(results: Sequence[Result]) -> Figure | None:
    """Draw put, get and accumulate on both kinds of windows, and the exchanges built on them, against the size."""
    shown = [result for result in of_pairs(results) if result.document["results"]["transfers"]]
    if not shown:
        return None
    moves = ("put", "get", "accumulate")
    limits = [("local copy", "local copy"), ("local sum", "local sum")]
    panels = [
        (f"MPI_Win_{kind.lower()}", [*((f"{move}, {kind}", move) for move in moves), *limits])
        for kind in ("Allocate", "Create")
    ]
    exchanges = list(dict.fromkeys(row["operation"] for row in shown[0].document["results"]["exchanges"]))
    exchanges.sort(key=lambda name: name in LIMIT_COLOURS)  # as in the plot of the collectives
    panels.append(("Exchange of all ranks", [(name, name) for name in exchanges]))
    figure = Figure(figsize=(13, 7), layout="constrained")

    def rows(result: Result) -> list[dict[str, Any]]:
        of = result.document["results"]
        return [*of["transfers"], *of["exchanges"]]

    against_size(figure.subplots(2, 3), shown, panels, rows)
    legend_of_mpis(figure, shown)
    return figure


def draw_kernels(results: Sequence[Result]) -> Figure | None:
    """Draw the GB/s of each kernel, NumPy, torch and the limit."""
    if not results:
        return None
    rows = results[0].document["results"]
    kinds = {"mpitrain": COLOURS[0], "torch": COLOURS[4], "numpy": PALE}
    words = {"mpitrain": "mpitrain", "torch": "torch", "numpy": "NumPy"}
    half = -(-len(rows) // 2)
    figure = Figure(figsize=(12, 1.2 + 0.36 * half), layout="constrained")
    most = 1.08 * max(row[f"{kind}_gb_per_s"] for row in rows for kind in ("mpitrain", "limit"))
    for axes, part in zip(figure.subplots(1, 2), (rows[:half], rows[half:]), strict=True):
        places = np.arange(len(part))
        for k, (kind, colour) in enumerate(kinds.items()):
            axes.barh(places + 0.27 * (k - 1), [row[f"{kind}_gb_per_s"] for row in part], height=0.27, color=colour)
        for place, row in zip(places, part, strict=True):
            axes.plot([row["limit_gb_per_s"]] * 2, [place - 0.42, place + 0.42], color="black", linewidth=1.6)
        axes.set_yticks(places, [row["kernel"] for row in part], fontsize=8)
        axes.set_ylim(half - 0.4, -0.6)
        axes.set_xlim(0, most)
        axes.set_xlabel("GB/s of bytes moved")
        tidy(axes)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
    handles: list[Any] = [Patch(color=colour, label=words[kind]) for kind, colour in kinds.items()]
    handles.append(Line2D([], [], color="black", linewidth=1.6, label="limit: in-place scale of the same arrays"))
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return figure


def bars_of(
    axes: Axes,
    labels: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    colours: Sequence[str],
    tell: Mapping[str, Sequence[str]],
) -> None:
    """Draw horizontal bars, one per MPI and label, with text at their ends.

    Args:
        axes: To draw in.
        labels: From top to bottom.
        series: Of each MPI, a value for each label, None for none.
        colours: One for each label.
        tell: Of each MPI, the words for each label.
    """
    height = 0.8 / len(series)
    most = max(value for values in series.values() for value in values if value is not None)
    for k, (mpi, values) in enumerate(series.items()):
        for place, (value, colour, words) in enumerate(zip(values, colours, tell[mpi], strict=True)):
            if value is None:
                continue
            at = place + height * (k - (len(series) - 1) / 2)
            hatch = "////" if mpi == "mpich" else ""
            axes.barh(at, value, height=0.94 * height, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
            axes.text(value + 0.01 * most, at, words, va="center", fontsize=8)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlim(0, 1.22 * most)
    tidy(axes)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def draw_steps(results: Sequence[Result]) -> Figure | None:
    """Draw the milliseconds of a step, and their ratio to the step alone."""
    shown = of_pairs(results)
    models = list(dict.fromkeys(row["model"] for result in shown for row in result.document["results"]))
    if not models:
        return None
    steps = [
        list(dict.fromkeys(row["step"] for r in shown for row in r.document["results"] if row["model"] == model))
        for model in models
    ]
    figure = Figure(figsize=(8.5, 0.9 + sum(0.7 + 0.46 * len(of_one) for of_one in steps)), layout="constrained")
    grid = figure.subplots(len(models), 1, squeeze=False, height_ratios=[len(of_one) for of_one in steps])[:, 0]
    for axes, model, names in zip(grid, models, steps, strict=True):
        series: dict[str, list[float | None]] = {}
        tell: dict[str, list[str]] = {}
        for result in shown:
            found = {row["step"]: row for row in result.document["results"] if row["model"] == model}
            if found:
                mpi = result.mpi or MPIS[0]
                series[mpi] = [1e3 * found[name]["median_seconds"] if name in found else None for name in names]
                tell[mpi] = [f"{found[name]['of_alone']:.2f} x" if name in found else "" for name in names]
        theirs = ("DDP", "PostLocalSGD")
        colours = [GREY if name == "alone" else COLOURS[1] if name.startswith(theirs) else COLOURS[0] for name in names]
        bars_of(axes, names, series, colours, tell)
        axes.set_title(model, fontsize=10, loc="left")
        axes.set_xlabel("milliseconds of a step; at the bars: times the step alone")
    legend_of_mpis(figure, shown, bars=True)
    return figure


def draw_stragglers(results: Sequence[Result]) -> Figure | None:
    """Draw the throughput that the other ranks keep beside a slow rank."""
    if not results:
        return None
    methods = list(dict.fromkeys(row["method"] for result in results for row in result.document["results"]))
    series: dict[str, list[float | None]] = {}
    tell: dict[str, list[str]] = {}
    for result in results:
        retained = {row["method"]: row["retained_fraction"] for row in result.document["results"]}
        series[result.mpi or MPIS[0]] = [100 * retained[name] if name in retained else None for name in methods]
        tell[result.mpi or MPIS[0]] = [f"{retained[name]:.0%}" if name in retained else "" for name in methods]
    figure = Figure(figsize=(7.2, 1.2 + 0.5 * len(methods) * len(series)), layout="constrained")
    axes = figure.subplots()
    bars_of(axes, methods, series, [COLOURS[k % len(COLOURS)] for k in range(len(methods))], tell)
    axes.axvline(100, color=GREY, linewidth=1, linestyle=":")
    factor = results[0].document["factor"]
    axes.set_xlabel(f"% of their throughput that the others keep beside a rank {factor:g} times slower")
    legend_of_mpis(figure, results, bars=True)
    return figure


def draw_compare(results: Sequence[Result]) -> Figure | None:
    """Draw seconds to the target accuracy, gradients per second and bytes per gradient, method by method."""
    if not results:
        return None
    document = results[0].document
    rows = document["rows"]
    panels = (
        ("seconds_to_target", f"seconds to {document['target_accuracy']:.0%} test accuracy", 1.0, "{:.2f}"),
        ("gradients_per_second", "gradients in a second, all ranks", 1.0, "{:,.0f}"),
        ("bytes_per_gradient", "kB sent for a gradient", 1e-3, "{:.3g}"),
    )
    figure = Figure(figsize=(12, 1.1 + 0.45 * len(rows)), layout="constrained")
    names = [row["algorithm"] for row in rows]
    colours = [COLOURS[k % len(COLOURS)] for k in range(len(rows))]
    for axes, (column, label, factor, form) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        values = [None if row[column] is None else factor * row[column] for row in rows]
        if any(value is not None for value in values):
            words = ["" if value is None else form.format(value) for value in values]
            bars_of(axes, names, {"openmpi": values}, colours, {"openmpi": words})
        axes.set_xlabel(label)
    for axes in figure.axes[1:]:
        axes.tick_params(axis="y", labelleft=False)
    return figure
