"""Measure a training step beside the same step of one independent process and beside torch's distributed steps.

    jobs/local.sh 2 python -m benchmarks.training.steps [--model mlp|resnet20|gpt] [--repeats 9] [--json]

Every rank has the same random mini-batches of its own and float32 parameters; all ranks work at the same time:

    alone              torch.optim.SGD with momentum on every rank, which know nothing of each other: the limit
    allreduce          AllReduceSGD around the same optimizer; node_shared: with one copy of the parameters a node
    easgd, gossip      asynchronous, an exchange every tau steps
    DDP                DistributedDataParallel over gloo and the same optimizer
    PostLocalSGD       torch's PostLocalSGDOptimizer over gloo: averages the parameters every tau steps

The GPT reads tokens and is trained by AdamW, with all-reduce, EASGD, DiLoCo and DDP.

They take turns. In its turn each makes as many steps as its period, at least ``STEPS``, begun together; a figure is the
median over the turns of the slowest rank's seconds for a step.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

import mpitrain
from benchmarks.micro.candidates import start_gloo
from benchmarks.micro.timing import where
from mpitrain import models
from mpitrain.cli import info
from mpitrain.cli.options import Parser
from mpitrain.collectives.world.launch import init
from mpitrain.collectives.world.world import World
from mpitrain.report import text
from mpitrain.trainer.runfolder import to_json

STEPS = 10  # of a turn
BATCH, CLASSES, SHAPE = 64, 10, (3, 32, 32)
RATE, MOMENTUM = 1e-4, 0.9
MODELS = {"mlp": "mlp:hidden=1024x1024", "resnet20": "resnet20"}  # the MLP has 4.2 million parameters
MODELS["gpt"] = "gpt:layers=4,heads=4,width=128"  # 0.8 million parameters
GPT, SEQUENCES, CONTEXT, VOCABULARY = "gpt", 8, 128, 256
PERIODS = {"mlp": (1, 10, 100), "resnet20": (1, 10), GPT: (10,)}

# The project's bars, for 2 ranks and the MLP.
BAR_RANKS, BAR_MODEL = 2, "mlp"
GPT_SYNCHRONOUS_AT_MOST, GPT_PERIODIC_AT_MOST = 1.06, 1.03  # on 2 ranks, with AdamW
SYNCHRONOUS_AT_MOST, SHARED_AT_MOST, ASYNCHRONOUS_AT_MOST, DDP_AT_LEAST = 1.10, 1.05, 1.02, 3.0

Step = Callable[[], object]


class Bench:
    """The candidates for one model. Collective to create and to close.

    Args:
        world: The ranks.
        model: In ``MODELS``.
        with_gloo: Whether torch.distributed could be started.
    """

    def __init__(self, world: World, model: str, *, with_gloo: bool) -> None:
        self._world, self._model = world, model
        generator = torch.Generator().manual_seed(world.rank)
        self._batches = [(tokens_of if model == GPT else images_of)(generator) for _ in range(4)]
        self._base = adamw if model == GPT else sgd
        self._optimizers: list[mpitrain.DistributedOptimizer] = []
        self.steps: dict[str, Step] = {"alone": self._with_torch(self._new_model())}
        self.n_steps = {"alone": STEPS}
        self._add("allreduce", self._ours(mpitrain.AllReduceSGD()))
        for tau in PERIODS[model]:
            self._add(f"easgd, tau {tau}", self._ours(mpitrain.EASGD(period=tau)), tau)
        if model == GPT:
            self._add("diloco, tau 10", self._ours(mpitrain.DiLoCo(period=10)), 10)
        else:
            self._add("allreduce, node_shared", self._ours(mpitrain.AllReduceSGD(node_shared=True)))
            self._add("gossip, tau 1", self._ours(mpitrain.GossipSGD()))
        if with_gloo:
            self._add("DDP, gloo", self._with_torch(torch.nn.parallel.DistributedDataParallel(self._new_model())))
            if model != GPT:
                self._add("PostLocalSGD, tau 10", self._post_local(10), 10)

    def measure(self, n_repeats: int) -> dict[str, np.ndarray]:
        """Return the seconds per step of the slowest rank, (n_repeats,) per candidate. Collective."""
        seconds = {name: np.zeros(n_repeats) for name in self.steps}
        for repeat in range(-1, n_repeats):  # the first warms up
            for name, step in self.steps.items():
                step()
                self._world.barrier()
                began = time.perf_counter()
                for _ in range(self.n_steps[name]):
                    step()
                seconds[name][max(repeat, 0)] = (time.perf_counter() - began) / self.n_steps[name]
        for of_one in seconds.values():
            self._world.comm.Allreduce(MPI.IN_PLACE, of_one, MPI.MAX)
        return seconds

    def close(self) -> None:
        """Free the memory. Collective."""
        for optimizer in self._optimizers:
            optimizer.close()

    def _add(self, name: str, step: Step, period: int = 1) -> None:
        self.steps[name], self.n_steps[name] = step, -(-STEPS // period) * period

    def _new_model(self) -> torch.nn.Module:
        if self._model == GPT:
            return models.build(MODELS[GPT], shape=(CONTEXT,), n_classes=VOCABULARY, seed=0, on_tokens=True)
        return models.build(MODELS[self._model], shape=SHAPE, n_classes=CLASSES, seed=0)

    def _ours(self, method: Any) -> Step:
        model = self._new_model()
        optimizer = mpitrain.DistributedOptimizer(self._base(model), model, method, world=self._world)
        self._optimizers.append(optimizer)
        return step_of(model, optimizer, self._batches)

    def _with_torch(self, model: torch.nn.Module) -> Step:
        return step_of(model, self._base(model), self._batches)

    def _post_local(self, period: int) -> Step:
        from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
        from torch.distributed.optim import PostLocalSGDOptimizer

        model = self._new_model()
        averager = PeriodicModelAverager(period=period, warmup_steps=0)
        return step_of(model, PostLocalSGDOptimizer(optim=sgd(model), averager=averager), self._batches)


def images_of(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random images and their labels."""
    return torch.randn(BATCH, *SHAPE, generator=generator), torch.randint(CLASSES, (BATCH,), generator=generator)


