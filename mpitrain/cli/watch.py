"""``mpitrain watch RUN``: a live view of a run in the terminal.

It reads the files of the run only, so it works from any machine that sees the folder. It ends when the run ends.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mpitrain.errors import UsageError
from mpitrain.log import is_terminal
from mpitrain.report.progress import Snapshot, snapshot
from mpitrain.trainer.options import POSITIVE

MOST_RANKS = 16
"""The most ranks that have a line of their own."""

BAR_WIDTH = 40
COLOURS = {"running": "bold", "finished": "green", "interrupted": "red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run (mpitrain train --out RUN)")
    parser.add_argument("--once", action="store_true", help="print the present state and exit")
    parser.add_argument(
        "--every", metavar="SECONDS", type=float, default=1.0, help="seconds between two looks (default: 1)"
    )


def run(args: argparse.Namespace) -> int:
    """Show the run until it ends; return the exit code."""
    if args.every not in POSITIVE:
        raise UsageError(f"--every must be {POSITIVE.text}, not {args.every:g}")
    found = snapshot(args.run)
    console = Console(highlight=False, markup=False, emoji=False)
    if args.once:
        console.print(frame(found))
        return 0
    try:
        if is_terminal(sys.stdout):
            _show_live(args.run, found, console, args.every)
        else:
            _print_lines(args.run, found, args.every)
    except KeyboardInterrupt:
        pass  # the view ends, not the run
    return 0


def _show_live(folder: Path, found: Snapshot, console: Console, seconds: float) -> None:
    """Redraw the frame until the run ends."""
    with Live(frame(found), console=console, auto_refresh=False) as live:
        while found.state == "running":
            time.sleep(seconds)
            found = _next(folder, found)
            live.update(frame(found), refresh=True)


def _print_lines(folder: Path, found: Snapshot, seconds: float) -> None:
    """Print a line for each new state until the run ends."""
    printed = ""
    while True:
        line = found.line()
        if line != printed:
            print(line, flush=True)
            printed = line
        if found.state != "running":
            return
        time.sleep(seconds)
        found = _next(folder, found)


def _next(folder: Path, found: Snapshot) -> Snapshot:
    """Return the next state. While a file is being replaced, the state before stays.

    Raises:
        UsageError: The folder is gone.
    """
    try:
        return snapshot(folder)
    except UsageError:
        if not folder.is_dir():
            raise
        return found


def frame(found: Snapshot) -> Any:
    """Return a snapshot as an object that ``rich`` prints. All texts are plain: no markup is read from a file."""
    bar = Table.grid(padding=(0, 1))
    done = 0.0 if np.isnan(found.done) else found.done
    percent = "" if np.isnan(found.done) else f"{found.done:.0%}"
    bar.add_row(
        Text(found.state, style=COLOURS[found.state]), ProgressBar(total=1.0, completed=done, width=BAR_WIDTH), percent
    )
    numbers = Table.grid(padding=(0, 2))
    for name, value in found.numbers.items():
        numbers.add_row(Text(name, style="dim"), Text(value))
    parts: list[Any] = [Text(found.title, style="bold"), bar, numbers]
    if found.rates.size:
        parts.append(_ranks(found))
    return Group(*parts)


def _ranks(found: Snapshot) -> Table:
    """Return the table of the ranks: all of them, or the slowest ones."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("rank", "steps/s", "waiting", ""):
        table.add_column(name, justify="right")
    order = np.arange(found.rates.size)
    if order.size > MOST_RANKS:
        # The dead first, then the slowest.
        order = np.lexsort((found.rates, found.alive))[:MOST_RANKS]
        table.caption = f"the slowest {MOST_RANKS} of {found.rates.size} ranks"
    for rank in order:
        rate, waiting = found.rates[rank], found.waiting[rank]
        state = "" if found.alive[rank] else "dead"
        known = "-" if np.isnan(rate) else f"{rate:,.1f}"
        table.add_row(str(rank), known, "-" if np.isnan(waiting) else f"{waiting:.0%}", Text(state, style="red"))
    return table
