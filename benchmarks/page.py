"""One page of all results there are: the project's bars in one table, every benchmark's own table, and plots.

    python benchmarks/page.py [--results benchmarks/results]

Reads what record.py has kept, NAME.md and NAME.json, and writes bench.md and its plots (PNG) beside them. What was not
measured is left out. In the plots the lines of Open MPI are solid and those of MPICH dashed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator
from timing import name_of

from mpitrain.report import text
from mpitrain.report.style import COLOURS, Dash, tidy

RESULTS = Path(__file__).resolve().parent / "results"
PAGE = "bench.md"
DPI = 130

ORDER = ("kernels", "collectives", "windows", "steps", "stragglers", "startup", "between", "compare")
TITLES = {
    "kernels": "Kernels",
    "collectives": "Exchange, all-reduce, tree and gossip",
    "windows": "One-sided MPI",
    "steps": "Training steps",
    "stragglers": "One slow rank",
    "startup": "Start",
    "between": "Between hosts",
    "compare": "Methods",
}
MPIS = ("openmpi", "mpich")
MPI_NAMES = {"openmpi": "Open MPI", "mpich": "MPICH"}
DASHES: dict[str, Dash] = {"openmpi": "-", "mpich": "--"}
MARKERS = {"openmpi": "o", "mpich": "s"}
BAR_RANKS = 2  # of the plots against the size of a vector
ON_GPU = "gpu-"
"""What the names of results on a GPU begin with: those of another machine, which have a page of their own."""

SUMS = ("all-reduce", "MPI_Allreduce", "gloo")
EXCHANGES = ("exchange", "Get/Put, Allocate", "Get/Put, Create", "Get/Put, server")
FORMS = ("tree reduce + broadcast", "MPI_Reduce + Bcast", "gossip", "MPI_Sendrecv + NumPy")

GREY, PALE = "#555555", "#BBBBBB"
LIMIT_COLOURS = {"local pass": "#000000", "local copy": "#000000", "local sum": "#888888"}


@dataclass(frozen=True)
class Result:
    """One benchmark, as record.py has kept it.

    Attributes:
        name: Of its files, such as ``collectives-mpich-4``.
        document: The JSON document.
        markdown: The text beside it, "" if there is none.
    """

    name: str
    document: dict[str, Any]
    markdown: str

    @property
    def benchmark(self) -> str:
        """Which script it is of."""
        return self.name.partition("-")[0]

    @property
    def mpi(self) -> str | None:
        """``openmpi``, ``mpich``, or None where it does not matter."""
        named = [mpi for mpi in MPIS if mpi in self.name.split("-")]
        if named:
            return named[0]
        library = self.document.get("world", {}).get("mpi", "").lower().replace(" ", "")
        return next((mpi for mpi in MPIS if library.startswith(mpi)), None)

    @property
    def ranks(self) -> int | None:
        """Of the run."""
        n_ranks: int | None = self.document.get("world", {}).get("ranks")
        return n_ranks


def load(folder: Path, *, on_gpu: bool = False) -> list[Result]:
    """What is kept in a folder: benchmark by benchmark, Open MPI before MPICH, few ranks before many.

    Args:
        folder: With results of any kind.
        on_gpu: Whether those on a GPU are wanted, or the others.
    """
    results = []
    for path in folder.glob("*.json"):
        if path.name.startswith(ON_GPU) != on_gpu:
            continue
        beside = path.with_suffix(".md")
        markdown = beside.read_text() if beside.exists() else ""
        results.append(Result(path.stem, json.loads(path.read_text()), markdown))

    def place(result: Result) -> tuple[int, int, int, str]:
        order = ORDER.index(result.benchmark) if result.benchmark in ORDER else len(ORDER)
        return order, result.ranks or 0, MPIS.index(result.mpi) if result.mpi else -1, result.name

    return sorted(results, key=place)


def figure_of(bar: dict[str, Any]) -> str:
    """What was measured for a bar, for people: in the benchmark's own words, in seconds, or a ratio."""
    if "text" in bar:
        return str(bar["text"])
    if "seconds" in bar:
        return f"{bar['seconds']:.2f} s"
    return f"{bar['ratio']:.3f}" if bar.get("ratio") is not None else "-"


