"""How well the calibrated simulator predicts real runs: ``python -m benchmarks.training.prediction``.

One run is made with the most ranks and calibrates the simulator; all others are predicted. Each figure is the simulated
time of a run over its measured time, and the total variation distance of the two staleness histograms. The last line is
one JSON document. The machine must be quiet: a rank that others interrupt takes longer than any simulation says.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpitrain.trainer.calibration import total_variation

TOLERANCE = 0.15
"""The largest relative error of a predicted time that counts as agreement."""


def train(launcher: str, folder: Path, algorithm: str, ranks: int, steps: int) -> dict[str, Any]:
    """Train on real ranks and return the result document."""
    words = [launcher, str(ranks), sys.executable, "-m", "mpitrain", "train", "--algorithm", algorithm]
    words += ["--steps", str(steps), "--lr", "0.01", "--evaluate-every", str(10 * steps), "--checkpoint-every", "0"]
    subprocess.run([*words, "--quiet", "--out", str(folder)], check=True, stdout=subprocess.DEVNULL)
    document: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return document


def simulate(calibration: Path, algorithm: str, ranks: int, gradients: int) -> dict[str, Any]:
    """Predict a run of as many ranks on one node."""
    words = [sys.executable, "-m", "mpitrain", "simulate", "--calibrate", str(calibration), "--algorithm", algorithm]
    words += ["--workers", str(ranks), "--workers-per-node", str(ranks), "--gradients", str(gradients), "--lr", "0.01"]
    done = subprocess.run([*words, "--evaluations", "1", "--json"], check=True, stdout=subprocess.PIPE, text=True)
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return document


def staleness_of(folder: Path) -> list[float]:
    """Return the staleness histogram of a run, summed over its ranks."""
    from mpitrain.records.metrics import read_metrics

    found: list[float] = read_metrics(folder / "metrics.h5")["staleness"]["histogram"][-1].tolist()
    return found


def distance(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Return the total variation distance of two histograms; None if one of them is empty."""
    if not sum(one) or not sum(other):
        return None
    return total_variation([n / sum(one) for n in one], [n / sum(other) for n in other])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--launcher", default="jobs/local.sh", help="script that starts N ranks of a command")
    parser.add_argument("--algorithms", default="downpour,easgd,allreduce")
    parser.add_argument("--ranks", default="4,3,2", help="the first number calibrates")
    parser.add_argument("--steps", type=int, default=3000)
    args = parser.parse_args(arguments)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for algorithm in args.algorithms.split(","):
            calibration = Path(temporary) / f"{algorithm}-calibration"
            ranks = [int(n) for n in args.ranks.split(",")]
            train(args.launcher, calibration, algorithm, ranks[0], args.steps)
            for n in ranks:
                folder = Path(temporary) / f"{algorithm}-{n}"
                real = train(args.launcher, folder, algorithm, n, args.steps)
                predicted = simulate(calibration, algorithm, n, real["gradients"])
                rows.append(
                    {
                        "algorithm": algorithm,
                        "ranks": n,
                        "measured_seconds": real["seconds"],
                        "predicted_seconds": predicted["seconds"],
                        "predicted_over_measured": predicted["seconds"] / real["seconds"],
                        "staleness_distance": distance(staleness_of(folder), predicted["staleness"]),
                    }
                )
                print(
                    "{algorithm:10} {ranks} ranks: {predicted_over_measured:.2f} of the measured time".format(
                        **rows[-1]
                    )
                )
    agree = sum(abs(row["predicted_over_measured"] - 1) <= TOLERANCE for row in rows)
    print(f"{agree} of {len(rows)} predictions are within {TOLERANCE:.0%}")
    print(json.dumps({"tolerance": TOLERANCE, "runs": rows, "agree": agree}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
