"""The report as one HTML page: the table, and the plots with zoom and values under the pointer.

The page needs no other file and no network: the library plotly is part of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from mpitrain.errors import UsageError
from mpitrain.records.durable import replace_text
from mpitrain.report.markdown import remarks, table_columns
from mpitrain.report.plots import last_histogram
from mpitrain.report.runs import Run
from mpitrain.report.style import COLOURS, Series, series_of, title_of

try:
    import plotly.graph_objects as go
    from plotly.offline import get_plotlyjs
    from plotly.subplots import make_subplots
except ImportError:  # an optional requirement
    go = None

MOST_POINTS = 2000
SPANS = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot"}
LOGARITHMIC = {"type": "log", "dtick": "D2"}
"""Ticks at 1, 2 and 5."""
X_AXES = (("gradients", "gradients, all ranks"), ("seconds", "time (s)"), ("bytes", "bytes sent, all ranks"))
Y_AXES = (
    ("progress", "loss", "training loss"),
    ("evaluation", "test_loss", "test loss"),
    ("evaluation", "test_accuracy", "test accuracy"),
)
CAPTIONS = {
    "Loss and accuracy": (
        "The training loss is that of mini-batches. Test loss and accuracy are those of the evaluated parameters: the "
        "center or the mean of the workers. The menu changes the horizontal axis."
    ),
    "Time": (
        "Shares of the ranks' time: computing gradients and updates; exchanging, which is copying, sending and adding "
        "vectors; waiting for other ranks or locks. The rest is loading data and the like."
    ),
    "Staleness": (
        "The number of updates by other workers between the moment a worker read the shared parameters and the moment "
        "its own update reached them."
    ),
    "Distance of the workers": (
        "The distance of the workers' parameters from those that are evaluated: Euclidean norm, root mean square over "
        "the workers."
    ),
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 0 auto; max-width: 1100px; padding: 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th.text, td.text { text-align: left; }
figure { margin: 0; } figcaption { color: #555; font-size: 13px; max-width: 70ch; }
select { font: inherit; }
"""


def write_page(runs: Sequence[Run], document: Mapping[str, Any], path: Path) -> None:
    """Write the page.

    Args:
        runs: The runs.
        document: The summaries, as ``write_report`` returns them.
        path: The file.

    Raises:
        UsageError: plotly is not installed, or the file cannot be written.
    """
    if go is None:
        raise UsageError("an HTML report needs plotly: pip install 'mpitrain[html]'")
    series = series_of(runs)
    figures = {
        "Loss and accuracy": _curves(series),
        "Time": _shares(series),
        "Staleness": _staleness(series),
        "Distance of the workers": _consensus(series),
    }
    sections = [
        f"<h2>{escape(name)}</h2><figure>{_html(figure)}<figcaption>{escape(CAPTIONS[name])}</figcaption></figure>"
        for name, figure in figures.items()
        if figure is not None
    ]
    title = escape(title_of(runs) or "Report")
    notes = "".join(f"<p>{escape(line.strip())}</p>" for line in remarks(document))
    replace_text(
        path,
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style><script>{get_plotlyjs()}</script></head>\n<body><h1>{title}</h1>"
        f"{_table(document['runs'])}{notes}{''.join(sections)}</body></html>\n",
    )


def _table(summaries: Sequence[Mapping[str, Any]]) -> str:
    columns, left = table_columns(summaries)
    kinds = {name: ' class="text"' if name in left else "" for name in columns}
    head = "".join(f"<th{kinds[name]}>{escape(name)}</th>" for name in columns)
    rows = (
        "".join(f"<td{kinds[name]}>{escape(cells[k])}</td>" for name, cells in columns.items())
        for k in range(len(summaries))
    )
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _html(figure: Any) -> str:
    figure.update_layout(
        template="simple_white", margin={"l": 60, "r": 20, "t": 40, "b": 50}, font={"size": 12}, hovermode="closest"
    )
    config = {
        "responsive": True,
        "scrollZoom": True,
        "displaylogo": False,
        "modeBarButtonsToRemove": ["lasso2d", "select2d"],
    }
    text: str = figure.to_html(full_html=False, include_plotlyjs=False, config=config)
    return text


