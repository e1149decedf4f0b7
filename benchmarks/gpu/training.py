"""Measure a training step on a GPU that ranks share, beside the step of as many independent ranks.

    jobs/local.sh 2 python -m benchmarks.gpu.training [--models resnet20,gpt] [--transport auto] [--repeats 5] [--json]

Every rank has the same random mini-batches of its own on its GPU, and all ranks work at the same time:

    alone                     the plain torch optimizer on every rank, which know nothing of each other: the limit
    alone, again              the same once more: how far two figures of one thing are apart
    allreduce                 AllReduceSGD around the same optimizer
    gossip, easgd, tau t      asynchronous, an exchange every tau steps

Matrix products may round to TF32, as most who train on such GPUs let them. The candidates take turns. In its turn each
makes as many steps as its period, at least ``STEPS``, begun together and timed until the GPU has done the last. A
figure is the median over the turns of the slowest rank's seconds for a step, and of its ratio to the turn alone of the
same round.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

import mpitrain
from benchmarks.gpu import machine as gpu_machine
from benchmarks.gpu.models import TASKS, Task
from benchmarks.micro.timing import where
from mpitrain.cli import info
from mpitrain.cli.failure import fail
from mpitrain.cli.options import Parser
from mpitrain.collectives.world.launch import init
from mpitrain.collectives.world.transport import TRANSPORTS
from mpitrain.collectives.world.world import World
from mpitrain.errors import UsageError
from mpitrain.report import text
from mpitrain.trainer.runfolder import to_json

STEPS = 20  # of a turn
PERIODS = (1, 10, 100)
N_BATCHES = 4
ALONE, AGAIN = "alone", "alone, again"

# The project's bar.
BAR_RANKS, BAR_STEP, AT_MOST = 2, "easgd, tau 10", 1.03

Step = Callable[[], object]


class Training:
    """The candidates for one model. Collective to create and to close.

    Args:
        world: The ranks.
        task: What is trained.
        periods: Those of the asynchronous methods.
        n_steps: Of a turn, at least.
        wait: Returns when the GPU has done what torch has begun.
    """

    def __init__(
        self,
        world: World,
        task: Task,
        wait: Callable[[], object],
        periods: Sequence[int] = PERIODS,
        n_steps: int = STEPS,
    ) -> None:
        self._world, self._task, self._wait = world, task, wait
        generator = torch.Generator().manual_seed(world.rank)
        self._batches = [tuple(part.to(world.device) for part in task.batch(generator)) for _ in range(N_BATCHES)]
        self._optimizers: list[mpitrain.DistributedOptimizer] = []
        self.steps: dict[str, Step] = {ALONE: self._alone(), AGAIN: self._alone()}
        self.steps["allreduce"] = self._ours(mpitrain.AllReduceSGD())
        self.n_steps = dict.fromkeys(self.steps, n_steps)
        for name, method in (("gossip", mpitrain.GossipSGD), ("easgd", mpitrain.EASGD)):
            for tau in periods:
                self.steps[f"{name}, tau {tau}"] = self._ours(method(period=tau))
                self.n_steps[f"{name}, tau {tau}"] = -(-n_steps // tau) * tau

    def measure(self, n_repeats: int) -> dict[str, np.ndarray]:
        """Return the seconds per step of the slowest rank, (n_repeats,) per candidate. Collective."""
        seconds = {name: np.zeros(n_repeats) for name in self.steps}
        for repeat in range(-1, n_repeats):  # the first warms up
            for name, step in self.steps.items():
                step()
                self._wait()
                self._world.barrier()
                began = time.perf_counter()
                for _ in range(self.n_steps[name]):
                    step()
                self._wait()
                seconds[name][max(repeat, 0)] = (time.perf_counter() - began) / self.n_steps[name]
        for of_one in seconds.values():
            self._world.comm.Allreduce(MPI.IN_PLACE, of_one, MPI.MAX)
        return seconds

    def close(self) -> None:
        """Free the memory. Collective."""
        self.steps.clear()
        for optimizer in self._optimizers:
            optimizer.close()
        self._optimizers.clear()

    def _alone(self) -> Step:
        model = self._task.model().to(self._world.device)
        return self._step(model, self._task.optimizer(model))

    def _ours(self, method: Any) -> Step:
        model = self._task.model().to(self._world.device)
        optimizer = mpitrain.DistributedOptimizer(self._task.optimizer(model), model, method, world=self._world)
        self._optimizers.append(optimizer)
        return self._step(model, optimizer)

    def _step(self, model: torch.nn.Module, optimizer: Any) -> Step:
        """Make one step as a user would write it."""
        model.train()
        turn = 0

        def step() -> None:
            nonlocal turn
            x, y = self._batches[turn % len(self._batches)]
            turn += 1
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

        return step


def rows_of(model: str, n_samples: int, seconds: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Return one row per candidate.

    Args:
        model: Its name.
        n_samples: Of a mini-batch.
        seconds: (turns,) of each candidate.
    """
    rows = []
    for name, of_one in seconds.items():
        median = float(np.median(of_one))
        row = {"model": model, "step": name, "median_seconds": median, "p95_seconds": float(np.percentile(of_one, 95))}
        row["of_alone"] = float(np.median(of_one / seconds[ALONE]))
        rows.append(row | {"samples_per_second": n_samples / median})
    return rows


