"""The sub-command `mpitrain report RUN [RUN ...]`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mpitrain.report.markdown import remarks, table, write_report
from mpitrain.report.runs import load_runs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the sub-command."""
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run, finished or not")
    parser.add_argument(
        "--out", type=Path, help="folder for the plots (default: RUN for one run, ./report for several)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document as the last line")


def run(args: argparse.Namespace) -> int:
    """Run the sub-command and return its exit code."""
    document = write_report(load_runs(args.runs), args.out or (args.runs[0] if len(args.runs) == 1 else Path("report")))
    print("\n".join(table(document["runs"])))
    print("\n".join(["", *remarks(document), *(f"wrote {file}" for file in document["files"])]))
    if args.json:
        print(json.dumps(document))
    return 0