def _curves(series: Sequence[Series]) -> Any:
    """Return the curves against gradients, with buttons for time and bytes; None without data."""
    rows = [
        row
        for row in Y_AXES
        if any(len(run.curve(row[0], "gradients", row[1])[0]) for one in series for run in one.runs)
    ]
    if not rows:
        return None
    figure = make_subplots(rows=len(rows), cols=1, shared_xaxes=True, vertical_spacing=0.06)
    by_axis: dict[str, list[Any]] = {x: [] for x, _ in X_AXES}
    for k, (table, y, label) in enumerate(rows, start=1):
        for one in series:
            for run in one.runs:
                for x, _ in X_AXES:
                    by_axis[x].append(_thinned(run.column(table, x), run.column(table, y)))
                a, b = by_axis["gradients"][-1]
                figure.add_trace(_line(one, run, a, b, first=k == 1 and run is one.runs[0]), row=k, col=1)
        figure.update_yaxes(title_text=label, row=k, col=1, **(LOGARITHMIC if "loss" in y else {}))
        if y == "test_accuracy":
            figure.update_yaxes(tickformat=".0%", row=k, col=1)
    bottom = f"xaxis{len(rows) if len(rows) > 1 else ''}"
    buttons = [
        {
            "label": name,
            "method": "update",
            "args": [
                {"x": [a for a, _ in by_axis[x]], "y": [b for _, b in by_axis[x]]},
                {f"{bottom}.title.text": name},
            ],
        }
        for x, name in X_AXES
    ]
    menu = {"buttons": buttons, "direction": "down", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"}
    figure.update_layout(
        height=260 * len(rows) + 60,
        showlegend=len(series) > 1,
        updatemenus=[menu],
        **{bottom: {"title": {"text": X_AXES[0][1]}}},
    )
    return figure


def _shares(series: Sequence[Series]) -> Any:
    """Return a stacked bar for each group; None without data."""
    names = {"compute": COLOURS[2], "exchange": COLOURS[0], "waiting": COLOURS[4]}
    bars = [(_plain(one.label), [run.shares() for run in one.runs if run.shares()]) for one in series]
    bars = [(label, shares) for label, shares in bars if shares]
    if not bars:
        return None
    figure = go.Figure()
    for name, colour in names.items():
        means = [float(np.mean([share.get(name, 0) for share in shares])) for _, shares in bars]
        figure.add_bar(x=means, y=[label for label, _ in bars], name=name, orientation="h", marker_color=colour)
    figure.update_layout(barmode="stack", height=140 + 40 * len(bars))
    figure.update_xaxes(tickformat=".0%", range=[0, 1], title_text="share of the time, mean over the ranks")
    return figure


def _staleness(series: Sequence[Series]) -> Any:
    """Return the histograms of the number of updates by others; None without data."""
    figure = go.Figure()
    for one in series:
        shares = last_histogram(one, "histogram")
        if shares is not None:
            last = int(np.flatnonzero(shares)[-1]) + 1
            figure.add_bar(y=shares[:last].tolist(), name=_plain(one.label), marker_color=one.colour)
    if not figure.data:
        return None
    figure.update_layout(height=320, barmode="group", showlegend=len(series) > 1)
    figure.update_xaxes(title_text="updates by others in between")
    figure.update_yaxes(title_text="share of exchanges", tickformat=".0%")
    return figure


def _consensus(series: Sequence[Series]) -> Any:
    """Return the distance of the workers against gradients; None without data."""
    figure = go.Figure()
    for one in series:
        for run in one.runs:
            a, b = run.curve("progress", "gradients", "consensus_distance")
            if (b > 0).any():
                figure.add_trace(_line(one, run, *_thinned(a, b), first=run is one.runs[0]))
    if not figure.data:
        return None
    figure.update_layout(height=320, showlegend=len(series) > 1)
    figure.update_xaxes(title_text="gradients, all ranks")
    figure.update_yaxes(title_text="distance of the workers", **LOGARITHMIC)
    return figure


def _line(one: Series, run: Run, x: list[float], y: list[float], *, first: bool) -> Any:
    label = _plain(one.label)
    return go.Scatter(
        x=x,
        y=y,
        mode="lines+markers" if len(x) <= 25 else "lines",
        name=label,
        legendgroup=label,
        showlegend=first,
        hovertemplate=f"{_plain(run.label)}<br>%{{x:.6~g}}, %{{y:.4~g}}<extra></extra>",
        line={"color": one.colour, "dash": SPANS[one.dash], "width": 1.6},
    )


def _thinned(x: Any, y: Any) -> tuple[list[float], list[float]]:
    """Return at most MOST_POINTS finite points."""
    if len(x) != len(y):
        return [], []
    finite = np.flatnonzero(np.isfinite(x) & np.isfinite(y)) if len(x) else np.empty(0, int)
    every = finite[:: -(-len(finite) // MOST_POINTS) or 1]
    return [float(value) for value in x[every]], [float(value) for value in y[every]]


def _plain(label: str) -> str:
    """Return a label as plotly shows it unchanged: it interprets some tags and templates."""
    return escape(label, quote=False).replace("%{", "%\u200b{")
