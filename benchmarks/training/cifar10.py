"""CIFAR-10 with seven methods on 4 real ranks, and the same curves from the calibrated simulator.

    mpitrain data import images CIFAR10.tar.gz cifar10.h5      an archive of class folders

    python -m benchmarks.training.cifar10 cifar10.h5 [--quick] [--out runs/cifar10]

It takes about an hour on two cores, or minutes with ``--quick``. The comparison of real ranks is that of
``benchmarks/compare.py``: the same time for each run, three seeds. Each method's first run then calibrates
``mpitrain simulate``, which repeats it with as many gradients. The figure has the test error over seconds, gradients
and bytes: measured runs are solid, simulated ones dashed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from benchmarks.reproduce.figure import COLOURS, panels
from mpitrain.report.runs import Run, load_run

ALGORITHMS = ("allreduce", "gossip", "easgd", "eamsgd", "downpour", "lsgd", "sgp")
RANKS, SEEDS, BATCH_SIZE, LEARNING_RATE = 4, 3, 32, 0.05
SECONDS, QUICK_SECONDS, QUICK_SEEDS, TEST_SAMPLES, QUICK_TEST_SAMPLES = 150, 5, 1, 5000, 500
MODEL = "benchmarks.training.cifar10:SmallNetwork"
AXES = (("seconds", 1.0, "seconds"), ("gradients", 1.0, "gradients, all ranks"), ("bytes", 1e-9, "GB sent"))


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


def compare(data: Path, out: Path, *, quick: bool) -> dict[str, Any]:
    """Run the comparison on real ranks; return its document."""
    words = ["jobs/local.sh", str(RANKS), sys.executable, "benchmarks/compare.py", "--data", str(data)]
    words += ["--algorithms", ",".join(ALGORITHMS), "--model", MODEL, "--lr", str(LEARNING_RATE)]
    words += ["--batch-size", str(BATCH_SIZE), "--seeds", str(QUICK_SEEDS if quick else SEEDS)]
    words += ["--seconds", str(QUICK_SECONDS if quick else SECONDS), "--out", str(out)]
    words += ["--test-samples", str(QUICK_TEST_SAMPLES if quick else TEST_SAMPLES)]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    document: dict[str, Any] = json.loads((out / "compare.json").read_text())
    return document


def simulate(data: Path, run: Run, measured: Path, out: Path) -> Run:
    """Repeat a run in the simulator, calibrated by this run."""
    words = [sys.executable, "-m", "mpitrain", "simulate", "--calibrate", str(measured), "--data", str(data)]
    words += ["--algorithm", str(run.result["algorithm"]), "--model", MODEL, "--batch-size", str(BATCH_SIZE)]
    for name, value in run.result["settings"].items():
        words += [] if value is None else ["--set", f"{name}={value}"]
    lr = run.config["config"]["lr"]  # the comparison chooses the rate of each method from LEARNING_RATE
    words += ["--workers", str(RANKS), "--workers-per-node", str(RANKS), "--lr", str(lr)]
    words += ["--gradients", str(run.result["gradients"]), "--out", str(out)]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return load_run(out)


def draw(measured: Mapping[str, Sequence[Run]], simulated: Mapping[str, Run], path: Path) -> None:
    """Draw the test error of the first seeds over seconds, gradients and bytes, measured and simulated."""
    figure, (grid,) = panels(len(AXES))
    for colour, name in zip([*COLOURS, "black"], measured, strict=False):
        for run, style in ((measured[name][0], "-"), (simulated[name], "--")):
            for axes, (column, factor, words) in zip(grid, AXES, strict=True):
                x, accuracy = run.curve("evaluation", column, "test_accuracy")
                axes.plot(factor * x, 100 * (1 - accuracy), style, color=colour, label=name if style == "-" else None)
                axes.set_xlabel(words)
                axes.set_ylabel("test error, %")
    grid[0].legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=130)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison and the simulations, print a table and the document; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path, help="CIFAR-10 as an HDF5 file, made by mpitrain data import")
    parser.add_argument("--quick", action="store_true", help="runs of a few seconds, one seed")
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10"), help="folder of the runs (%(default)s)")
    options = parser.parse_args(arguments)
    if not options.data.is_file():
        parser.error(f"{options.data} is not a file: make it by mpitrain data import")
    real, imagined = options.out / "real", options.out / "simulated"
    compared = compare(options.data, real, quick=options.quick)
    n_seeds = QUICK_SEEDS if options.quick else SEEDS
    measured = {name: [load_run(real / f"{name}-{seed}") for seed in range(n_seeds)] for name in ALGORITHMS}
    simulated = {
        name: simulate(options.data, runs[0], real / f"{name}-0", imagined / name) for name, runs in measured.items()
    }
    print("method       test error   seconds   predicted seconds   predicted error")
    rows = []
    for name, runs in measured.items():
        first, forecast = runs[0].result, simulated[name].result
        error = float(np.mean([1 - run.result["test_accuracy"] for run in runs]))
        rows.append(
            {
                "algorithm": name,
                "test_error": error,
                "seconds": first["seconds"],
                "gradients": first["gradients"],
                "predicted_seconds": forecast["seconds"],
                "predicted_error": 1 - forecast["test_accuracy"],
            }
        )
        print(
            f"{name:10}{error:13.2%}{first['seconds']:10.1f}{forecast['seconds']:20.1f}"
            f"{1 - forecast['test_accuracy']:18.2%}"
        )
    draw(measured, simulated, options.out / "cifar10.png")
    print(json.dumps({"rows": rows, "settings": compared["settings"], "figure": str(options.out / "cifar10.png")}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
