"""The report of runs: plots as PNG files, and report.md with a table of results."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from mpitrain.algorithms import METHODS
from mpitrain.errors import UsageError, printable
from mpitrain.log import decoration
from mpitrain.records.durable import replace_text
from mpitrain.report import text
from mpitrain.report.runs import Run
from mpitrain.report.summary import summarise, temporal_efficiency

CAPTIONS = {
    "curves.png": (
        "Loss and accuracy. The training loss is that of mini-batches, as a running median over a twentieth of the "
        "run. Test loss and accuracy are those of the evaluated parameters: the center or the mean of the workers. "
        "Several seeds of one method are their median, in a band from the smallest to the largest value."
    ),
    "shares.png": (
        "Shares of the ranks' time: computing gradients and updates; exchanging, which is copying, sending and adding "
        "vectors; waiting for other ranks or locks; and the rest, such as loading data."
    ),
    "staleness.png": (
        "Staleness of the exchanges. Left: the number of updates by other workers between the moment a worker read the "
        "shared parameters and the moment its own update reached them. Right: the Euclidean distance by which those "
        'updates moved the parameters, in bins of a factor of 2: "median below 0.5" says that in half of the exchanges '
        "the parameters had moved by less than 0.5."
    ),
    "consensus.png": (
        "Distance of the workers from the evaluated parameters (Euclidean norm, root mean square over the workers), "
        "and the energy of the springs of elastic averaging."
    ),
    "method.png": "Values that the method records for each worker.",
}


def write_report(runs: Sequence[Run], out: Path) -> dict[str, Any]:
    """Draw all plots for which the runs have data, and write report.md to the same folder.

    Returns:
        A dictionary with the summaries of the runs (`runs`), the paths of the `files` and, for two runs, their
        `temporal_efficiency`.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{out} cannot be created ({error.strerror}): choose a writable folder as --out") from error
    drawn = draw(runs, out)
    document: dict[str, Any] = {"runs": [summarise(one) for one in runs]}
    if len(runs) == 2:
        document["temporal_efficiency"] = _efficiency(*runs)
    document["files"] = [str(out / name) for name in (*drawn, "report.md")]
    lines = ["# Report", "", *table(document["runs"]), "", *remarks(document)]
    for name in drawn:
        lines += ["", f"![{CAPTIONS[name]}]({name})", "", CAPTIONS[name]]
    replace_text(out / "report.md", "\n".join(lines) + "\n")
    return document


def draw(runs: Sequence[Run], out: Path) -> list[str]:
    """Draw all plots for which the runs have data into the folder ``out``; return the names of the files.

    If a plot cannot be drawn, a warning is logged.
    """
    drawn: list[str] = []
    with decoration("plots"), style_of_plots() as plots:
        for name, draw_one in plots.DRAWINGS.items():
            with decoration(name):
                if draw_one(runs, out / name):
                    drawn.append(name)
    return drawn


@contextlib.contextmanager
def style_of_plots() -> Iterator[ModuleType]:
    """Import the plots, and draw inside the block with matplotlib's defaults instead of the user's settings.

    ``MPLBACKEND`` is ignored too: a notebook sets it to a backend that is not needed for files and may not be
    installed.
    """
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        from mpitrain.report import plots  # imported here because matplotlib takes a second to import

        with plots.own_style():
            yield plots
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend


def _efficiency(a: Run, b: Run) -> float | None:
    try:
        curves = (one.curve("evaluation", "seconds", "test_accuracy") for one in (a, b))
        return temporal_efficiency(*curves)
    except ValueError:  # one of them has no evaluation
        return None


def remarks(document: Mapping[str, Any]) -> list[str]:
    """Return the remarks on the table, as lines."""
    lines = [
        f"{one['run']} has no result: it is running or was stopped; its numbers are from its metrics so far.  "
        for one in document["runs"]
        if not one["finished"]
    ]
    if document.get("temporal_efficiency") is not None:
        a, b = (one["run"] for one in document["runs"])
        efficiency = document["temporal_efficiency"]
        lines.append(
            f"Temporal efficiency of {a} over {b} (test accuracy): {efficiency:.3f}. It is the ratio of the areas "
            f"under the two accuracy curves up to the end of the shorter run: above 1, {a} was ahead on average.  "
        )
    return lines


def table(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of the table of results."""
    columns, left = table_columns(summaries)
    return text.table(columns, left=left)


def table_columns(summaries: Sequence[Mapping[str, Any]]) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    """Return the cells of each column of the table of results, and the names of the columns that contain text."""
    columns = {
        "run": [str(one["run"]) + ("" if one["finished"] else " (unfinished)") for one in summaries],
        "algorithm": [str(one["algorithm"] or "?") for one in summaries],
        "settings": [_settings(one["settings"], one["algorithm"]) for one in summaries],
        "data": [str(one["data"] or "-") for one in summaries],
        "model": [str(one["model"] or "-") for one in summaries],
        "ranks": [text.number(one["ranks"], "{:.0f}") for one in summaries],
        "accuracy": [text.number(one["test_accuracy"], "{:.2%}") for one in summaries],
        "best": [text.number(one["best_test_accuracy"], "{:.2%}") for one in summaries],
        "test loss": [text.number(one["test_loss"], "{:.4g}") for one in summaries],
        "time": [text.duration(one["seconds"]) for one in summaries],
        "gradients": [text.number(one["gradients"], "{:,.0f}") for one in summaries],
        "gradients/s": [text.number(one["gradients_per_second"], "{:,.3g}") for one in summaries],
        "sent/gradient": [text.size(one["bytes_per_gradient"]) for one in summaries],
        "waiting": [text.number(one["waiting_share"], "{:.1%}") for one in summaries],
        "exchanges": [text.number(one["exchanges"], "{:,.0f}") for one in summaries],
        "lock wait": [text.duration(one["lock_wait_seconds"]) for one in summaries],
    }
    left = ("run", "algorithm", "settings", "data", "model")
    return columns | {name: [printable(cell).replace("|", "/") for cell in columns[name]] for name in left}, left


def _settings(settings: Any, algorithm: Any) -> str:
    """Format the settings that differ from the method's defaults."""
    if not isinstance(settings, Mapping):
        return str(settings)
    defaults = METHODS[algorithm]().settings() if algorithm in METHODS else {}
    shown = [
        f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}"
        for k, v in settings.items()
        if v != defaults.get(k, _NOTHING)
    ]
    return ", ".join(shown) or "defaults"


_NOTHING = object()
