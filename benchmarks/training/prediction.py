"""How well the calibrated simulator predicts real runs.

    python -m benchmarks.training.prediction
    python -m benchmarks.training.prediction --hosts 2 --ranks 4,2    hosts of this machine (network/hosts.sh; root)

One run is made with the most ranks and calibrates the simulator; all others are predicted. Each figure is the simulated
time of a run over its measured time, and the total variation distance of the two staleness histograms. The last line is
one JSON document. The machine must be quiet: a rank that others interrupt takes longer than any simulation says.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.network.hosts import TOOLS, Cluster, missing
from mpitrain.trainer.calibration import total_variation

TOLERANCE = 0.15
"""The largest relative error of a predicted time that counts as agreement."""


def median_runs(
    cluster: Cluster, folder: Path, algorithm: str, ranks: Sequence[int], steps: int, repeats: int
) -> list[tuple[Path, dict[str, Any]]]:
    """Train several times on each number of real ranks, and return the folder and result of each median run.

    The numbers take turns, so that a machine that is slow for a while slows all of them down.
    """
    runs: list[list[tuple[Path, dict[str, Any]]]] = [[] for _ in ranks]
    for k in range(repeats):
        for number, n in enumerate(ranks):
            place = folder / f"{number}-{k}"
            runs[number].append((place, train(cluster, place, algorithm, n, steps)))
    return [sorted(of_n, key=lambda run: float(run[1]["seconds"]))[(repeats - 1) // 2] for of_n in runs]


def train(cluster: Cluster, folder: Path, algorithm: str, ranks: int, steps: int) -> dict[str, Any]:
    """Train on real ranks and return the result document."""
    words = [sys.executable, "-m", "mpitrain", "train", "--algorithm", algorithm]
    words += ["--gradients", str(ranks * steps), "--lr", "0.01"]  # in total, as in a simulation
    words += ["--evaluate-every", str(10 * steps), "--checkpoint-every", "0"]
    command, env = cluster.on_ranks(ranks, [*words, "--quiet", "--out", str(folder)], is_bound=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=env)
    document: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return document


def simulate(cluster: Cluster, calibration: Path, algorithm: str, ranks: int, gradients: int) -> dict[str, Any]:
    """Predict a run of as many ranks on the nodes of a cluster."""
    words = [sys.executable, "-m", "mpitrain", "simulate", "--calibrate", str(calibration), "--algorithm", algorithm]
    words += ["--workers", str(ranks), "--workers-per-node", str(ranks // cluster.n_hosts)]
    words += ["--cores", str(cluster.cores), "--gradients", str(gradients), "--lr", "0.01"]
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


def described(row: dict[str, Any]) -> str:
    """Return a line with a prediction."""
    line = "{algorithm:10} {ranks} ranks: {predicted_over_measured:.2f} of the measured time".format(**row)
    apart = row["staleness_distance"]
    return line if apart is None else f"{line}, staleness histograms {apart:.2f} apart"


def verdicts(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the verdict on each method: the predicted time of the run that is worst predicted."""
    bars = []
    for algorithm in dict.fromkeys(row["algorithm"] for row in rows):
        of_it = [row for row in rows if row["algorithm"] == algorithm]
        worst = max(of_it, key=lambda row: abs(row["predicted_over_measured"] - 1))
        ratio, where = worst["predicted_over_measured"], f" on {worst['hosts']} hosts" if worst["hosts"] > 1 else ""
        bar = f"simulated {algorithm}: predicted over measured time within {TOLERANCE:.0%} of 1"
        text = f"{ratio:.2f} with {worst['ranks']} ranks{where}"
        bars.append({"bar": bar, "ratio": ratio, "text": text, "passed": abs(ratio - 1) <= TOLERANCE})
    return bars


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=1, help="for the ranks, as many on each (default: this machine)")
    parser.add_argument("--algorithms", default="downpour,easgd,allreduce")
    parser.add_argument("--ranks", default="4,3,2", help="the first number calibrates")
    parser.add_argument("--steps", type=int, default=3000, help="of each rank on average (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs, of which the one with the median time counts")
    args = parser.parse_args(arguments)
    ranks = [int(n) for n in args.ranks.split(",")]
    if args.hosts < 1 or args.repeats < 1:
        parser.error("--hosts and --repeats must be 1 or more")
    uneven = [n for n in ranks if n % args.hosts]
    absent = missing(os.geteuid() == 0, {name: shutil.which(name) for name in TOOLS}) if args.hosts > 1 else None
    if uneven or absent:
        parser.error(absent or f"{uneven[0]} ranks cannot be divided evenly among {args.hosts} hosts")
    rows = []
    with tempfile.TemporaryDirectory() as temporary, Cluster(args.hosts) as cluster:
        for algorithm in args.algorithms.split(","):
            place, numbers = Path(temporary) / algorithm, [ranks[0], *ranks]
            (calibration, _), *runs = median_runs(cluster, place, algorithm, numbers, args.steps, args.repeats)
            for n, (folder, real) in zip(ranks, runs, strict=True):
                predicted = simulate(cluster, calibration, algorithm, n, real["gradients"])
                rows.append(
                    {
                        "algorithm": algorithm,
                        "hosts": args.hosts,
                        "ranks": n,
                        "measured_seconds": real["seconds"],
                        "predicted_seconds": predicted["seconds"],
                        "predicted_over_measured": predicted["seconds"] / real["seconds"],
                        "staleness_distance": distance(staleness_of(folder), predicted["staleness"]),
                    }
                )
                print(described(rows[-1]), flush=True)
    bars = verdicts(rows)
    for bar in bars:
        print(f"{'PASS' if bar['passed'] else 'MISSED'}: {bar['bar']}: {bar['text']}")
    print(json.dumps({"tolerance": TOLERANCE, "runs": rows, "bars": bars}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
