"""Several methods on the same ranks, data, model and budget, with several seeds: a table, plots, one JSON document.

    jobs/local.sh 4 python benchmarks/compare.py --algorithms allreduce,gossip,easgd --seeds 3
    jobs/local.sh 4 python benchmarks/compare.py --straggler 1:4
    jobs/local.sh 4 python benchmarks/compare.py --algorithms easgd,eamsgd --set easgd.period=1 --lr-of eamsgd=0.002

The runs follow each other in one MPI job, seed after seed and in each seed method after method, so that whatever else
the machine does meets all methods alike. Before the first, each method runs a few steps that count for nothing:
kernels are compiled, pages touched, torch warm. Nothing is evaluated while a run goes on; what a method would have
evaluated is kept and evaluated afterwards.

Budgets are the gradients of all ranks together (an epoch is as many as cover the training set once) or the same time
for each. A method that waits for nobody so uses what its fast ranks can do when another is slow.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import comparison

from mpitrain import cli
from mpitrain.errors import UsageError

ALGORITHMS = "allreduce,gossip,easgd"
EPOCHS = 30.0
WARM_UP_STEPS = 12  # more than the period of the methods that exchange every tenth step

TRAIN_OPTIONS = ("data", "model", "batch_size", "momentum", "weight_decay", "sampling", "augment", "straggler")


def main() -> int:
    """Compare; returns the exit code."""
    options = parser().parse_args()
    try:
        return compare(options)
    except UsageError as error:
        return cli.fail(str(error))


def parser() -> argparse.ArgumentParser:
    """The options; what is not given has the defaults of ``mpitrain train``."""
    parser = cli.Parser(prog="compare.py", description="Compare methods. Run under mpirun or srun.")
    add = parser.add_argument
    add("--algorithms", default=ALGORITHMS, metavar="NAME,NAME", help="or all (default: %(default)s)")
    add("--seeds", type=int, default=3, help="runs of each algorithm (default: %(default)s)")
    add("--data", help="digits, synthetic or FILE.h5 (default: digits)")
    add("--model", help="as in mpitrain train (default: mlp)")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--epochs", type=float, help=f"over all ranks together (default: {EPOCHS:g})")
    budget.add_argument("--seconds", type=float, help="of training, for each run")
    budget.add_argument("--gradients", type=int, help="over all ranks together")
    add("--batch-size", type=int, help="of each rank (default: 32)")
    add("--lr", type=float, default=0.05, help="learning rate of SGD (default: %(default)s); see --lr-of")
    add("--lr-of", action="append", default=[], metavar="NAME=LR", help="of one algorithm, instead of what it declares")
    add("--momentum", type=float, help="of the local SGD (default: 0.9); algorithms that make the update keep their own")
    add("--weight-decay", type=float, help="default: 0")
    add("--set", action="append", default=[], metavar="NAME.KEY=VALUE", help="a setting of one algorithm")
    add("--target", type=float, help="test accuracy, 0 to 1 (default: the highest whole percent that all runs reach)")
    add("--straggler", type=cli.straggler, metavar="RANK:FACTOR", help="make this rank compute FACTOR times slower")
    add("--sampling", choices=("independent", "sharded"), help="does each rank draw from all data, or from its part")
    add("--augment", action="store_true", default=None, help="random crops and flips of photographs")
    add("--evaluations", type=int, default=18, help="of each run (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--out", type=Path, metavar="DIR", help="for plots and runs (default: runs/compare-DATE-TIME)")
    add("--json", action="store_true", help="print the JSON document only")
    return parser


def configurations(options: argparse.Namespace) -> dict[str, Any]:
    """The ``TrainConfig`` of each method, in the order given, for the first seed. Local.

    Raises:
        UsageError: Whatever is wrong with any of them.
    """
    from mpitrain.algorithms import METHODS, create
    from mpitrain.config import TrainConfig
    from mpitrain.trainer import method_of

    names = list(METHODS) if options.algorithms == "all" else list(dict.fromkeys(options.algorithms.split(",")))
    rates, settings = of_methods(options.lr_of, "--lr-of", names), of_methods(options.set, "--set", names)
    for name, least in (("seeds", 1), ("evaluations", 1)):
        if getattr(options, name) < least:
            raise UsageError(f"--{name} must be {least} or more, not {getattr(options, name)}")
    if options.target is not None and not 0 < options.target <= 1:
        raise UsageError(f"--target must be an accuracy above 0 and at most 1, not {options.target:g}")
    given = {name: getattr(options, name) for name in TRAIN_OPTIONS if getattr(options, name) is not None}
    seconds = options.seconds
    given |= {"gradients": options.gradients, "minutes": None if seconds is None else seconds / 60}
    if options.seconds is None and options.gradients is None:
        given["epochs"] = EPOCHS if options.epochs is None else options.epochs
    configs = {}
    for name in names:
        method = create(name)
        of_this = {key: value for key, value in given.items() if key != "momentum" or not method.owns_update}
        rate = number(rates[name][""], f"--lr-of {name}=") if rates[name] else options.lr * method.learning_rate_factor
        config = TrainConfig(
            name, settings[name], lr=rate, device=options.device, quiet=True, defer_evaluation=True,
            checkpoint_every=0, **of_this,
        )  # fmt: skip
        method_of(config)
        configs[name] = config
    return configs


def of_methods(pairs: Sequence[str], option: str, names: Sequence[str]) -> dict[str, dict[str, str]]:
    """``NAME.KEY=VALUE`` or ``NAME=VALUE`` (then the key is empty) by name and key."""
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
    """A number, or a UsageError."""
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{what}{text}: must be a number") from None


def with_schedule(config: Any, options: argparse.Namespace, n_train: int, world: Any) -> Any:
    """The configuration with its budget in gradients and with the moments of its evaluations. Local.

    A rank of a method that waits for nobody makes steps as fast as it can: rank 0, which keeps the calendar, more than
    its share if another is the straggler and less if it is that itself.
    """
    from mpitrain.trainer import method_of

    if config.minutes is not None:
        return dataclasses.replace(config, evaluate_seconds=60 * config.minutes / options.evaluations)
    gradients = config.gradients
    if config.epochs is not None:
        gradients = max(round(config.epochs * n_train / config.batch_size), world.size)
    speeds = [1.0] * world.size
    if config.straggler is not None and not method_of(config).is_synchronous:
        speeds[config.straggler[0]] = 1 / config.straggler[1]
    steps_of_rank_0 = gradients * speeds[0] / sum(speeds)
    every = max(round(steps_of_rank_0 / options.evaluations), 1)
    return dataclasses.replace(config, epochs=None, gradients=gradients, evaluate_every=every)


def compare(options: argparse.Namespace) -> int:
    """Collective."""
    configs = configurations(options)
    from mpitrain import data, info
    from mpitrain.collectives.world import init
    from mpitrain.trainer import train

    world = init(options.device)
    if options.straggler is not None and not 0 <= options.straggler[0] < world.size:
        raise UsageError(f"--straggler names rank {options.straggler[0]}: there are ranks 0 to {world.size - 1}")
    load_before = os.getloadavg()
    tell = Teller(world.rank == 0)
    any_config = next(iter(configs.values()))
    dataset = data.load(any_config.data, world=world, sampling=any_config.sampling)
    for name, config in configs.items():
        tell.begin(f"warming up: {name}")
        unbudgeted = dataclasses.replace(config, epochs=None, gradients=None, minutes=None, steps=WARM_UP_STEPS)
        train(dataclasses.replace(unbudgeted, straggler=None), world, dataset=dataset)
        tell.end("")
    out = make_folder(options.out, world)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in configs}
    n_runs = options.seeds * len(configs)
    for seed in range(options.seeds):
        for name, config in configs.items():
            tell.begin(f"run {sum(map(len, results.values())) + 1} of {n_runs}: {name}, seed {seed}")
            scheduled = with_schedule(config, options, dataset.n_train, world)
            result = train(
                dataclasses.replace(scheduled, seed=seed, out=str(out / f"{name}-{seed}")), world, dataset=dataset
            )
            if not result["complete"]:
                raise SystemExit(cli.EXIT_STOPPED)
            results[name].append(result)
            tell.end(f"{result['test_accuracy']:.2%} after {result['gradients']} gradients in {result['seconds']:.1f} s")
    if world.rank == 0:
        document = {
            "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
            **document_of(results, options.target, out),
            **info.describe(world),
            "load_average": {"before": load_before, "after": os.getloadavg()},
        }
        finish(document, out, only_json=options.json)
    return 0


def document_of(results: Mapping[str, list[dict[str, Any]]], target: float | None, out: Path) -> dict[str, Any]:
    """What came out. Local; rank 0 only."""
    flat = [result for of_method in results.values() for result in of_method]
    target = target or comparison.default_target(flat)
    return {
        "target_accuracy": target,
        "rows": [comparison.summarise(of_method, target) for of_method in results.values()],
        "runs": [
            comparison.run_document(result, seed, target)
            for of_method in results.values()
            for seed, result in enumerate(of_method)
        ],
        "files": draw(results, out),
    }


def draw(results: Mapping[str, Sequence[Mapping[str, Any]]], out: Path) -> list[str]:
    """The plots that there is something for; the runs of a method are one line in them. Local; rank 0 only."""
    from mpitrain.report import load_run, plots

    runs = [
        dataclasses.replace(load_run(Path(result["out"])), label=name, group=name)
        for name, of_method in results.items()
        for result in of_method
    ]
    return [str(out / name) for name, draw in plots.DRAWINGS.items() if draw(runs, out / name)]


def finish(document: dict[str, Any], out: Path, *, only_json: bool) -> None:
    """Write the document, and print the table and it. Local; rank 0 only."""
    path = out / "compare.json"
    document["files"].append(str(path))
    path.write_text(json.dumps(document, indent=2) + "\n")
    if not only_json:
        config = f"{document['settings']['data'] or 'digits'}, {document['settings']['model'] or 'mlp'}"
        print(f"{config}, {document['world']['ranks']} ranks, medians of {document['settings']['seeds']} seeds")
        print("\n".join(["", *comparison.table(document["rows"]), "", *(f"wrote {file}" for file in document["files"])]))
    print(json.dumps(document), flush=True)


def make_folder(out: Path | None, world: Any) -> Path:
    """The folder of the comparison, new. Collective.

    Raises:
        UsageError: When it holds something or cannot be made, on all ranks.
    """
    folder = Path(world.comm.bcast(str(out or f"runs/compare-{time.strftime('%Y%m%d-%H%M%S')}")))
    problem = None
    if world.rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                problem = f"--out {folder} is not empty: choose another folder"
        except OSError as error:
            problem = f"--out {folder} cannot be used ({error.strerror or error}): choose another folder"
    problem = world.comm.bcast(problem)
    if problem is not None:
        raise UsageError(problem)
    return folder


class Teller:
    """Says on standard error what is going on: one line for each run, the first half of it when the run begins."""

    def __init__(self, show: bool) -> None:
        self._show = show

    def begin(self, text: str) -> None:
        """The first half."""
        if self._show:
            print(f"{text} ... ", end="", file=sys.stderr, flush=True)

    def end(self, text: str) -> None:
        """The second half."""
        if self._show:
            print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
