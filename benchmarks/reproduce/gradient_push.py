"""B22, B23: on a slow network, a step of SGP takes the same time at any number of nodes, and stragglers cost SGP less.

Assran, Loizou, Ballas, Rabbat 2019, https://arxiv.org/abs/1811.10792, train a ResNet-50 on 4 to 32 nodes with 10 Gbit/s
Ethernet. The more nodes there are, the longer a step of all-reduce SGD takes. A step of stochastic gradient push (SGP)
does not take longer, since each node sends to one other node. SGP is a little less accurate with many nodes. Overlapped
SGP (OSGP) does not wait for late messages.

Here simulated nodes train a classifier of digits, with messages of the size of a ResNet-18 (47 MB), on 1 Gbit/s with a
latency of 10 ms. A gradient takes 0.1 s. The length of a step varies by a log-normal factor: with s = 0.1 on the
"steady" cluster, and with s = 0.6 on the cluster with "stragglers". Losses and errors are those of the consensus, after
the same number of steps for all methods.

    python -m benchmarks.reproduce.gradient_push [--quick] [--out DIR] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from benchmarks.reproduce.digits import Network
from benchmarks.reproduce.figure import COLOURS, DASHES, Outcome, panels, quick_parser
from benchmarks.reproduce.training import Cluster, Curve, train
from mpitrain.algorithms import AllReduceSGD
from mpitrain.algorithms.base.method import Method
from mpitrain.algorithms.gossip.sgp import StochasticGradientPush

METHODS: dict[str, Callable[[], Method]] = {
    "all-reduce": AllReduceSGD,
    "SGP": StochasticGradientPush,
    "OSGP": lambda: StochasticGradientPush(overlap=2),
}
WORKERS, QUICK_WORKERS = (4, 8, 16, 32, 64), (4, 32)
STEPS, QUICK_STEPS, LEARNING_RATE, POINTS = 100, 40, 0.5, 20
STEADY = Cluster(bandwidth=0.125e9, latency=10e-3)
CLUSTERS = {"steady": STEADY, "stragglers": replace(STEADY, jitter=0.6)}

Runs = dict[str, dict[str, dict[int, Curve]]]
"""Curves by cluster, method and number of workers."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    options = quick_parser(__doc__).parse_args(arguments)
    workers, steps = (QUICK_WORKERS, QUICK_STEPS) if options.quick else (WORKERS, STEPS)
    outcome, network = Outcome("gradient_push", options), Network(dtype=np.float32)
    found: Runs = {key: {name: {} for name in METHODS} for key in CLUSTERS}
    outcome.say("workers   cluster      method       seconds per step   training loss   test error")
    for n_workers in workers:
        for key, cluster in CLUSTERS.items():
            for name, make in METHODS.items():
                curve = train(
                    network, make(), LEARNING_RATE, n_workers, steps * n_workers, cluster=cluster, points=POINTS
                )
                found[key][name][n_workers] = curve
                outcome.say(
                    f"{n_workers:7}   {key:13}{name:12}{curve.seconds[-1] / steps:17.3f}{curve.loss[-1]:16.4f}"
                    f"{curve.error[-1]:13.2%}"
                )
    judge(outcome, found)
    draw(outcome, found, steps)
    cells = [
        {"cluster": key, "method": name, "workers": n, "seconds": curve.seconds[-1] / steps, "loss": curve.loss[-1]}
        for key, methods in found.items()
        for name, curves in methods.items()
        for n, curve in curves.items()
    ]
    return outcome.conclude(cells=cells, steps=steps)


def judge(outcome: Outcome, found: Runs) -> None:
    """Check the criteria of the published picture."""
    steady, slowed = found["steady"], found["stragglers"]
    least, most = min(steady["SGP"]), max(steady["SGP"])

    def growth(curves: Mapping[int, Curve]) -> float:
        return float(curves[most].seconds[-1] / curves[least].seconds[-1])

    outcome.criterion(
        f"SGP: seconds per step grow by a factor below 1.25 from {least} to {most} workers. Value: the factor",
        growth(steady["SGP"]),
        growth(steady["SGP"]) < 1.25,
    )
    outcome.criterion(
        f"all-reduce: seconds per step grow by a factor above 1.5 from {least} to {most} workers. Value: the factor",
        growth(steady["all-reduce"]),
        growth(steady["all-reduce"]) > 1.5,
        contradicts="the simulated all-reduce chooses recursive halving and doubling, whose latency grows only with "
        "the logarithm of the number of nodes, and messages of different nodes never share a link",
    )
    ratio = steady["SGP"][most].seconds[-1] / steady["all-reduce"][most].seconds[-1]
    outcome.criterion(
        f"{most} workers: a step of SGP is shorter than one of all-reduce. Value: the ratio", ratio, ratio < 1
    )
    gaps = {n: steady["SGP"][n].loss[-1] / steady["all-reduce"][n].loss[-1] for n in steady["SGP"]}
    outcome.criterion(
        f"{most} workers: after equally many steps, SGP's loss is at most 25 % above all-reduce's. Value: the ratio",
        gaps[most],
        gaps[most] <= 1.25,
    )
    cost = {name: slowed[name][most].seconds[-1] - steady[name][most].seconds[-1] for name in METHODS}
    for name in ("SGP", "OSGP"):
        ratio = cost[name] / cost["all-reduce"]
        outcome.criterion(f"stragglers cost {name} fewer seconds than all-reduce. Value: the ratio", ratio, ratio < 1)


def draw(outcome: Outcome, found: Runs, steps: int) -> None:
    """Draw the time of a step and the loss over workers."""
    figure, ((left, right),) = panels(2)
    for key, dash in zip(CLUSTERS, DASHES, strict=False):
        for colour, name in zip(COLOURS, METHODS, strict=False):
            curves, style = found[key][name], {"color": colour, "linestyle": dash, "marker": "o"}
            seconds = [curve.seconds[-1] / steps for curve in curves.values()]
            left.plot(list(curves), seconds, label=f"{name}, {key}", **style)
            if key == "steady":
                right.plot(list(curves), [curve.loss[-1] for curve in curves.values()], label=name, **style)
    left.set_ylabel("seconds per step")
    right.set_ylabel(f"training loss after {steps} steps")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("workers")
        axes.legend(frameon=False, fontsize="small")
    outcome.save(figure)


if __name__ == "__main__":
    sys.exit(main())