def tokens_of(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random sequences of tokens and of answers."""
    x, y = torch.randint(VOCABULARY, (2, SEQUENCES, CONTEXT), generator=generator)
    return x, y


def step_of(model: torch.nn.Module, optimizer: Any, batches: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Step:
    """Return one step as a user would write it; the batches take turns."""
    model.train()
    in_turn = itertools.cycle(batches)

    def step() -> None:
        x, y = next(in_turn)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
        optimizer.step()

    return step


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Return the base optimizer of every candidate, for images."""
    return torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Return the base optimizer of every candidate, for tokens."""
    return torch.optim.AdamW(model.parameters(), lr=RATE)


def rows_of(model: str, seconds: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Return one row per candidate."""
    alone = float(np.median(seconds["alone"]))
    rows = []
    for name, of_one in seconds.items():
        row = {"model": model, "step": name, "median_seconds": float(np.median(of_one))}
        row |= {
            "p95_seconds": float(np.percentile(of_one, 95)),
            "of_alone": float(np.median(of_one / seconds["alone"])),
        }
        batch = SEQUENCES if model == GPT else BATCH
        rows.append(row | {"samples_per_second": batch / row["median_seconds"], "alone_seconds": alone})
    return rows


def verdicts(rows: list[dict[str, Any]], n_ranks: int) -> list[dict[str, Any]]:
    """Return the verdicts on the project's bars, if they apply to this run."""
    if n_ranks != BAR_RANKS:
        return []
    return [*_verdicts_of_mlp(rows), *_verdicts_of_gpt(rows)]


def _verdicts_of_gpt(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the verdicts on the steps of the GPT."""
    limits = {"allreduce": GPT_SYNCHRONOUS_AT_MOST, "easgd, tau 10": GPT_PERIODIC_AT_MOST}
    limits["diloco, tau 10"] = GPT_PERIODIC_AT_MOST
    found = []
    for row in rows:
        if row["model"] == GPT and row["step"] in limits:
            most, ratio = limits[row["step"]], row["of_alone"]
            bar = f"gpt: step of {row['step']} at most {most:.2f} x the step alone"
            found.append({"bar": bar, "ratio": ratio, "passed": ratio <= most})
    return found


def _verdicts_of_mlp(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the verdicts on the steps of the perceptron."""
    of = {row["step"]: row for row in rows if row["model"] == BAR_MODEL}
    if not of:
        return []
    synchronous, shared = of["allreduce"]["of_alone"], of["allreduce, node_shared"]["of_alone"]
    asynchronous = of["easgd, tau 10"]["of_alone"]
    bars = [
        {"bar": f"synchronous step at most {SYNCHRONOUS_AT_MOST:.2f} x the step alone", "ratio": synchronous}
        | {"passed": synchronous <= SYNCHRONOUS_AT_MOST},
        {"bar": f"synchronous step with node_shared at most {SHARED_AT_MOST:.2f} x the step alone", "ratio": shared}
        | {"passed": shared <= SHARED_AT_MOST},
        {"bar": f"asynchronous step at tau = 10 at most {ASYNCHRONOUS_AT_MOST:g} x the step alone"}
        | {"ratio": asynchronous, "passed": asynchronous <= ASYNCHRONOUS_AT_MOST},
    ]
    if "DDP, gloo" in of:
        faster = of["DDP, gloo"]["median_seconds"] / of["allreduce"]["median_seconds"]
        bar = f"synchronous step at least {DDP_AT_LEAST:g} x faster than DDP over gloo"
        bars.append({"bar": bar, "ratio": faster, "passed": faster >= DDP_AT_LEAST})
    return bars


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Format the rows as a table."""
    return text.table(
        {
            "model": [row["model"] for row in rows],
            "step": [row["step"] for row in rows],
            "median ms": [f"{1e3 * row['median_seconds']:.2f}" for row in rows],
            "p95 ms": [f"{1e3 * row['p95_seconds']:.2f}" for row in rows],
            "of alone": [f"{row['of_alone']:.3f}" for row in rows],
            "samples/s of a rank": [f"{row['samples_per_second']:.0f}" for row in rows],
        },
        left=("model", "step"),
    )


def main() -> int:
    """Run the benchmark and return the exit code. Collective."""
    parser = Parser(prog="python -m benchmarks.training.steps", description="Training steps. Run under mpirun or srun.")
    parser.add_argument("--model", choices=tuple(MODELS), action="append", help="repeat for more (default: all)")
    parser.add_argument("--repeats", type=int, default=9, help="turns of each candidate (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the JSON document only")
    options = parser.parse_args()
    world = init()
    load_before = os.getloadavg()
    no_gloo = start_gloo(world)
    rows: list[dict[str, Any]] = []
    for model in options.model or MODELS:
        bench = Bench(world, model, with_gloo=not no_gloo)
        # A step of the ResNet takes ten times as long, and varies less.
        seconds = bench.measure(options.repeats if model != "resnet20" else max(options.repeats // 3, 1))
        bench.close()
        rows += rows_of(model, seconds)
    if world.rank == 0:
        bars = verdicts(rows, world.size)
        document = {"results": rows, "bars": bars, "gloo": no_gloo or "available", **info.describe(world)}
        document["load_average"] = {"before": load_before, "after": os.getloadavg()}
        if not options.json:
            print(where(document))
            print(f"batch {BATCH} ({GPT}: {SEQUENCES} x {CONTEXT} tokens), float32, one thread a rank\n")
            print("\n".join([*table(rows), ""]))
            print(f"no gloo: {no_gloo}\n" if no_gloo else "", end="")
            for bar in bars:
                print(f"{'PASS' if bar['passed'] else 'MISSED'}: {bar['bar']}: {bar['ratio']:.3f}")
        print(to_json(document), flush=True)
    if not no_gloo:
        import torch.distributed

        torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
