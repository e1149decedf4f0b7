"""Zhang's tree: with one center on one server, many workers wait; a tree of centers keeps them computing.

Zhang's thesis 2016, https://arxiv.org/abs/1605.02216, chapter 6, proposes the EASGD Tree for hundreds of workers. Its
advantage is that no node has more than a few neighbours. Its challenge is that changes take longer to reach the root.

Here the center of EASGD is a single shard on one of 16 to 64 simulated nodes. The tree has 16 children per node, and
exchanges above the leaves every 100 steps. With both, a worker exchanges with its center every 10 steps. Messages take
as long as those of a ResNet-18 (47 MB) on 10 Gbit/s Ethernet. By default, mpitrain divides the center of a large model
into shards on all nodes; the rows "EASGD, sharded" show this.

    python -m benchmarks.reproduce.tree_contention [--quick] [--out DIR] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from benchmarks.reproduce.digits import Network
from benchmarks.reproduce.figure import COLOURS, Outcome, panels, quick_parser
from benchmarks.reproduce.training import Cluster, Curve, train
from mpitrain.algorithms import EASGD
from mpitrain.algorithms.base.method import Method
from mpitrain.algorithms.elastic.easgd_tree import EASGDTree

WORKERS, QUICK_WORKERS = (16, 32, 64), (16, 64)
STEPS, LEARNING_RATE, POINTS = 200, 1.0, 10
SHARDED = Cluster()
SINGLE = replace(SHARDED, n_shards=1)
CASES: dict[str, tuple[Callable[[], Method], Cluster]] = {
    "EASGD, one server": (EASGD, SINGLE),
    "EASGD Tree": (lambda: EASGDTree(degree=16), SINGLE),
    "EASGD, sharded": (EASGD, SHARDED),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    options = quick_parser(__doc__).parse_args(arguments)
    outcome, network = Outcome("tree_contention", options), Network(dtype=np.float32)
    workers = QUICK_WORKERS if options.quick else WORKERS
    found: dict[str, dict[int, Curve]] = {name: {} for name in CASES}
    outcome.say("workers   method               computing   seconds per step   loss after 200 steps")
    for n_workers in workers:
        for name, (make, cluster) in CASES.items():
            curve = train(network, make(), LEARNING_RATE, n_workers, STEPS * n_workers, cluster=cluster, points=POINTS)
            found[name][n_workers] = curve
            outcome.say(
                f"{n_workers:7}   {name:20}{curve.computing:10.0%}{curve.seconds[-1] / STEPS:18.3f}"
                f"{curve.loss[-1]:23.4f}"
            )
    judge(outcome, found)
    draw(outcome, found)
    cells = [
        {
            "method": name,
            "workers": n,
            "computing": curve.computing,
            "seconds": curve.seconds[-1],
            "loss": curve.loss[-1],
        }
        for name, curves in found.items()
        for n, curve in curves.items()
    ]
    return outcome.conclude(cells=cells)


def judge(outcome: Outcome, found: Mapping[str, Mapping[int, Curve]]) -> None:
    """Check the criteria of the published picture."""
    flat, tree = found["EASGD, one server"], found["EASGD Tree"]
    least, most = min(flat), max(flat)
    lost = flat[most].computing / flat[least].computing
    outcome.criterion(
        f"one server: the share of computation halves from {least} to {most} workers. Value: the ratio",
        lost,
        lost < 0.5,
    )
    share = tree[most].computing / tree[least].computing
    outcome.criterion(
        f"tree: the share of computation falls by at most 20 % from {least} to {most} workers. Value: the ratio",
        share,
        share >= 0.8,
    )
    ratio = tree[most].loss[-1] / flat[most].loss[-1]
    outcome.criterion(
        "the challenge: after equally many gradients, the root's loss is above the center's. Value: the ratio",
        ratio,
        ratio > 1,
    )


def draw(outcome: Outcome, found: Mapping[str, Mapping[int, Curve]]) -> None:
    """Draw the share of computation over workers, and the loss over time at the most workers."""
    figure, ((left, right),) = panels(2)
    for colour, (name, curves) in zip(COLOURS, found.items(), strict=False):
        left.plot(list(curves), [100 * curve.computing for curve in curves.values()], "o-", color=colour, label=name)
        curve = curves[max(curves)]
        right.plot(curve.seconds, curve.loss, color=colour, label=name)
    left.set_xscale("log", base=2)
    left.set_xlabel("workers")
    left.set_ylabel("share of computation, %")
    right.set_title(f"{max(next(iter(found.values())))} workers")
    right.set_xlabel("virtual seconds")
    right.set_ylabel("training loss of the center")
    right.set_yscale("log")
    left.legend(frameon=False)
    outcome.save(figure)


if __name__ == "__main__":
    sys.exit(main())
