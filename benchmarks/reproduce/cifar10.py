"""B2, B11: On CIFAR-10, EAMSGD and LSGD have a lower test error than DOWNPOUR and EASGD after the same time.

Zhang et al. 2015, https://arxiv.org/abs/1412.6651, figure 2: with 4 workers, EAMSGD has the lowest test error at every
communication period. Teng et al. 2019, https://arxiv.org/abs/1905.10395: with 4 workers, LSGD has a lower test error
than EASGD after the same time. Both papers train convolutional networks on GPUs until the error no longer falls.

Here 4 real ranks train a network of 29,000 parameters with seven methods and three seeds, each run for a minute on
the cores of one machine (`benchmarks/compare.py`). Then the first run of each method calibrates `mpitrain simulate`,
which repeats this run with as many gradients. In the figure, measured runs are solid and simulated ones dashed.

    mpitrain data import images CIFAR10.tar.gz cifar10.h5
    python -m benchmarks.reproduce.cifar10 cifar10.h5 [--quick] [--again] [--out DIR] [--json]
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from benchmarks.reproduce.figure import COLOURS, Outcome, panels, quick_parser
from mpitrain.report.runs import Run, load_run

ALGORITHMS = ("allreduce", "gossip", "easgd", "eamsgd", "downpour", "lsgd", "sgp")
RANKS, SEEDS, BATCH_SIZE, LEARNING_RATE = 4, 3, 32, 0.05
SECONDS, QUICK_SECONDS, QUICK_SEEDS, TEST_SAMPLES, QUICK_TEST_SAMPLES = 60, 5, 1, 5000, 500
MODEL = "benchmarks.reproduce.cifar10:SmallNetwork"
LARGEST_SHOWN = 60
"""The largest test error of the figure, %: that of the starting point is 90."""

AXES = (("seconds", 1.0, "seconds"), ("gradients", 1.0, "gradients, all ranks"), ("bytes", 1e-9, "GB sent"))
TIME_TOLERANCE, ERROR_TOLERANCE = 0.15, 0.03
"""Of a simulated run: the largest relative error of its time, and the largest error of its test error."""


class SmallNetwork(nn.Module):
    """Two convolutions of 16 and 32 channels and one fully connected layer: 29,000 parameters for CIFAR-10.

    Args:
        shape: The shape of one input, (C, H, W).
        n_classes: The number of outputs.
    """

    def __init__(self, *, shape: tuple[int, ...], n_classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        self.layers = nn.Sequential(
            *(nn.Conv2d(channels, 16, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(32 * -(-height // 4) * -(-width // 4), n_classes)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map images (b, C, H, W) to logits (b, n_classes)."""
        logits: Tensor = self.layers(x)
        return logits


def compare(data: Path, out: Path, *, quick: bool) -> None:
    """Run the comparison on real ranks."""
    words = ["jobs/local.sh", str(RANKS), sys.executable, "benchmarks/compare.py", "--data", str(data)]
    words += ["--algorithms", ",".join(ALGORITHMS), "--model", MODEL, "--lr", str(LEARNING_RATE)]
    words += ["--batch-size", str(BATCH_SIZE), "--seeds", str(QUICK_SEEDS if quick else SEEDS)]
    words += ["--seconds", str(QUICK_SECONDS if quick else SECONDS), "--out", str(out)]
    words += ["--test-samples", str(QUICK_TEST_SAMPLES if quick else TEST_SAMPLES)]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


def simulate(data: Path, measured: Path, out: Path) -> None:
    """Repeat a run in the simulator, calibrated by this run."""
    run = load_run(measured)
    words = [sys.executable, "-m", "mpitrain", "simulate", "--calibrate", str(measured), "--data", str(data)]
    words += ["--algorithm", str(run.result["algorithm"]), "--model", MODEL, "--batch-size", str(BATCH_SIZE)]
    for name, value in run.result["settings"].items():
        words += [] if value is None else ["--set", f"{name}={value}"]
    lr = run.config["config"]["lr"]  # the comparison chooses the rate of each method from LEARNING_RATE
    words += ["--workers", str(RANKS), "--workers-per-node", str(RANKS), "--lr", str(lr)]
    words += ["--gradients", str(run.result["gradients"]), "--out", str(out)]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


def error_of(run: Run) -> float:
    """Return the test error at the end of a run, a fraction."""
    return 1.0 - float(run.result["test_accuracy"])


