"""The style of the plots: colours, units, scales, ticks, legends."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from mpitrain.records.metrics import Column
from mpitrain.report.runs import Run

PathLike = str | os.PathLike[str]
Dash = Literal["-", "--", ":", "-."]

# Okabe and Ito, "Color Universal Design", 2008: distinct for any colour vision. Their yellow is too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[Dash, ...] = ("-", "--", ":", "-.")

DPI = 130
N_POINTS = 400  # points of a line
CLIMB_PERCENT = 12  # of the evaluations, the initial climb that an axis of accuracies may cut off


@dataclass(frozen=True)
class Series:
    """A line of a plot: the runs of a group, and the style in which they are drawn."""

    label: str
    runs: tuple[Run, ...]
    colour: str
    dash: Dash


@dataclass(frozen=True)
class Quantity:
    """The quantity on an axis: its column in the metrics, its label, and its units as (factor, name)."""

    column: str
    label: str
    units: tuple[tuple[float, str], ...] = ()


SECONDS = Quantity("seconds", "time", ((1, "s"), (60, "min"), (3600, "h")))
GRADIENTS = Quantity("gradients", "gradients, all ranks", ((1, ""), (1e3, "thousand"), (1e6, "million")))
BYTES = Quantity("bytes", "sent, all ranks", ((1, "bytes"), (1e3, "kB"), (1e6, "MB"), (1e9, "GB"), (1e12, "TB")))


def series_of(runs: Sequence[Run]) -> list[Series]:
    """Return the groups of `runs` in the order of their first runs."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    return [
        Series(
            group if len(members) > 1 else members[0].label,
            tuple(members),
            COLOURS[i % len(COLOURS)],
            DASHES[i // len(COLOURS) % len(DASHES)],
        )
        for i, (group, members) in enumerate(groups.items())
    ]


def scale_x(axes: Axes, x: Quantity, ends: Sequence[float]) -> None:
    """Label and scale an x axis.

    The unit is the largest one in which the end of the longest run is at least 3. An axis of bytes is logarithmic if
    the ends of the runs differ by a factor of 10 or more.

    Args:
        axes: The axes to change.
        x: The quantity of the axis.
        ends: The last value of each run, in the base unit.
    """
    largest = max(ends)
    factor, unit = max((u for u in x.units if largest >= 3 * u[0]), default=x.units[0])
    if x is GRADIENTS:
        axes.set_xlabel(f"{unit} {x.label}".strip())
    else:
        axes.set_xlabel(f"{x.label} ({unit})")
    if x is BYTES and largest >= 10 * min(ends):
        axes.set_xscale("log")
        _plain_log_ticks(axes.xaxis, min(ends) / 10, largest, factor)
    else:
        axes.set_xlim(0, largest * 1.02)
        axes.xaxis.set_major_locator(_Multiples(factor, (1, 2, 3, 6, 10) if x is SECONDS else (1, 2, 5, 10)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / factor:g}"))


class _Multiples(MaxNLocator):
    """Ticks at round multiples of a unit rather than of the values: 1 min and not 50 s."""

    def __init__(self, factor: float, steps: Sequence[float]) -> None:
        super().__init__(6, steps=steps)
        self._factor = factor

    def tick_values(self, vmin: float, vmax: float) -> Sequence[float]:
        """Return the ticks of an axis from vmin to vmax."""
        return [self._factor * tick for tick in super().tick_values(vmin / self._factor, vmax / self._factor)]


def scale_y(axes: Axes, y: str, values: Column, deciding: Column | None = None) -> None:
    """Scale a y axis.

    Accuracies are shown in percent, without an initial increase that would take most of the height. Other values are
    shown on a logarithmic axis if they vary by more than a factor of 5.

    Args:
        axes: The axes to change.
        y: The column of the metrics, for example ``test_accuracy``.
        values: The values that are drawn.
        deciding: The values that decide between a linear and a logarithmic axis, by default those that are drawn.
    """
    deciding = values if deciding is None else deciding
    if y == "test_accuracy":
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        bottom, top = axes.get_ylim()
        settled = float(np.percentile(values, CLIMB_PERCENT)) if len(values) else bottom
        if settled - bottom > top - settled:  # the climb would take more than half of the height
            bottom = settled - 0.1 * (top - settled)
        margin = max(0.0, 0.05 - (top - bottom)) / 2  # a single evaluation needs no tenths of a percent
        axes.set_ylim(bottom - margin, min(top + margin, 1.005))
    elif len(values) and min(values.min(), deciding.min()) > 0 and _varies(deciding):
        axes.set_yscale("log")
        _plain_log_ticks(axes.yaxis, values.min(), values.max(), 1)


def _varies(values: Column) -> bool:
    return bool(np.percentile(values, 99) > 5 * np.percentile(values, 1))


def _plain_log_ticks(axis: Axis, smallest: float, largest: float, factor: float) -> None:
    """Label ticks 0.2, 0.5, 1, 2 instead of powers, and only full decades if there are many."""
    n_decades = np.log10(largest / smallest)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if n_decades < 2.5 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / factor:g}"))
    axis.set_minor_formatter(NullFormatter())


def tidy(axes: Axes) -> None:
    """Remove the frame, and draw a faint grid."""
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def legend(figure: Figure, series: Sequence[Series], width_inches: float) -> None:
    """Draw a legend below the plots, with as many columns as fit."""
    labels = [one.label + (f" (median and range of {len(one.runs)})" if len(one.runs) > 1 else "") for one in series]
    lines = [Line2D([], [], color=one.colour, linestyle=one.dash, linewidth=2) for one in series]
    longest_inches = 0.085 * max(map(len, labels)) + 0.7
    n_columns = max(1, min(len(labels), int(width_inches / longest_inches)))
    figure.legend(lines, labels, loc="outside lower center", ncols=n_columns, frameon=False)


def add_title(figure: Figure, runs: Sequence[Run]) -> None:
    """Write a title that names the common properties of the runs: method, data, model, number of ranks."""
    title = title_of(runs)
    if title:
        figure.suptitle(title, fontsize=11, x=0.01, ha="left")


def title_of(runs: Sequence[Run]) -> str:
    """Return a title that names the common properties of the runs, such as "easgd on digits, mlp, 4 ranks"."""
    facts = [run.facts() for run in runs]
    common = {
        key: value for key, value in (facts[0] if facts else {}).items() if all(f.get(key) == value for f in facts)
    }
    begin = common.pop("algorithm", f"{len(runs)} runs")
    return f"{begin}{' on ' if 'data' in common else ', ' if common else ''}{', '.join(common.values())}"
