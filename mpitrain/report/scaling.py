"""Scaling of one training set-up over numbers of ranks: a table and a plot, from the results of finished runs.

    speed-up    s(p) = r(p) / r(p_0)        r: samples a second of all ranks, p_0: the smallest number of ranks
    efficiency  e(p) = s(p)*p_0 / p

Runs with equal numbers of ranks and nodes are repetitions. Their median is used. With the same batch size per rank in
all runs, which is the default, this is weak scaling.

Source: Gustafson, Reevaluating Amdahl's law, 1988, https://doi.org/10.1145/42411.42415
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpitrain.errors import UsageError
from mpitrain.report import text
from mpitrain.report.runs import Run

PLOT, PAGE = "scaling.png", "scaling.md"


def scaling(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return a sorted list with a row for each combination of method, ranks and nodes, without unfinished runs.

    Raises:
        UsageError: No run has finished.
    """
    rates: dict[tuple[str, int, int], list[float]] = {}
    for run in runs:
        if run.result:
            key = run.result["algorithm"], run.result["ranks"], run.result["world"]["nodes"]
            rates.setdefault(key, []).append(float(run.result["samples_per_second"]))
    if not rates:
        raise UsageError("none of these runs has finished: a scaling table needs their results")
    rows = []
    for (algorithm, ranks, nodes), repetitions in sorted(rates.items()):
        alike = [key for key in rates if key[0] == algorithm]
        first = min(alike, key=lambda key: key[1:])
        rate, rate_first = float(np.median(repetitions)), float(np.median(rates[first]))
        speed_up = rate / rate_first
        rows.append(
            {
                "algorithm": algorithm,
                "nodes": nodes,
                "ranks": ranks,
                "runs": len(repetitions),
                "samples_per_second": rate,
                "speed_up": speed_up,
                "efficiency": speed_up * first[1] / ranks,
            }
        )
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of the table."""
    return text.table(
        {
            "algorithm": [row["algorithm"] for row in rows],
            "nodes": [str(row["nodes"]) for row in rows],
            "ranks": [str(row["ranks"]) for row in rows],
            "runs": [str(row["runs"]) for row in rows],
            "samples/s": [f"{row['samples_per_second']:,.0f}" for row in rows],
            "speed-up": [f"{row['speed_up']:.2f}" for row in rows],
            "efficiency": [f"{row['efficiency']:.0%}" for row in rows],
        },
        left=("algorithm",),
    )


def write_scaling(runs: Sequence[Run], out: Path) -> dict[str, Any]:
    """Draw the plot and write the page.

    Returns:
        A dictionary with the rows (`scaling`), the labels of unfinished runs, and the paths of the `files`.

    Raises:
        UsageError: No run has finished, or the folder cannot be created.
    """
    from mpitrain.report.plots import draw_scaling  # imports matplotlib

    rows = scaling(runs)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{out} cannot be created ({error.strerror}): choose a writable folder as --out") from error
    draw_scaling(rows, out / PLOT)
    page = ["# Scaling", "", *table(rows), "", f"![Samples a second against ranks]({PLOT})"]
    (out / PAGE).write_text("\n".join(page) + "\n")
    return {
        "scaling": rows,
        "unfinished": [run.label for run in runs if not run.result],
        "files": [str(out / name) for name in (PLOT, PAGE)],
    }
