"""``mpitrain plan``: the time of an epoch with each method on a given cluster, and which method to pick."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from mpitrain.cli.options import add_options
from mpitrain.errors import UsageError
from mpitrain.trainer.forecast import Forecast, forecasts, recommendation
from mpitrain.trainer.forecast_config import ForecastConfig
from mpitrain.trainer.options import values_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_options(parser, ForecastConfig)
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the times of an epoch")
    parser.add_argument("--json", action="store_true", help="print one JSON document on the last line")


def run(args: argparse.Namespace) -> int:
    """Print a table and a recommendation; return the exit code.

    Raises:
        UsageError: An option is invalid.
    """
    config = ForecastConfig(**values_of(vars(args), ForecastConfig))
    found = forecasts(config)
    print("\n".join(show(found)))
    if args.plot is not None:
        _plot(args.plot, found)
    if args.json:
        methods = [{**dataclasses.asdict(one), "is_stable": one.is_stable} for one in found]
        document = {"config": dataclasses.asdict(config), "methods": methods, "recommendation": recommendation(found)}
        print(json.dumps(document))
    return 0


def show(found: list[Forecast]) -> list[str]:
    """Return the lines of the table, the warnings and the recommendation."""
    lines = [f"{'method':14} {'epoch (s)':>10} {'communication':>14} {'MB a step':>10}  stable"]
    for one in found:
        lines.append(
            f"{one.algorithm:14} {one.epoch_seconds:10.4g} {one.communication_share:14.1%} "
            f"{one.bytes_per_step / 1e6:10.3g}  {'yes' if one.is_stable else 'no'}"
        )
    return [*lines, *(f"{one.algorithm}: {text}" for one in found for text in one.warnings), recommendation(found)]


def _plot(path: Path, found: list[Forecast]) -> None:
    from mpitrain.report.forecast_plot import plot_forecast

    try:
        plot_forecast(
            path,
            [one.algorithm for one in found],
            [one.epoch_seconds for one in found],
            [one.computing_share for one in found],
        )
    except (OSError, ValueError) as error:
        raise UsageError(f"--plot {path} cannot be written ({error}): choose another file ending in .png") from error
