"""The shared parts of the reproductions: options, criteria, figures.

A script reproduces one published result. It says what would count as a success before it computes, prints one line for
each criterion, draws one figure, and ends with a JSON document on the last line of stdout. Its exit code is 1 when a
criterion is missed.

    def main(arguments: Sequence[str] | None = None) -> int:
        options = parser(__doc__).parse_args(arguments)  # --out and --json; add the script's own before parsing
        outcome = Outcome("staleness", options)
        outcome.say("  p   mean staleness")  # tables; silent under --json
        outcome.criterion("mean staleness is p - 1, within 1 %", error, error < 0.01)
        figure, ((axes,),) = panels()
        axes.plot(x, y, color=COLOURS[0], label="measured")
        outcome.save(figure)  # OUT/staleness.png
        return outcome.finish(p=p, mean_staleness=mean)

    if __name__ == "__main__":
        sys.exit(main())

A script imports this by ``from figure import ...``: it stands beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mpitrain import __version__
from mpitrain.report.style import COLOURS, DASHES, tidy

__all__ = ["COLOURS", "DASHES", "Outcome", "panels", "parser"]

DPI = 130


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with ``--out`` and ``--json``; the first line of ``description`` is its help."""
    made = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    made.add_argument("--out", type=Path, default=Path("runs/reproduce"), help="folder of the figure (%(default)s)")
    made.add_argument("--json", action="store_true", help="print the JSON document only")
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
    """The outcome of one script: lines for a reader, criteria, a figure, a JSON document."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self._out, self._silent = name, Path(options.out), bool(options.json)
        self._criteria: list[dict[str, Any]] = []
        self._figure: Path | None = None

    def say(self, line: str = "") -> None:
        """Print a line, unless only the document is wanted."""
        if not self._silent:
            print(line, flush=True)

    def criterion(self, words: str, value: Any, passed: bool) -> None:
        """Print ``criterion WORDS: VALUE PASS`` (or ``MISSED``) and remember it. Numbers are shown to 4 digits."""
        shown = f"{value:.4g}" if isinstance(value, float | np.floating) else str(value)
        self.say(f"criterion {words}: {shown} {'PASS' if passed else 'MISSED'}")
        self._criteria.append({"criterion": words, "value": value, "passed": bool(passed)})

    def save(self, figure: Figure) -> Path:
        """Write the figure to ``OUT/NAME.png``."""
        self._out.mkdir(parents=True, exist_ok=True)
        self._figure = self._out / f"{self.name}.png"
        figure.savefig(self._figure, dpi=DPI)
        self.say(f"wrote {self._figure}")
        return self._figure

    def conclude(self, **results: Any) -> int:
        """Print the JSON document (NumPy values are allowed) and return the exit code: 0 if all criteria passed."""
        assert self._criteria, "a reproduction says what would count as a success"
        passed = all(one["passed"] for one in self._criteria)
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
            "figure": None if self._figure is None else str(self._figure),
            **results,
            "versions": versions,
        }
        print(json.dumps(_plain(document), allow_nan=False), flush=True)
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
