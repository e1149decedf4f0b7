"""The shared parts of the reproductions: options, criteria, figures.

A script reproduces one published result. It says what would count as a success before it computes, prints one line for
each criterion, draws one figure, and ends with a JSON document on the last line of stdout. Its exit code is 1 when a
criterion is missed. A result that contradicts the paper is a criterion with ``contradicts``, the likeliest reason. It
is expected to be missed; if it is met, the script fails, because its text is then wrong.

    def main(arguments: Sequence[str] | None = None) -> int:
        options = parser(__doc__).parse_args(arguments)  # --out and --json; add the script's own before parsing
        outcome = Outcome("staleness", options)
        outcome.say("  p   mean staleness")  # tables; silent under --json
        outcome.criterion("the mean is p - 1 within 1 %. Value: the deviation", error, error < 0.01)
        figure, ((axes,),) = panels()
        axes.plot(x, y, color=COLOURS[0], label="measured")
        outcome.save(figure)  # OUT/staleness.png
        return outcome.conclude(p=p, mean_staleness=mean)

    if __name__ == "__main__":
        sys.exit(main())

``python -m benchmarks.pages.reproductions`` makes the pages of docs/reproductions from these documents.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Collection
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mpitrain import __version__
from mpitrain.report.style import COLOURS, DASHES, tidy

__all__ = ["COLOURS", "DASHES", "Outcome", "panels", "parser", "quick_parser"]

DPI = 130


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with ``--out`` and ``--json``; the first line of ``description`` is its help."""
    made = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    made.add_argument("--out", type=Path, default=Path("runs/reproduce"), help="folder of the figure (%(default)s)")
    made.add_argument("--json", action="store_true", help="print the JSON document only")
    return made


def quick_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser that also has ``--quick``, for a run of seconds instead of minutes."""
    made = parser(description)
    made.add_argument("--quick", action="store_true", help="smaller sizes: seconds instead of minutes")
    return made


def panels(
    n_columns: int = 1, n_rows: int = 1, *, width_inches: float = 5.2, height_inches: float = 4.0, **subplots: Any
) -> tuple[Figure, NDArray[np.object_]]:
    """Create a figure and its axes, (n_rows, n_columns), in the toolkit's style; sizes are those of one panel.

    ``subplots`` goes to ``Figure.subplots``, for example ``sharey=True``. Nothing is kept in matplotlib's global state.
    """
    figure = Figure(figsize=(width_inches * n_columns, height_inches * n_rows), layout="constrained")
    grid: NDArray[np.object_] = figure.subplots(n_rows, n_columns, squeeze=False, **subplots)
    for axes in grid.flat:
        assert isinstance(axes, Axes)
        tidy(axes)
    return figure, grid


class Outcome:
    """The outcome of one script: lines for a reader, criteria, a figure, a JSON document.

    Args:
        name: The name of the script and its figure.
        options: The options of ``parser``.
        not_shown: The names of options that have no influence on the result.
    """

    def __init__(self, name: str, options: argparse.Namespace, *, not_shown: Collection[str] = ()) -> None:
        self.name, self._out, self._silent = name, Path(options.out), bool(options.json)
        self._lines: list[str] = []
        left_out = {"out", "json", *not_shown}
        self._options = {key: value for key, value in vars(options).items() if key not in left_out}
        self._criteria: list[dict[str, Any]] = []
        self._figure: Path | None = None

    def say(self, line: str = "") -> None:
        """Print a line, unless only the document is wanted."""
        self._lines.append(line)
        self._print(line)

    def _print(self, line: str) -> None:
        if not self._silent:
            print(line, flush=True)

    def criterion(self, words: str, value: Any, passed: bool, *, contradicts: str = "") -> None:
        """Print ``criterion WORDS: VALUE PASS`` (or ``MISSED``, ``CONTRADICTS THE PAPER``) and remember it.

        Args:
            words: The criterion, and which value it is judged by: ``"SGP is faster. Value: the ratio"``.
            value: The measured value. Numbers are shown to 4 digits.
            passed: Whether it meets the criterion.
            contradicts: For a claim that is known not to hold here, the likeliest reason.
        """
        shown = f"{value:.4g}" if isinstance(value, float | np.floating) else str(value)
        verdict = "PASS" if passed else "CONTRADICTS THE PAPER" if contradicts else "MISSED"
        self._print(f"criterion {words}: {shown} {verdict}")
        reason = {"contradicts": contradicts} if contradicts else {}
        self._criteria.append({"criterion": words, "value": value, "passed": bool(passed), **reason})

    def save(self, figure: Figure) -> Path:
        """Write the figure to ``OUT/NAME.png``."""
        self._out.mkdir(parents=True, exist_ok=True)
        self._figure = self._out / f"{self.name}.png"
        figure.savefig(self._figure, dpi=DPI)
        self.say(f"wrote {self._figure}")
        return self._figure

    def conclude(self, **results: Any) -> int:
        """Print the JSON document, write it beside the figure, and return the exit code: 0 if all is as expected.

        Args:
            results: The figures of the page; NumPy values are allowed.
        """
        assert self._criteria, "a reproduction says what would count as a success"
        passed = all(one["passed"] != ("contradicts" in one) for one in self._criteria)
        versions = {
            "mpitrain": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "matplotlib": matplotlib.__version__,
        }
        document = {
            "name": self.name,
            "passed": passed,
            "criteria": self._criteria,
            "figure": None if self._figure is None else self._figure.name,
            "options": self._options,
            "lines": self._lines,
            **results,
            "versions": versions,
        }
        text = json.dumps(_plain(document), allow_nan=False)
        if self._figure is not None:
            (self._out / f"{self.name}.json").write_text(text + "\n")
        print(text, flush=True)
        return 0 if passed else 1


def _plain(value: Any) -> Any:
    """Convert to JSON types: lists for arrays, null for NaN and infinity."""
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
