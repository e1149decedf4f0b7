"""``mpitrain algorithms``: every method, its paper and its settings."""

from __future__ import annotations

import argparse
import json

from mpitrain.algorithms import catalogue
from mpitrain.collectives.world.launchers import launched_rank


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON document")
    form.add_argument("--markdown", action="store_true", help="print Markdown with equations, as in docs/methods.md")


def run(args: argparse.Namespace) -> int:
    """Print the methods; return the exit code."""
    if launched_rank() != 0:
        return 0
    if args.json:
        print(json.dumps(catalogue.catalogue()))
    else:
        print(catalogue.markdown() if args.markdown else catalogue.text(), end="")
    return 0
