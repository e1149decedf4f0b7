"""Compare methods on the same ranks, data, model and budget, with several seeds: a table, plots, one JSON document.

    jobs/local.sh 4 python benchmarks/compare.py --algorithms allreduce,gossip,easgd --seeds 3
    jobs/local.sh 4 python benchmarks/compare.py --straggler 1:4
    jobs/local.sh 4 python benchmarks/compare.py --algorithms easgd,eamsgd --set easgd.period=1 --lr-of eamsgd=0.002

The runs follow each other in one MPI job, seed by seed and, within a seed, method by method, so other load on the
machine affects all methods alike. Before the first run, each method makes a few steps to warm up: kernels are compiled,
pages touched. Nothing is evaluated during a run; the vectors to evaluate are stored and evaluated afterwards.

The budget is the number of gradients of all ranks in total (an epoch covers the training set once) or the same time for
each run. With either, an asynchronous method benefits from its fast ranks when another is slow.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script it finds benchmarks/ only

from benchmarks.comparison import plan, tables
from mpitrain.cli.failure import exit_code, fail
from mpitrain.errors import UsageError
from mpitrain.trainer import runfolder
from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.plan import RunPlan
from mpitrain.trainer.runfolder import to_json

Results = Mapping[str, list[dict[str, Any]]]  # for each method, the result of each seed


def main() -> int:
    """Run the comparison; return the exit code."""
    try:
        options = plan.parser().parse_args()
        return compare(options, plan.configurations(options))
    except UsageError as error:
        return fail(str(error))


def compare(options: argparse.Namespace, plans: Mapping[str, RunPlan]) -> int:
    """Warm up, run all methods and print the results; return the exit code. Collective."""
    from mpitrain.cli import info
    from mpitrain.collectives.world.launch import init
    from mpitrain.trainer.loop import train

    world = init(options.device)
    if options.straggler is not None and not 0 <= options.straggler[0] < world.size:
        raise UsageError(f"--straggler names rank {options.straggler[0]}: there are ranks 0 to {world.size - 1}")
    load_before = os.getloadavg()
    say = Speaker(world.rank == 0)
    dataset = load(options, next(iter(plans.values())).config, world)
    for name, plan_of_method in plans.items():
        say(f"warming up: {name}\n")
        steps = dataclasses.replace(
            plan_of_method.config, epochs=None, gradients=None, minutes=None, steps=plan.WARM_UP_STEPS
        )
        warm_up = train(dataclasses.replace(steps, straggler=None, inject=()), world, dataset=dataset)
        if not warm_up["complete"]:
            raise SystemExit(exit_code(warm_up))
    out = make_folder(options.out, world)
    results: Results = {name: [] for name in plans}
    runs = [(seed, name) for seed in range(options.seeds) for name in plans]
    for k, (seed, name) in enumerate(runs):
        say(f"run {k + 1} of {len(runs)}: {name}, seed {seed} ... ")
        config = plan.with_calendar(
            plans[name], n_evaluations=options.evaluations, n_train=dataset.n_train, n_ranks=world.size
        )
        config = dataclasses.replace(config, seed=seed, out=str(out / f"{name}-{seed}"))
        result = train(config, world, dataset=dataset)
        if not result["complete"]:
            raise SystemExit(exit_code(result))
        results[name].append(result)
        say(f"{result['test_accuracy']:.2%} after {result['gradients']} gradients in {result['seconds']:.1f} s\n")
    if world.rank == 0:
        given = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        load_average = {"before": load_before, "after": os.getloadavg()}
        document = {"settings": given, **summary(results, options.target), "files": draw(results, out)}
        report({**document, **info.describe(world), "load_average": load_average}, out, only_json=options.json)
    return 0


class Speaker:
    """A writer of progress to standard error. The text brings its own line ends.

    Args:
        show: Whether this rank writes.
    """

    def __init__(self, show: bool) -> None:
        self._show = show

    def __call__(self, text: str) -> None:
        if self._show:
            print(text, end="", file=sys.stderr, flush=True)


def load(options: argparse.Namespace, config: TrainConfig, world: Any) -> Any:
    """Return the data set, with a smaller test set if requested. Collective."""
    from mpitrain.trainer import batches

    dataset = batches.load(config, world)
    if options.test_samples is None or options.test_samples >= dataset.n_test:
        return dataset
    # At random, because files are often sorted by class.
    return dataset.with_test_samples(
        np.sort(np.random.default_rng(0).permutation(dataset.n_test)[: options.test_samples])
    )


def make_folder(out: str | None, world: Any) -> Path:
    """Create the folder of the tables. Collective.

    Raises:
        UsageError: The folder is not empty or cannot be made; on all ranks.
    """
    folder = Path(world.comm.bcast(str(out or f"runs/compare-{time.strftime('%Y%m%d-%H%M%S')}")))

    def refuse_full() -> None:
        if any(folder.iterdir()):
            raise UsageError(f"--out {folder} is not empty: choose another folder")

    runfolder.make_folder(folder, world, refuse_full)
    return folder


def summary(results: Results, target: float | None) -> dict[str, Any]:
    """Return the results by method and run by run. Local; rank 0 only."""
    target = target or tables.default_target([result for runs in results.values() for result in runs])
    return {
        "target_accuracy": target,
        "rows": [tables.summarise(runs, target) for runs in results.values()],
        "runs": [
            tables.run_document(result, seed, target) for runs in results.values() for seed, result in enumerate(runs)
        ],
    }


def draw(results: Results, out: Path) -> list[str]:
    """Draw the plots, in which the runs of a method are one line; return their paths. Local; rank 0 only."""
    from mpitrain.report import load_run
    from mpitrain.report.markdown import draw as draw_plots

    runs = [
        dataclasses.replace(load_run(Path(result["out"])), label=name, group=name)
        for name, of_method in results.items()
        for result in of_method
    ]
    return [str(out / name) for name in draw_plots(runs, out)]


def report(document: dict[str, Any], out: Path, *, only_json: bool) -> None:
    """Write the document; print the table, and the document on the last line. Local; rank 0 only."""
    path = out / "compare.json"
    document["files"].append(str(path))
    path.write_text(to_json(document, indent=2) + "\n")
    if not only_json:
        print("\n".join([*headline(document), "", *tables.table(document["rows"]), ""]))
        print("\n".join(f"wrote {file}" for file in document["files"]))
    print(to_json(document), flush=True)


def headline(document: Mapping[str, Any]) -> Sequence[str]:
    """Return lines on the compared runs and the machine."""
    settings, world = document["settings"], document["world"]
    n_seeds, cores = settings["seeds"], document["machine"]["cores"]
    lines = [
        f"{settings['data']}, {settings['model']}; {world['ranks']} ranks on {cores} cores, {world['mpi']}; "
        + (f"medians of {n_seeds} seeds" if n_seeds > 1 else "one seed")
    ]
    if settings["straggler"] is not None:
        rank, factor = settings["straggler"]
        lines.append(f"rank {rank} computes {factor:g} times slower")
    busy = document["load_average"]["before"][0]
    if busy > 0.75 * cores:
        lines.append(f"the machine was busy when this began (load {busy:.1f}): times are not to be trusted")
    return lines


if __name__ == "__main__":
    sys.exit(main())