def verdicts(rows: Sequence[Mapping[str, Any]], n_ranks: int) -> list[dict[str, Any]]:
    """Return the verdict on the project's bar for each model, if it applies to this run."""
    if n_ranks != BAR_RANKS:
        return []
    return [
        {"bar": f"{row['model']}: {row['step']} at most {AT_MOST:g} x the step alone", "ratio": row["of_alone"]}
        | {"passed": row["of_alone"] <= AT_MOST}
        for row in rows
        if row["step"] == BAR_STEP
    ]


def table(rows: Sequence[Mapping[str, Any]], n_ranks: int) -> list[str]:
    """Format the rows as a table."""
    return text.table(
        {
            "model": [row["model"] for row in rows],
            "step": [row["step"] for row in rows],
            "median ms": [f"{1e3 * row['median_seconds']:.2f}" for row in rows],
            "p95 ms": [f"{1e3 * row['p95_seconds']:.2f}" for row in rows],
            "of alone": [f"{row['of_alone']:.3f}" for row in rows],
            "samples/s, all ranks": [f"{n_ranks * row['samples_per_second']:.0f}" for row in rows],
        },
        left=("model", "step"),
    )


def show(document: dict[str, Any]) -> str:
    """Print the document as text."""
    lines = [gpu_machine.line(document["gpu"]), where(document)]
    lines += [
        f"{key}: {words}" for key, words in document["world"]["transport"].items() if key.startswith("vectors on")
    ]
    lines += ["", *table(document["results"], document["world"]["ranks"]), ""]
    lines += [f"{'PASS' if bar['passed'] else 'MISSED'}: {bar['bar']}: {bar['ratio']:.3f}" for bar in document["bars"]]
    return "\n".join(lines)


def options_of(arguments: Sequence[str] | None) -> tuple[list[str], Any]:
    """Parse the models and the other options.

    Raises:
        UsageError: What is no model.
    """
    parser = Parser(prog="python -m benchmarks.gpu.training", description="Training steps on a GPU. Run under mpirun.")
    parser.add_argument("--models", default=",".join(TASKS), help="separated by commas (default: %(default)s)")
    parser.add_argument("--transport", choices=TRANSPORTS, default="auto", help="of the vectors (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each candidate (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the JSON document only")
    options = parser.parse_args(arguments)
    names = [name.strip() for name in options.models.split(",")]
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        raise UsageError(f"--models {', '.join(unknown)}: choose from {', '.join(TASKS)}")
    if options.repeats < 1:
        raise UsageError(f"--repeats must be 1 or more, not {options.repeats}")
    return names, options


def main() -> int:
    """Run the benchmark and return the exit code. Collective."""
    problem = gpu_machine.problem()
    if problem:
        return fail(problem, on_all_ranks=True)
    try:
        names, options = options_of(None)
        world = init("cuda", options.transport)
    except UsageError as error:
        return fail(str(error), on_all_ranks=True)
    load_before = os.getloadavg()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    rows: list[dict[str, Any]] = []
    for name in names:
        task = TASKS[name]()
        training = Training(world, task, lambda: torch.cuda.synchronize(world.device))
        seconds = training.measure(options.repeats)
        training.close()
        rows += rows_of(name, task.n_samples, seconds)
    if world.rank == 0:
        document = {"results": rows, "bars": verdicts(rows, world.size), **info.describe(world)}
        document |= {"gpu": gpu_machine.describe(), "versions": gpu_machine.versions()}
        document["load_average"] = {"before": load_before, "after": os.getloadavg()}
        if not options.json:
            print(show(document))
        print(to_json(document), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
