"""Write one page of all GPU results: the project's bars in one table, every benchmark's own table, and plots.

    python -m benchmarks.pages.gpu_page [--results docs/benchmarks]

Reads what record.py has kept of the benchmarks whose names begin with ``gpu-``, and writes gpu.md and its plots (PNG)
beside them; page.py has those of hosts. What was not measured is left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter

from benchmarks.gpu import machine as gpu_machine
from benchmarks.micro.timing import name_of
from benchmarks.pages.bench import DPI, body, circumstances, table_of_bars
from benchmarks.pages.plots import GREY, bars_of, bytes_axis, plain_log_y
from benchmarks.pages.record import RESULTS
from benchmarks.pages.results import Result, load
from mpitrain.report.style import COLOURS, Dash, tidy

PAGE = "gpu.md"
TITLES = {"kernels": "Kernels", "exchange": "Exchange and all-reduce", "training": "Training steps"}
CANDIDATES = ("mpitrain", "torch in place", "torch", "torch.optim", "cupy", "cupy.fuse")
COLUMNS = 4  # of the plot of the kernels
MODES: dict[str, Dash] = {"one rank": "-", "all ranks": "--"}


def part_of(result: Result) -> str:
    """Return the GPU benchmark of a result: ``exchange`` for ``gpu-exchange-2``."""
    return (*result.name.split("-"), "")[1]


def gpus(results: Sequence[Result]) -> list[str]:
    """Return the GPUs, each once, as a line of the page."""
    lines = dict.fromkeys(gpu_machine.line(r.document["gpu"]) for r in results if "gpu" in r.document)
    return [f"- GPU: {'; '.join(lines)}"] if lines else []


def draw_kernels(results: Sequence[Result]) -> Figure | None:
    """Draw the GB/s of each kernel, its peers and the copy against the vector's size."""
    rows = [row for result in results for row in result.document["results"]]
    names = list(dict.fromkeys(row["kernel"] for row in rows))
    if not names:
        return None
    n_rows = -(-len(names) // COLUMNS)
    figure = Figure(figsize=(13, 0.6 + 2.9 * n_rows), layout="constrained")
    grid = figure.subplots(n_rows, min(COLUMNS, len(names)), squeeze=False, sharey=True).ravel()
    colours = dict(zip(CANDIDATES, COLOURS, strict=False))
    for axes, name in zip(grid, names, strict=False):
        of_one = sorted((row for row in rows if row["kernel"] == name), key=lambda row: row["bytes"])
        sizes = [row["bytes"] for row in of_one]
        axes.plot(sizes, [row["limit_gb_per_s"] for row in of_one], color="black", linewidth=1.6)
        for candidate, colour in colours.items():
            points = [(row["bytes"], row["gb_per_s"][candidate]) for row in of_one if candidate in row["gb_per_s"]]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, linewidth=1.5)
        axes.set_title(name, fontsize=9, loc="left")
        tidy(axes)
        bytes_axis(axes, sizes)
    grid[0].set_ylim(0, 1.05 * max(max(row["limit_gb_per_s"], *row["gb_per_s"].values()) for row in rows))
    for axes in grid[len(names) :]:
        axes.set_visible(False)
    grid[0].set_ylabel("GB/s of one pass")
    handles = [Line2D([], [], color=colour, linewidth=2, label=name) for name, colour in colours.items()]
    handles.insert(0, Line2D([], [], color="black", linewidth=1.6, label="copy on the device"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    return figure


def draw_exchange(results: Sequence[Result]) -> Figure | None:
    """Draw the time of exchange and all-reduce: against the size for the fewest ranks, and against the ranks."""
    shown = sorted((result for result in results if result.ranks), key=lambda result: result.ranks or 0)
    common = set.intersection(*({row["bytes"] for row in result.document["results"]} for result in shown or results))
    if not shown or not common:
        return None
    at_bytes = max(common)
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    by_size, by_ranks = figure.subplots(1, 2)
    first = shown[0].document["results"]
    names = list(dict.fromkeys(row["operation"] for row in first))
    colours = {name: COLOURS[k % len(COLOURS)] for k, name in enumerate(names)}
    for name in names:
        for mode in MODES:
            points = [(r["bytes"], r["median_seconds"]) for r in first if (r["operation"], r["mode"]) == (name, mode)]
            _line(by_size, points, colours[name], mode)
            counts = [
                (result.ranks or 0, row["median_seconds"])
                for result in shown
                for row in result.document["results"]
                if (row["bytes"], row["operation"], row["mode"]) == (at_bytes, name, mode)
            ]
            _line(by_ranks, counts, colours[name], mode)
    by_size.set_title(f"{shown[0].ranks} ranks", fontsize=10, loc="left")
    bytes_axis(by_size, [row["bytes"] for row in first])
    by_ranks.set_title(f"vectors of {name_of(at_bytes)}", fontsize=10, loc="left")
    by_ranks.set_xscale("log", base=2)
    by_ranks.xaxis.set_major_locator(FixedLocator([result.ranks or 0 for result in shown]))
    by_ranks.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:g}"))
    by_ranks.set_xlabel("ranks on the GPU")
    for axes in (by_size, by_ranks):
        tidy(axes)
        plain_log_y(axes, "milliseconds")
    handles = [Line2D([], [], color=colour, linewidth=2, label=name) for name, colour in colours.items()]
    handles += [Line2D([], [], color=GREY, linestyle=dash, label=mode) for mode, dash in MODES.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return figure


def _line(axes: Axes, points: Sequence[tuple[int, float]], colour: str, mode: str) -> None:
    """Draw the milliseconds of one operation."""
    if points:
        x, seconds = zip(*sorted(points), strict=True)
        style: dict[str, Any] = {"color": colour, "linestyle": MODES[mode], "marker": "o", "markersize": 3}
        axes.plot(x, 1e3 * np.array(seconds), linewidth=1.5, **style)


def draw_training(results: Sequence[Result]) -> Figure | None:
    """Draw the milliseconds of a step, and their ratio to the step alone."""
    rows = [row for result in results for row in result.document["results"]]
    models = list(dict.fromkeys(row["model"] for row in rows))
    if not models:
        return None
    of = {model: [row for row in rows if row["model"] == model] for model in models}
    n_rows = sum(len(of_one) for of_one in of.values())
    figure = Figure(figsize=(8.5, 1.2 * len(models) + 0.34 * n_rows), layout="constrained")
    grid = figure.subplots(len(models), 1, squeeze=False, height_ratios=[len(of_one) for of_one in of.values()])[:, 0]
    for axes, (model, of_one) in zip(grid, of.items(), strict=True):
        names = [row["step"] for row in of_one]
        colours = [GREY if name.startswith("alone") else COLOURS[0] for name in names]
        series = {"openmpi": [1e3 * row["median_seconds"] for row in of_one]}
        bars_of(axes, names, series, colours, {"openmpi": [f"{row['of_alone']:.3f} x" for row in of_one]})
        axes.set_title(model, fontsize=10, loc="left")
        axes.set_xlabel("milliseconds of a step; at the bars: times the step alone")
    return figure


# By part: the file, what draws it, and what it shows.
PLOTS: dict[str, tuple[str, Callable[[Sequence[Result]], Figure | None], str]] = {
    "kernels": ("gpu-kernels.png", draw_kernels, "Bandwidth of the kernels and of their peers on the GPU."),
    "exchange": (
        "gpu-exchange.png",
        draw_exchange,
        "Time against the size of the vector, and against the number of ranks.",
    ),
    "training": ("gpu-training.png", draw_training, "Milliseconds of a training step on a GPU that the ranks share."),
}


def write(folder: Path) -> Path:
    """Write the page and its plots; return the page's path."""
    results = load(folder, on_gpu=True)
    bars = [bar for result in results for bar in result.document.get("bars", [])]
    lines = ["# Benchmarks on a GPU", "", *gpus(results), *circumstances(results), "", "## The project's bars", ""]
    lines += [f"{sum(bar['passed'] for bar in bars)} of {len(bars)} passed.", "", *table_of_bars(results)]
    for part, (name, draw, caption) in PLOTS.items():
        of_part = [result for result in results if part_of(result) == part]
        (folder / name).unlink(missing_ok=True)  # nothing old beside a new page
        if not of_part:
            continue
        lines += ["", f"## {TITLES[part]}"]
        figure = draw(of_part)
        if figure is not None:
            figure.savefig(folder / name, dpi=DPI)
            lines += ["", f"![{caption}]({name})", "", caption]
        for result in of_part:
            lines += ["", body(result.markdown)] if result.markdown else []
    page = folder / PAGE
    page.write_text("\n".join(lines) + "\n")
    return page


def main() -> int:
    """Run the benchmark and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder (default: docs/benchmarks)")
    options = parser.parse_args()
    if not load(options.results, on_gpu=True):
        print(f"{options.results} holds no results of a GPU: run make bench-gpu first", file=sys.stderr)
        return 2
    print(f"wrote {write(options.results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
