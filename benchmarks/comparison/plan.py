"""The plan of a comparison: options, the configuration of each method, budgets and evaluations.

Everything that can be wrong with any method is found here, before anything runs.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mpitrain.algorithms import METHODS, create
from mpitrain.cli import main as cli
from mpitrain.errors import UsageError
from mpitrain.trainer.config import TrainConfig, method_of

ALGORITHMS = "allreduce,gossip,easgd"
EPOCHS = 30.0

WARM_UP_STEPS = 12
"""Of each method before anything is timed: more than the period of those that exchange every tenth step."""

TRAIN_OPTIONS = ("data", "model", "batch_size", "momentum", "weight_decay", "sampling", "augment", "straggler")
"""Handed on to ``TrainConfig`` where they are given."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the options; omitted options have the defaults of ``mpitrain train``."""
    parser = cli.Parser(prog="compare.py", description="Compare methods. Run under mpirun or srun.")
    add = parser.add_argument
    add("--algorithms", default=ALGORITHMS, metavar="NAME,NAME", help="or all (default: %(default)s)")
    add("--seeds", type=int, default=3, help="runs of each algorithm (default: %(default)s)")
    add("--data", default="digits", help="digits, synthetic or FILE.h5 (default: %(default)s)")
    add("--model", default="mlp", help="as in mpitrain train (default: %(default)s)")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--epochs", type=float, help=f"over all ranks together (default: {EPOCHS:g})")
    budget.add_argument("--seconds", type=float, help="of training, for each run")
    budget.add_argument("--gradients", type=int, help="over all ranks together")
    add("--batch-size", type=int, help="of each rank (default: 32)")
    add("--lr", type=float, default=0.05, help="learning rate of SGD (default: %(default)s); see --lr-of")
    add("--lr-of", action="append", default=[], metavar="NAME=LR", help="of one algorithm, instead of what it declares")
    add("--momentum", type=float, help="of the local SGD (default: 0.9); not of algorithms that make the update")
    add("--weight-decay", type=float, help="default: 0")
    add(
        "--set",
        action="append",
        default=[],
        metavar="NAME.KEY=VALUE",
        help="a setting of one algorithm; without it, what the algorithm recommends for short runs",
    )
    add("--target", type=float, help="test accuracy, 0 to 1 (default: the highest whole percent that all runs reach)")
    add("--straggler", type=cli.straggler, metavar="RANK:FACTOR", help="make this rank compute FACTOR times slower")
    add("--sampling", choices=("independent", "sharded"), help="does each rank draw from all data, or from its part")
    add("--augment", action="store_true", default=None, help="random crops and flips of photographs")
    add("--evaluations", type=int, default=18, help="of each run (default: %(default)s)")
    add("--test-samples", type=int, help="evaluate on a random subset of the test set, the same for all (default: all)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--out", type=Path, metavar="DIR", help="for plots and runs (default: runs/compare-DATE-TIME)")
    add("--json", action="store_true", help="print the JSON document only")
    return parser


def configurations(options: argparse.Namespace) -> dict[str, TrainConfig]:
    """Return the configuration of each method, in the given order, without seeds, folders and calendar. Local.

    Raises:
        UsageError: Whatever is wrong with any of them.
    """
    for name in ("seeds", "evaluations", "test_samples"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be 1 or more, not {value}")
    if options.target is not None and not 0 < options.target <= 1:
        raise UsageError(f"--target must be an accuracy above 0 and at most 1, not {options.target:g}")
    if options.seconds is not None and not options.seconds > 0:
        raise UsageError(f"--seconds must be more than 0, not {options.seconds:g}")
    names = list(METHODS) if options.algorithms == "all" else list(dict.fromkeys(options.algorithms.split(",")))
    methods = {name: create(name) for name in names}
    rates, settings = of_methods(options.lr_of, "--lr-of", names), of_methods(options.set, "--set", names)
    common = {name: getattr(options, name) for name in TRAIN_OPTIONS if getattr(options, name) is not None}
    common |= {"device": options.device, "quiet": True, "defer_evaluation": True, "checkpoint_every": 0}
    if options.seconds is not None:
        common["minutes"] = options.seconds / 60
    elif options.gradients is not None:
        common["gradients"] = options.gradients
    else:
        common["epochs"] = EPOCHS if options.epochs is None else options.epochs
    configs = {}
    for name, method in methods.items():
        own = {"lr": options.lr * method.learning_rate_factor}
        if rates[name]:
            own["lr"] = number(rates[name][""], f"--lr-of {name}=")
        if method.owns_update and "momentum" in common:
            own["momentum"] = None
        of_short_runs = {key: str(value) for key, value in method.short_run.items()}
        configs[name] = TrainConfig(name, {**of_short_runs, **settings[name]}, **{**common, **own})
        method_of(configs[name])
    return configs


def of_methods(pairs: Sequence[str], option: str, names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Parse ``NAME.KEY=VALUE`` or ``NAME=VALUE`` (the key is then empty) into values by name and key.

    Raises:
        UsageError: Another form, or a name that is not one of ``names``.
    """
    found: dict[str, dict[str, str]] = {name: {} for name in names}
    for pair in pairs:
        left, equals, value = pair.partition("=")
        name, dot, key = left.strip().partition(".")
        if not equals or bool(dot) != (option == "--set"):
            example = "easgd.period=10" if option == "--set" else "easgd=0.01"
            raise UsageError(f"{option} takes an algorithm and a value, such as {option} {example}, not {pair!r}")
        if name not in found:
            raise UsageError(f"{option} {pair}: {name} is not compared here, but {', '.join(names)}")
        found[name][key] = value.strip()
    return found


def number(text: str, what: str) -> float:
    """Parse a number or raise UsageError."""
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{what}{text}: must be a number") from None


def with_calendar(config: TrainConfig, *, n_evaluations: int, n_train: int, n_ranks: int) -> TrainConfig:
    """Return the configuration with its budget in gradients and its evaluation times. Local.

    A rank of a method that waits for nobody makes steps as fast as it can: rank 0, which keeps the calendar, more than
    its share if another is the straggler and less if it is that itself.
    """
    if config.minutes is not None:
        return dataclasses.replace(config, evaluate_seconds=60 * config.minutes / n_evaluations)
    gradients = config.gradients
    if config.epochs is not None:
        gradients = max(round(config.epochs * n_train / config.batch_size), n_ranks)
    assert gradients is not None
    speeds = [1.0] * n_ranks
    if config.straggler is not None and not method_of(config).is_synchronous:
        speeds[config.straggler[0]] = 1 / config.straggler[1]
    every = max(round(gradients * speeds[0] / sum(speeds) / n_evaluations), 1)
    return dataclasses.replace(config, epochs=None, gradients=gradients, evaluate_every=every)