def table_of_bars(results: Sequence[Result]) -> list[str]:
    """A line for each bar of each benchmark."""
    bars = [(result, bar) for result in results for bar in result.document.get("bars", [])]
    if not bars:
        return []
    return text.table(
        {
            "benchmark": [result.name for result, _ in bars],
            "MPI": [MPI_NAMES[result.mpi] if result.mpi else "-" for result, _ in bars],
            "bar": [bar["bar"] for _, bar in bars],
            "figure": [figure_of(bar) for _, bar in bars],
            "verdict": ["PASS" if bar["passed"] else "**MISSED**" for _, bar in bars],
        },
        left=("benchmark", "MPI", "bar", "verdict"),
    )


def circumstances(results: Sequence[Result]) -> list[str]:
    """Hardware, versions and days, each once."""

    def distinct(words: Sequence[str | None]) -> list[str]:
        return list(dict.fromkeys(word for word in words if word))

    def hardware(document: dict[str, Any]) -> str | None:
        machine = document.get("machine") or document.get("hardware")
        return f"{machine['cores']} cores, {machine.get('processor') or machine.get('cpu')}" if machine else None

    days = distinct(
        [found[1] if (found := re.search(r"^(\d{4}-\d\d-\d\d): ", r.markdown, re.M)) else None for r in results]
    )
    packages: dict[str, list[str]] = {}
    for result in results:
        for package, version in result.document.get("versions", {}).items():
            if version not in packages.setdefault(package, []):
                packages[package].append(version)
    lines = {
        "measured": sorted(days),
        "machine": distinct([hardware(result.document) for result in results]),
        "MPI": distinct([result.document.get("world", {}).get("mpi") for result in results]),
        "versions": [f"{package} {' and '.join(versions)}" for package, versions in packages.items()],
    }
    return [f"- {name}: {', '.join(words)}" for name, words in lines.items() if words]


def body(markdown: str) -> str:
    """The text of a result, its heading one level deeper."""
    return re.sub(r"^# ", "### ", markdown.strip(), count=1)


def markdown_of(results: Sequence[Result], plots: dict[str, list[str]]) -> str:
    """The whole page.

    Args:
        results: In the order of the page.
        plots: File names of the plots of each benchmark.
    """
    n_missed = sum(not bar["passed"] for result in results for bar in result.document.get("bars", []))
    n_bars = sum(len(result.document.get("bars", [])) for result in results)
    lines = ["# Benchmarks", "", *circumstances(results), ""]
    lines += ["## The project's bars", "", f"{n_bars - n_missed} of {n_bars} passed.", "", *table_of_bars(results)]
    for benchmark in dict.fromkeys(result.benchmark for result in results):
        lines += ["", f"## {TITLES.get(benchmark, benchmark)}"]
        for name in plots.get(benchmark, []):
            caption = PLOTS[name].caption
            lines += ["", f"![{caption}]({name})", "", caption]
        for result in results:
            if result.benchmark == benchmark and result.markdown:
                lines += ["", body(result.markdown)]
    return "\n".join(lines) + "\n"


