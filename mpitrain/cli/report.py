"""``mpitrain report RUN [RUN ...]``: plots and a table of runs, as PNG files and one report.md.

With ``--scaling``, speed and efficiency against the number of ranks instead, as scaling.png and scaling.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mpitrain.errors import UsageError
from mpitrain.report import load_runs, remarks, scaling, table, write_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run, finished or not")
    parser.add_argument(
        "--out", type=Path, help="folder for the plots (default: the run folder, or ./report for several runs)"
    )
    parser.add_argument(
        "--scaling", action="store_true", help="tabulate and plot samples per second against the number of ranks"
    )
    parser.add_argument(
        "--html", action="store_true", help="also write report.html, one page with plots that can be zoomed"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document on the last line")


def run(args: argparse.Namespace) -> int:
    """Write the report and print its table; return the exit code."""
    runs = load_runs(args.runs)
    out = args.out or (args.runs[0] if len(args.runs) == 1 else Path("report"))
    if args.scaling and args.html:
        raise UsageError("--scaling writes no page: remove --html")
    if args.scaling:
        document = scaling.write_scaling(runs, out)
        lines = scaling.table(document["scaling"])
        notes = [f"{label} has not finished and is left out" for label in document["unfinished"]]
    else:
        document = write_report(runs, out)
        if args.html:
            from mpitrain.report.page import write_page  # plotly takes half a second to import

            write_page(runs, document, out / "report.html")
            document["files"].append(str(out / "report.html"))
        lines, notes = table(document["runs"]), remarks(document)
    print("\n".join([*lines, "", *notes, *(f"wrote {file}" for file in document["files"])]))
    if args.json:
        print(json.dumps(document))
    return 0
