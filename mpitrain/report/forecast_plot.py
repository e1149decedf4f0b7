"""The plot of a forecast: the time of an epoch with each method, and how much of it is communication."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from mpitrain.report.style import COLOURS


def plot_forecast(
    path: Path, names: Sequence[str], epoch_seconds: Sequence[float], computing_shares: Sequence[float]
) -> None:
    """Draw a bar for each method, and write the plot to a PNG file.

    Args:
        path: The file.
        names: The methods, from top to bottom.
        epoch_seconds: The time of an epoch.
        computing_shares: The fraction of the time of an epoch in which gradients are computed.
    """
    figure = Figure(figsize=(7, 1 + 0.35 * len(names)), layout="constrained")
    axes = figure.subplots()
    computing = [seconds * share for seconds, share in zip(epoch_seconds, computing_shares, strict=True)]
    rest = [seconds - part for seconds, part in zip(epoch_seconds, computing, strict=True)]
    axes.barh(names, computing, color=COLOURS[0], label="gradients")
    axes.barh(names, rest, left=computing, color=COLOURS[1], label="communication and waiting")
    axes.invert_yaxis()
    axes.set_xlabel("time of an epoch (s)")
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