def sized(result: Result, rows: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Sizes in bytes, rising, and median seconds of one operation."""
    points = sorted((row["bytes"], row["median_seconds"]) for row in rows if row["operation"] == name)
    return [n_bytes for n_bytes, _ in points], [seconds for _, seconds in points]


def bytes_axis(axes: Axes, sizes: Sequence[int]) -> None:
    """Powers of four with their names, as many as there is room for."""
    smallest, largest = int(np.log2(min(sizes))), int(np.log2(max(sizes)))
    step = max(2, -(-(largest - smallest) // 6))
    ticks = [2**k for k in range(smallest, largest + 1, step)]
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: short(n)))
    axes.set_xlabel("bytes of the vector")


def short(n_bytes: float) -> str:
    """Bytes as ``4K``."""
    for unit, factor in (("G", 2**30), ("M", 2**20), ("K", 2**10)):
        if n_bytes >= factor:
            return f"{n_bytes / factor:g}{unit}"
    return f"{n_bytes:g}"


def plain_log_y(axes: Axes, label: str) -> None:
    """A logarithmic axis with numbers and no powers."""
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
    """Time above and bandwidth below, a column for each set of operations.

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
                look = {
                    "color": colour,
                    "linestyle": DASHES[mpi],
                    "marker": MARKERS[mpi],
                    "markersize": 3,
                    "linewidth": 1.5,
                }
                above.plot(x, 1e6 * np.array(seconds), **look)
                below.plot(x, np.array(x) / np.array(seconds) / 1e9, **look)
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
    """Which MPI is which, if there are two."""
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
    """Those of as many ranks as the bars are for."""
    return [result for result in results if result.ranks == BAR_RANKS]


def having(results: Sequence[Result], names: Sequence[str]) -> list[Result]:
    """Those that have measured any of these operations."""
    return [result for result in results if any(row["operation"] in names for row in result.document["results"])]


def draw_collectives(results: Sequence[Result]) -> Figure | None:
    """All-reduces, exchanges, the tree and the gossip, each with what it replaces, against the size of the vector."""
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
    """The sizes, rising, at which each of the results has some of these operations."""
    of_each = [{row["bytes"] for row in result.document["results"] if row["operation"] in names} for result in results]
    return sorted(set.intersection(*of_each)) if of_each else []


def draw_ranks(results: Sequence[Result], names: Sequence[str] = (*SUMS, *EXCHANGES)) -> Figure | None:
    """Some operations on more ranks, at each size that was measured with all numbers of them."""
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
                    look = {"color": colour, "linestyle": DASHES[mpi], "marker": MARKERS[mpi], "markersize": 4}
                    axes.plot(*zip(*points, strict=True), **look)
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
    """Put, get and accumulate on both kinds of windows, and the exchanges made of them, against the size."""
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
    """GB/s of each kernel, NumPy and torch, and the limit."""
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
    """Horizontal bars, one of each MPI for each label, with words at their ends.

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
    """Milliseconds of a step, and how many times those of the step alone."""
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
    """What the others keep of their throughput beside a slow rank."""
    if not results:
        return None
    methods = list(dict.fromkeys(row["method"] for result in results for row in result.document["results"]))
    series: dict[str, list[float | None]] = {}
    tell: dict[str, list[str]] = {}
    for result in results:
        kept = {row["method"]: row["kept"] for row in result.document["results"]}
        series[result.mpi or MPIS[0]] = [100 * kept[name] if name in kept else None for name in methods]
        tell[result.mpi or MPIS[0]] = [f"{kept[name]:.0%}" if name in kept else "" for name in methods]
    figure = Figure(figsize=(7.2, 1.2 + 0.5 * len(methods) * len(series)), layout="constrained")
    axes = figure.subplots()
    bars_of(axes, methods, series, [COLOURS[k % len(COLOURS)] for k in range(len(methods))], tell)
    axes.axvline(100, color=GREY, linewidth=1, linestyle=":")
    factor = results[0].document["factor"]
    axes.set_xlabel(f"% of their throughput that the others keep beside a rank {factor:g} times slower")
    legend_of_mpis(figure, results, bars=True)
    return figure


def draw_compare(results: Sequence[Result]) -> Figure | None:
    """Seconds until the target accuracy, gradients in a second and bytes of a gradient, method by method."""
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


@dataclass(frozen=True)
class Plot:
    """A picture of one benchmark's results; ``draw`` returns None where there is nothing to draw."""

    benchmark: str
    draw: Callable[[Sequence[Result]], Figure | None]
    caption: str


PLOTS = {
    "bench-kernels.png": Plot("kernels", draw_kernels, "Bandwidth of the kernels, of NumPy and of torch, on one core."),
    "bench-collectives.png": Plot(
        "collectives", draw_collectives, "Two ranks: time above, bandwidth below, against the size of the vector."
    ),
    "bench-ranks.png": Plot("collectives", draw_ranks, "Time against the number of ranks."),
    "bench-ranks-forms.png": Plot(
        "collectives", partial(draw_ranks, names=FORMS), "The tree and the gossip: time against the number of ranks."
    ),
    "bench-windows.png": Plot(
        "windows", draw_windows, "One-sided operations: time above, bandwidth below, against the size of the vector."
    ),
    "bench-steps.png": Plot("steps", draw_steps, "Milliseconds of a training step on two ranks."),
    "bench-stragglers.png": Plot("stragglers", draw_stragglers, "Throughput that the other ranks keep."),
    "bench-compare.png": Plot("compare", draw_compare, "The methods on the same data, model and budget."),
}


def write(folder: Path) -> Path:
    """Make the page and its plots; returns its path."""
    results = load(folder)
    drawn: dict[str, list[str]] = {}
    for name, plot in PLOTS.items():
        (folder / name).unlink(missing_ok=True)  # nothing old beside a new page
        figure = plot.draw([result for result in results if result.benchmark == plot.benchmark])
        if figure is not None:
            figure.savefig(folder / name, dpi=DPI)
            drawn.setdefault(plot.benchmark, []).append(name)
    page = folder / PAGE
    page.write_text(markdown_of(results, drawn))
    return page


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder (default: benchmarks/results)")
    options = parser.parse_args()
    if not load(options.results):
        print(f"{options.results} holds no results: run make bench first", file=sys.stderr)
        return 2
    print(f"wrote {write(options.results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