def draw(outcome: Outcome, measured: Mapping[str, Sequence[Run]], simulated: Mapping[str, Run]) -> None:
    """Draw the test error of the first seeds over seconds, gradients and bytes, measured and simulated."""
    figure, (grid,) = panels(len(AXES))
    for colour, name in zip([*COLOURS, "black"], measured, strict=False):
        for run, style in ((measured[name][0], "-"), (simulated[name], "--")):
            for axes, (column, factor, words) in zip(grid, AXES, strict=True):
                x, accuracy = run.curve("evaluation", column, "test_accuracy")
                axes.plot(factor * x, 100 * (1 - accuracy), style, color=colour, label=name if style == "-" else None)
                axes.set_xlabel(words)
                axes.set_ylabel("test error, %")
                axes.set_ylim(top=LARGEST_SHOWN)
    grid[0].legend(frameon=False, fontsize="small")
    outcome.save(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    parser = quick_parser(__doc__)
    parser.add_argument("data", type=Path, help="CIFAR-10 as an HDF5 file, made by mpitrain data import")
    parser.add_argument("--again", action="store_true", help="use the runs of an earlier call in --out")
    options = parser.parse_args(arguments)
    if not options.data.is_file():
        parser.error(f"{options.data} is not a file: make it by mpitrain data import")
    real, imagined = options.out / "cifar10" / "real", options.out / "cifar10" / "simulated"
    outcome = Outcome("cifar10", options, not_shown=("data", "again"))
    if not options.again:
        compare(options.data, real, quick=options.quick)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda name: simulate(options.data, real / f"{name}-0", imagined / name), ALGORITHMS))
    seeds = range(QUICK_SEEDS if options.quick else SEEDS)
    measured = {name: [load_run(real / f"{name}-{seed}") for seed in seeds] for name in ALGORITHMS}
    return conclude(outcome, measured, {name: load_run(imagined / name) for name in ALGORITHMS})


def conclude(outcome: Outcome, measured: Mapping[str, Sequence[Run]], simulated: Mapping[str, Run]) -> int:
    """Print a table and the criteria, draw the figure, and return the exit code."""
    errors = {name: [error_of(run) for run in runs] for name, runs in measured.items()}
    mean = {name: float(np.mean(found)) for name, found in errors.items()}
    outcome.say(
        "             test error: mean  std   gradients     MB    first run: seconds simulated   error simulated"
    )
    rows: dict[str, dict[str, Any]] = {}
    for name, runs in measured.items():
        first, forecast = runs[0].result, simulated[name].result
        seconds, predicted = float(first["seconds"]), float(forecast["seconds"])
        rows[name] = {
            "errors": errors[name],
            "gradients": [int(run.result["gradients"]) for run in runs],
            "bytes": [int(run.result["bytes_sent"]) for run in runs],
            "seconds": seconds,
            "simulated_seconds": predicted,
            "simulated_error": error_of(simulated[name]),
        }
        outcome.say(
            f"{name:10}{mean[name]:17.1%}{np.std(errors[name]):6.1%}{np.mean(rows[name]['gradients']):12.0f}"
            f"{np.mean(rows[name]['bytes']) / 1e6:9.0f}{seconds:17.1f}{predicted:11.1f}{errors[name][0]:9.1%}"
            f"{rows[name]['simulated_error']:10.1%}"
        )
    outcome.criterion("every method has learned: the largest mean test error is below 0.6", max(mean.values()),
                      max(mean.values()) < 0.6)  # fmt: skip
    lead = mean["downpour"] - mean["eamsgd"]
    outcome.criterion(
        "EAMSGD has at most the mean test error of DOWNPOUR. Value: DOWNPOUR's less EAMSGD's", lead, lead >= 0
    )
    lead = mean["easgd"] - mean["lsgd"]
    outcome.criterion(
        "LSGD has at most the mean test error of EASGD. Value: EASGD's less LSGD's",
        lead,
        lead >= 0,
        contradicts="the learning rate is constant and the mini-batches are small, so that noise dominates the error: "
        "EASGD's center is an average of all workers over time, whereas the workers of LSGD follow a leader that the "
        "losses of a few mini-batches choose",
    )
    off = max(abs(row["simulated_seconds"] / row["seconds"] - 1) for row in rows.values())
    outcome.criterion(
        "simulated runs take the measured time within 15 %. Value: the largest deviation", off, off <= TIME_TOLERANCE
    )
    off = max(abs(row["simulated_error"] - row["errors"][0]) for row in rows.values())
    outcome.criterion(
        "simulated runs have the measured test error within 0.03. Value: the largest deviation", off,
        off <= ERROR_TOLERANCE,
    )  # fmt: skip
    draw(outcome, measured, simulated)
    return outcome.conclude(rows=rows)


if __name__ == "__main__":
    sys.exit(main())
