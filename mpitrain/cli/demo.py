"""``mpitrain demo``: train with EASGD on 4 ranks of this machine, and print the report."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from mpitrain.cli.launcher import launch
from mpitrain.errors import UsageError
from mpitrain.report import load_run, summarise, table

MOST_RANKS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--ranks", type=int, default=4, metavar="N", help="ranks on this machine (default: 4)")
    parser.add_argument(
        "--epochs", type=float, default=20.0, help="passes over the training set, by all ranks in total (default: 20)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("mpitrain-demo"), metavar="RUN", help="folder (default: mpitrain-demo)"
    )


def run(args: argparse.Namespace) -> int:
    """Launch the training and print its report; return the exit code."""
    if not 1 <= args.ranks <= MOST_RANKS:
        raise UsageError(f"--ranks must be from 1 to {MOST_RANKS}, not {args.ranks}")
    if not 0 < args.epochs < float("inf"):
        raise UsageError(f"--epochs must be more than 0, not {args.epochs:g}")
    if (args.out / "config.json").exists():
        raise UsageError(f"{args.out} already holds a run: remove it, or choose another --out")
    words = ["train", "--algorithm", "easgd", "--data", "digits", "--model", "mlp", "--epochs", f"{args.epochs:g}"]
    words.append(f"--out={args.out}")
    print(f"mpirun -n {args.ranks} mpitrain {shlex.join(words)}", flush=True)
    code = launch(args.ranks, words)
    if code == 0:
        plots = sorted(path.name for path in args.out.glob("*.png"))
        print(
            "\n".join(["", *table([summarise(load_run(args.out))]), "", f"{args.out}: {', '.join(plots)}, report.md"])
        )
    return code
