"""``mpitrain simulate``: a method with any number of workers in one process, under a virtual clock."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mpitrain.cli.options import add_options
from mpitrain.log import logger
from mpitrain.trainer.cluster_config import ClusterConfig
from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.options import values_of
from mpitrain.trainer.plan import RunPlan
from mpitrain.trainer.study_config import SHARED, StudyConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    in_total = {
        "epochs": "passes over the training set, by all workers in total",
        "gradients": "mini-batch gradients, by all workers in total",
        "batch_size": "samples in a mini-batch of each worker",
        "out": "folder for the metrics, for mpitrain report",
        "sampling": "each worker draws from the whole training set (independent) or from its part (sharded)",
    }
    parser.usage = "%(prog)s [OPTION ...]"
    add_options(parser, TrainConfig, SHARED, help=in_total)
    add_options(parser, StudyConfig)
    add_options(parser, ClusterConfig)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON document on the last line")


def run(args: argparse.Namespace) -> int:
    """Simulate and print the result; return the exit code."""
    result = simulate(args)
    print(
        f"{result['algorithm']} with {result['workers']} simulated workers: "
        f"test accuracy {result['test_accuracy']:.2%}, test loss {result['test_loss']:.4f} after "
        f"{result['gradients']} gradients in {result['seconds']:.4g} s of virtual time"
    )
    if args.json:
        from mpitrain.trainer.runfolder import to_json

        print(to_json(result))
    return 0


def simulate(args: argparse.Namespace) -> dict[str, Any]:
    """Return the result of the simulation that a command line describes.

    Raises:
        UsageError: An option is invalid.
    """
    given = vars(args)
    if args.calibrate is not None:
        given = _calibrated(given)
    study = StudyConfig(**values_of(given, StudyConfig))
    plan = RunPlan.of(TrainConfig(**values_of(given, TrainConfig, SHARED)))
    cluster = ClusterConfig(**values_of(given, ClusterConfig))
    from mpitrain.trainer import study as simulation

    return simulation.simulate(plan, study, cluster)


def _calibrated(given: dict[str, Any]) -> dict[str, Any]:
    """Return the options with those that were not given fitted to a run."""
    from mpitrain.trainer.calibration import calibrated

    fitted = calibrated(Path(given["calibrate"]), given["cores"])
    logger.info("calibrated: %s", ", ".join(f"{name}={value:.4g}" for name, value in _numbers(fitted)))
    return {**given, **{name: value for name, value in fitted.items() if given[name] is None}}


def _numbers(options: dict[str, Any]) -> list[tuple[str, float]]:
    return [(name, value) for name, value in options.items() if isinstance(value, int | float)]
