"""Write one page of all results: the project's bars in one table, every benchmark's own table, and plots.

    python -m benchmarks.pages.bench [--results docs/benchmarks]

Reads what record.py has kept, NAME.md and NAME.json, and writes bench.md and its plots (PNG) beside them. What was not
measured is left out.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.pages import plots
from benchmarks.pages.record import RESULTS
from benchmarks.pages.results import MPI_NAMES, Result, load
from mpitrain.report import text

PAGE = "bench.md"
DPI = 130

TITLES = {
    "kernels": "Kernels",
    "collectives": "Exchange, all-reduce, tree and gossip",
    "windows": "One-sided MPI",
    "steps": "Training steps",
    "stragglers": "One slow rank",
    "startup": "Start",
    "nodes": "More and more nodes",
    "between": "Between hosts",
    "sums": "All-reduce between hosts",
    "prediction": "Predictions of the simulator",
    "compare": "Methods",
}


def figure_of(bar: dict[str, Any]) -> str:
    """Format the figure behind a bar: in the benchmark's own words, in seconds, or as a ratio."""
    if "text" in bar:
        return str(bar["text"])
    if "seconds" in bar:
        return f"{bar['seconds']:.2f} s"
    return f"{bar['ratio']:.3f}" if bar.get("ratio") is not None else "-"


def table_of_bars(results: Sequence[Result]) -> list[str]:
    """Format one line per bar of each benchmark."""
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
    """Return the hardware, versions and dates of the results, without duplicates."""

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
    """Return the text of a result, with its heading one level deeper."""
    return re.sub(r"^# ", "### ", markdown.strip(), count=1)


def markdown_of(results: Sequence[Result], drawn: dict[str, list[str]]) -> str:
    """Return the whole page.

    Args:
        results: In the order of the page.
        drawn: File names of the plots of each benchmark.
    """
    n_missed = sum(not bar["passed"] for result in results for bar in result.document.get("bars", []))
    n_bars = sum(len(result.document.get("bars", [])) for result in results)
    lines = ["# Benchmarks", "", *circumstances(results), ""]
    lines += ["## The project's bars", "", f"{n_bars - n_missed} of {n_bars} passed.", "", *table_of_bars(results)]
    for benchmark in dict.fromkeys(result.benchmark for result in results):
        lines += ["", f"## {TITLES.get(benchmark, benchmark)}"]
        for name in drawn.get(benchmark, []):
            caption = PLOTS[name].caption
            lines += ["", f"![{caption}]({name})", "", caption]
        for result in results:
            if result.benchmark == benchmark and result.markdown:
                lines += ["", body(result.markdown)]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Plot:
    """A plot of one benchmark's results; ``draw`` returns None if there is nothing to draw."""

    benchmark: str
    draw: Callable[[Sequence[Result]], Figure | None]
    caption: str


PLOTS = {
    "bench-kernels.png": Plot(
        "kernels", plots.draw_kernels, "Bandwidth of the kernels, of NumPy and of torch, on one core."
    ),
    "bench-collectives.png": Plot(
        "collectives", plots.draw_collectives, "Two ranks: time above, bandwidth below, against the size of the vector."
    ),
    "bench-ranks.png": Plot("collectives", plots.draw_ranks, "Time against the number of ranks."),
    "bench-ranks-forms.png": Plot(
        "collectives",
        partial(plots.draw_ranks, names=plots.FORMS),
        "The tree and the gossip: time against the number of ranks.",
    ),
    "bench-windows.png": Plot(
        "windows",
        plots.draw_windows,
        "One-sided operations: time above, bandwidth below, against the size of the vector.",
    ),
    "bench-steps.png": Plot("steps", plots.draw_steps, "Milliseconds of a training step on two ranks."),
    "bench-stragglers.png": Plot("stragglers", plots.draw_stragglers, "Throughput that the other ranks keep."),
    "bench-compare.png": Plot("compare", plots.draw_compare, "The methods on the same data, model and budget."),
}


def write(folder: Path) -> Path:
    """Write the page and its plots; return the page's path."""
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
    """Run the benchmark and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder (default: docs/benchmarks)")
    options = parser.parse_args()
    if not load(options.results):
        print(f"{options.results} holds no results: run make bench first", file=sys.stderr)
        return 2
    print(f"wrote {write(options.results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
