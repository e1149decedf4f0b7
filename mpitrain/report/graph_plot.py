"""The picture of a graph of workers: one panel for each step of its period."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mpitrain.collectives.topology.graphs import Step, Topology
from mpitrain.report.style import COLOURS

MOST_PANELS = 6
MOST_LABELLED = 64
MAX_COLUMNS = 3


def plot_graph(path: Path, graph: Topology, gap: float) -> None:
    """Draw a graph with the workers on a circle, and write the plot to a PNG file.

    An arrow points from a worker to the receiver of its vector. An edge in both directions is a line without
    arrowheads. If the period is long, only its first steps are drawn.

    Args:
        path: The file.
        graph: The graph.
        gap: The spectral gap of the graph, for the title.
    """
    n_panels = min(graph.period, MOST_PANELS)
    columns = min(n_panels, MAX_COLUMNS)
    rows = -(-n_panels // columns)
    side = 5.0 if n_panels == 1 else 3.2
    figure = Figure(figsize=(max(side * columns, 5.0), side * rows + 0.7), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels:
        panel.set_axis_off()
        panel.set_aspect("equal")
    for k in range(n_panels):
        _draw(panels[k], graph.steps[k])
        if graph.period > 1:
            panels[k].set_title(f"step {k + 1} of {graph.period}", fontsize=9)
    figure.suptitle(f"{Path(graph.name).name}, {graph.size} workers: spectral gap {gap:.3g}", parse_math=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _draw(axes: Axes, step: Step) -> None:
    size = len(step)
    angles = np.pi / 2 - 2 * np.pi * np.arange(size) / size  # worker 0 on top, then clockwise
    places = np.column_stack([np.cos(angles), np.sin(angles)])
    marker = 16 if size <= MOST_LABELLED else 4
    for i, peers in enumerate(step):
        for j in peers:
            mutual = i in step[j]
            if mutual and j < i:
                continue
            arrow = {"arrowstyle": "-" if mutual else "-|>", "color": COLOURS[0], "lw": 0.8, "alpha": 0.7}
            arrow |= {"shrinkA": marker / 2, "shrinkB": marker / 2}
            axes.annotate("", places[j], places[i], arrowprops=arrow)
    axes.plot(*places.T, "o", color="white", markeredgecolor=COLOURS[0], markersize=marker, zorder=3)
    if size <= MOST_LABELLED:
        for rank, place in enumerate(places):
            axes.annotate(str(rank), place, ha="center", va="center", fontsize=7, zorder=4)
    axes.set_xlim(-1.2, 1.2)
    axes.set_ylim(-1.2, 1.2)
