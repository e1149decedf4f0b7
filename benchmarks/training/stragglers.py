"""Measure the cost of one slow rank for the others: throughput and time to a target accuracy, with and without it.

    jobs/local.sh 2 python -m benchmarks.training.stragglers [--algorithms allreduce,easgd,gossip] [--factor 4] [--json]

Each method trains the digits' MLP twice for the same number of gradients: once with all ranks alike, once with rank 1
computing ``factor`` times slower (it sleeps, so that it takes no core from the others). Of the ranks that are not slow
the steps in a second count: a method that waits for nobody keeps them. With no more ranks than cores nobody gains by
the slow rank's sleep. Seeds are many and runs short, because a machine's speed changes from one second to the next;
what is kept is the median of the seeds' shares, each of two runs that follow each other.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import Any

import numpy as np

from benchmarks.comparison import plan
from benchmarks.comparison import tables as comparison
from benchmarks.micro.timing import where
from mpitrain.algorithms import METHODS, create
from mpitrain.cli.failure import fail
from mpitrain.cli.options import Parser
from mpitrain.errors import UsageError
from mpitrain.report import text
from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.plan import RunPlan
from mpitrain.trainer.runfolder import to_json

ALGORITHMS = "allreduce,easgd,gossip"
SLOW_RANK = 1
GRADIENTS, EVALUATIONS = 1500, 20
TARGET = 0.95
MODEL = "mlp:hidden=512x512"
KEPT_AT_LEAST = 0.95  # of the others' throughput, for methods that wait for nobody


def main() -> int:
    """Run the benchmark and return the exit code. Collective."""
    parser = Parser(
        prog="benchmarks.training.stragglers", description="One slow rank among 2 or more. Run under mpirun or srun."
    )
    parser.add_argument("--algorithms", default=ALGORITHMS, metavar="NAME,NAME", help="default: %(default)s")
    parser.add_argument("--factor", type=float, default=4.0, help="how much slower (default: %(default)s)")
    parser.add_argument("--gradients", type=int, default=GRADIENTS, help="of a run, all ranks (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the JSON document only")
    options = parser.parse_args()
    try:
        return run(options)
    except UsageError as error:
        return fail(str(error))


def run(options: Any) -> int:
    """Train each method with and without the slow rank, in turn. Collective."""
    from mpitrain import data
    from mpitrain.cli import info
    from mpitrain.collectives.world.launch import init
    from mpitrain.trainer.loop import train

    names = options.algorithms.split(",")
    methods = {name: create(name) for name in names}
    if not options.factor >= 1:
        raise UsageError(f"--factor must be 1 or more, not {options.factor:g}")
    world = init()
    if world.size < 2:
        raise UsageError("one slow rank among others needs 2 or more ranks: run under mpirun")
    load_before = os.getloadavg()
    dataset = data.load("digits", world=world, sampling="independent")
    kinds = [(name, slow) for name in names for slow in (False, True)]
    results: dict[tuple[str, bool], list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for name in names:  # compiled and warm before anything is timed
        train(dataclasses.replace(config_of(name), gradients=None, steps=plan.WARM_UP_STEPS), world, dataset=dataset)
    for seed in range(options.seeds):
        for (name, slow), runs in results.items():
            config = dataclasses.replace(
                config_of(name),
                seed=seed,
                gradients=options.gradients,
                straggler=(SLOW_RANK, options.factor) if slow else None,
            )
            calendar = {"n_evaluations": EVALUATIONS, "n_train": dataset.n_train, "n_ranks": world.size}
            runs.append(train(plan.with_calendar(RunPlan.of(config), **calendar), world, dataset=dataset))
    if world.rank == 0:
        rows = [row_of(name, results[name, False], results[name, True]) for name in names]
        bars = verdicts(rows, [name for name in names if not methods[name].is_synchronous])
        document = {"results": rows, "bars": bars, "factor": options.factor, **info.describe(world)}
        document["load_average"] = {"before": load_before, "after": os.getloadavg()}
        if not options.json:
            print(where(document))
            print(f"rank {SLOW_RANK} computes {options.factor:g} times slower; {MODEL} on digits\n")
            print("\n".join([*table(rows), ""]))
            for bar in bars:
                print(f"{'PASS' if bar['passed'] else 'MISSED'}: {bar['bar']}: {bar['ratio']:.3f}")
        print(to_json(document), flush=True)
    return 0


def config_of(name: str) -> TrainConfig:
    """Return the recommended settings for short runs, without evaluations during the run."""
    method = METHODS[name]
    settings = {key: str(value) for key, value in method.short_run.items()}
    return TrainConfig(
        name,
        settings,
        model=MODEL,
        lr=0.05 * method.learning_rate_factor,
        gradients=GRADIENTS,
        quiet=True,
        defer_evaluation=True,
        checkpoint_every=0,
    )


def throughput(result: dict[str, Any]) -> float:
    """Return the mean steps per second of the ranks other than the slow one."""
    steps = [n for rank, n in enumerate(result["steps_of_ranks"]) if rank != SLOW_RANK]
    return float(sum(steps) / len(steps) / result["seconds"])


def row_of(name: str, alike: list[dict[str, Any]], slowed: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarise the effect of the slow rank on one method: medians over the seeds."""
    before, after = (np.array([throughput(result) for result in runs]) for runs in (alike, slowed))
    seconds = [
        comparison.median_reached([comparison.to_target(result, TARGET)["seconds_to_target"] for result in runs])
        for runs in (alike, slowed)
    ]
    return {
        "method": name,
        "steps_per_second": float(np.median(before)),
        "steps_per_second_beside_a_slow_rank": float(np.median(after)),
        "retained_fraction": float(np.median(after / before)),
        "seconds_to_target": seconds[0],
        "seconds_to_target_beside_a_slow_rank": seconds[1],
        "test_accuracy": float(np.median([result["test_accuracy"] for result in slowed])),
    }


def verdicts(rows: list[dict[str, Any]], asynchronous: list[str]) -> list[dict[str, Any]]:
    """Return the verdict on the project's bar for each method whose workers do not wait."""
    return [
        {
            "bar": f"{row['method']}: the others keep at least {KEPT_AT_LEAST:.0%} of their throughput",
            "ratio": row["retained_fraction"],
            "passed": row["retained_fraction"] >= KEPT_AT_LEAST,
        }
        for row in rows
        if row["method"] in asynchronous
    ]


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Format the rows as a table."""

    def seconds(value: float | None) -> str:
        return "never" if value is None else f"{value:.2f}"

    return text.table(
        {
            "method": [row["method"] for row in rows],
            "steps/s of a rank": [f"{row['steps_per_second']:.0f}" for row in rows],
            "beside a slow one": [f"{row['steps_per_second_beside_a_slow_rank']:.0f}" for row in rows],
            "retained_fraction": [f"{row['retained_fraction']:.1%}" for row in rows],
            f"s to {TARGET:.0%}": [seconds(row["seconds_to_target"]) for row in rows],
            f"beside a slow one, s to {TARGET:.0%}": [
                seconds(row["seconds_to_target_beside_a_slow_rank"]) for row in rows
            ],
            "accuracy": [f"{row['test_accuracy']:.1%}" for row in rows],
        },
        left=("method",),
    )


if __name__ == "__main__":
    sys.exit(main())
