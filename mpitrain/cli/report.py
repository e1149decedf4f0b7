"""``mpitrain report RUN [RUN ...]``: plots and a table of runs, as PNG files and one report.md."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mpitrain.report import load_runs, remarks, table, write_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run, finished or not")
    parser.add_argument(
        "--out", type=Path, help="folder for the plots (default: the run folder, or ./report for several runs)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document on the last line")


def run(args: argparse.Namespace) -> int:
    """Write the report and print its table; return the exit code."""
    document = write_report(load_runs(args.runs), args.out or (args.runs[0] if len(args.runs) == 1 else Path("report")))
    print("\n".join(table(document["runs"])))
    print("\n".join(["", *remarks(document), *(f"wrote {file}" for file in document["files"])]))
    if args.json:
        print(json.dumps(document))
    return 0
