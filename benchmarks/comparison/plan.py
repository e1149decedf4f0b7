"""The plan of a comparison: its options, the configuration of each method, budgets and evaluations.

Every mistake in the options of any method is found here, before anything runs.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from mpitrain.algorithms import METHODS, create
from mpitrain.cli.options import Parser, add_options
from mpitrain.errors import UsageError
from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.options import AT_LEAST_ONE, POSITIVE, UP_TO_ONE, check_ranges, option, values_of
from mpitrain.trainer.plan import RunPlan

EPOCHS = 30.0

WARM_UP_STEPS = 12
"""Steps of each method before anything is timed: more than the period of those that exchange every tenth step."""

SHARED = (
    *(
        "data",
        "model",
        "model_settings",
        "batch_size",
        "lr",
        "momentum",
        "weight_decay",
        "straggler",
        "inject",
        "sampling",
        "augment",
        "device",
    ),
    *("epochs", "gradients"),
)
"""The fields of ``TrainConfig`` that are options of a comparison too."""


@dataclass(frozen=True)
class ComparisonConfig:
    """The options that a comparison has beside those of a run."""

    seconds: float | None = option(
        None, "seconds of training of each run", parse=float, within=POSITIVE, group="budget"
    )
    algorithms: str = option("allreduce,gossip,easgd", "names of the methods, or all", metavar="NAME,NAME")
    seeds: int = option(3, "runs of each algorithm", parse=int, within=AT_LEAST_ONE)
    lr_of: tuple[str, ...] = option(
        (),
        "learning rate of one algorithm, instead of --lr times the factor it declares; may be given several times",
        metavar="NAME=LR",
        repeated=True,
        collect=tuple,
    )
    settings: tuple[str, ...] = option(
        (),
        "a setting of one algorithm, beside those it recommends for short runs; may be given several times",
        flag="--set",
        metavar="NAME.KEY=VALUE",
        repeated=True,
        collect=tuple,
    )
    target: float | None = option(
        None,
        "test accuracy, 0 to 1",
        parse=float,
        within=UP_TO_ONE,
        default_text="the highest whole percent that all runs reach",
    )
    evaluations: int = option(18, "evaluations of each run", parse=int, within=AT_LEAST_ONE)
    test_samples: int | None = option(
        None,
        "size of a random subset of the test set, the same for all runs",
        parse=int,
        within=AT_LEAST_ONE,
        default_text="the whole test set",
    )
    out: str | None = option(None, "folder for plots and runs", metavar="DIR", default_text="runs/compare-DATE-TIME")

    def __post_init__(self) -> None:
        check_ranges(self)


def parser() -> argparse.ArgumentParser:
    """Return the parser; shared options have the defaults of ``mpitrain train``, except for the epochs."""
    parser = Parser(prog="compare.py", description="Compare methods. Run under mpirun or srun.")
    other_help = {
        "lr": "learning rate of SGD, which each algorithm multiplies by the factor it declares; see --lr-of",
        "momentum": "momentum of the local SGD, for algorithms that leave the update to it",
    }
    add_options(parser, TrainConfig, SHARED, help=other_help, keep_defaults=True)
    add_options(parser, ComparisonConfig, keep_defaults=True)
    parser.add_argument("--json", action="store_true", help="print the JSON document only")
    return parser


def configurations(options: argparse.Namespace) -> dict[str, RunPlan]:
    """Return the plan of each method, in the order given; seeds, folders and the calendar come later. Local.

    Raises:
        UsageError: An option of any method is wrong.
    """
    comparison = ComparisonConfig(**values_of(vars(options), ComparisonConfig))
    wanted = comparison.algorithms
    names = list(METHODS) if wanted == "all" else list(dict.fromkeys(wanted.split(",")))
    methods = {name: create(name) for name in names}
    rates, settings = of_methods(comparison.lr_of, "--lr-of", names), of_methods(comparison.settings, "--set", names)
    common = values_of(vars(options), TrainConfig, SHARED)
    common |= {"quiet": True, "defer_evaluation": True, "checkpoint_every": 0, "on_nonfinite": "skip"}
    if comparison.seconds is not None:
        common["minutes"] = comparison.seconds / 60
    elif "gradients" not in common:
        common.setdefault("epochs", EPOCHS)
    plans = {}
    for name, method in methods.items():
        own = {"lr": options.lr * method.learning_rate_factor}
        if rates[name]:
            own["lr"] = number(rates[name][""], f"--lr-of {name}=")
        if method.owns_update:
            own["momentum"] = None
        of_short_runs = {key: str(value) for key, value in method.short_run.items()}
        config = TrainConfig(name, {**of_short_runs, **settings[name]}, **{**common, **own})
        plans[name] = RunPlan.of(config)
    return plans


def of_methods(pairs: Sequence[str], option: str, names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return the values of ``NAME.KEY=VALUE``, or of ``NAME=VALUE`` under an empty key, by name and key.

    Raises:
        UsageError: A text has another form, or its name is not one of ``names``.
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
    """Return a text as a number.

    Raises:
        UsageError: It is none.
    """
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{what}{text}: must be a number") from None


def with_calendar(plan: RunPlan, *, n_evaluations: int, n_train: int, n_ranks: int) -> TrainConfig:
    """Return a configuration with the budget in gradients and the moments of the evaluations. Local.

    A rank of an asynchronous method makes steps as fast as it can. Rank 0, which keeps the calendar, makes more than
    its share of them if another rank is the straggler, and less if it is the straggler itself.
    """
    config = plan.config
    if config.minutes is not None:
        return dataclasses.replace(config, evaluate_seconds=60 * config.minutes / n_evaluations)
    gradients = config.gradients
    if config.epochs is not None:
        gradients = max(round(config.epochs * n_train / config.batch_size), n_ranks)
    assert gradients is not None
    speeds = [1.0] * n_ranks
    if config.straggler is not None and not plan.method.is_synchronous:
        speeds[config.straggler[0]] = 1 / config.straggler[1]
    every = max(round(gradients * speeds[0] / sum(speeds) / n_evaluations), 1)
    return dataclasses.replace(config, epochs=None, gradients=gradients, evaluate_every=every)
