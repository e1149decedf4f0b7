"""B15: asynchronous methods reach a loss first on few nodes, all-reduce on many.

Jin, Yuan, Iandola, Keutzer 2016, https://arxiv.org/abs/1611.04581, train a ResNet on ImageNet. There, elastic averaging
and gossip converge faster than all-reduce on up to about 32 nodes, above all while the learning rate is large.
All-reduce scales to more nodes, and ends at the lowest loss once the learning rate has decayed.

Here 4 to 512 simulated nodes train a classifier of digits. Messages take as long as those of a ResNet-18 (47 MB, in 32
shards) on 10 Gbit/s Ethernet, and a gradient takes 0.1 s. The three methods have mpitrain's default periods (gossip 1,
EASGD 10) and the best of two learning rates; with more than 32 nodes, they have the one that was best with 32. The
script compares the seconds, the gradients and the bytes until the training loss is 0.2, on this network ("base") and on
three others: a latency of 10 ms, 1 Gbit/s, and a quarter of the nodes three times slower ("stragglers"). In a last
experiment, all runs are equally long, and the learning rate is divided by 10 after half of the gradients.

    python -m benchmarks.reproduce.crossover [--quick] [--jobs 1] [--out DIR] [--json]
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.reproduce.digits import Network
from benchmarks.reproduce.figure import COLOURS, Outcome, panels, quick_parser
from benchmarks.reproduce.training import Cluster, Curve, train
from mpitrain.algorithms import EASGD, AllReduceSGD, GossipSGD
from mpitrain.algorithms.base.method import Method

METHODS: dict[str, Callable[[], Method]] = {"all-reduce": AllReduceSGD, "gossip": GossipSGD, "EASGD": EASGD}
WORKERS, QUICK_WORKERS = (4, 8, 16, 32, 64, 128, 256, 512), (4, 16, 64)
LEARNING_RATES = (1.4, 0.7)
TARGET, LONGEST_STEPS, POINTS = 0.2, 400, 200
BASE = Cluster(n_shards=32)
NETWORKS = {
    "base": BASE,
    "10 ms latency": replace(BASE, latency=10e-3),
    "1 Gbit/s": replace(BASE, bandwidth=0.125e9),
    "stragglers": replace(BASE, stragglers=0.25),
}
VARIED_WORKERS, QUICK_VARIED_WORKERS = (4, 16, 64), (4, 64)
TUNED_UP_TO = 32
DECAYED_WORKERS, DECAYED_STEPS = 32, 200
SECONDS = "ratio of all-reduce's seconds to those of the fastest asynchronous method"
AGAINST_FEW = (
    "on this network, an all-reduce takes only half of the time of a gradient. With the mean of all gradients, fewer "
    "steps reach the target, which saves more time than that. On 1 Gbit/s, EASGD is first"
)
AGAINST_MANY = (
    "the problem is easy. From 64 workers on, all-reduce needs 36 steps at any number of workers, so that a larger "
    "batch gains nothing. Gossip is faster because it does not wait for the slowest worker. Its consensus is the exact "
    "mean of all workers"
)
AGAINST_END = (
    "the runs are short, so that their last loss still depends on how fast it has fallen, and not on the noise. The "
    "mean of workers with different parameters is better than each of them"
)
"""Why results contradict the paper."""

Cost = tuple[float, float, float]
"""Seconds, gradients and gigabytes until the target is reached."""

Cell = tuple[str, int, str]
"""Network, workers and method."""


def seeds_of(n_workers: int) -> int:
    """Return the number of runs of a setting: few workers have more noise."""
    return 2 if n_workers <= TUNED_UP_TO else 1


def cost(method: Method, rate: float, n_workers: int, cluster: Cluster, longest: float = math.inf) -> Cost:
    """Return what a run costs until it reaches the target: the mean over seeds, infinity where one takes too long."""
    network, budget, found = Network(dtype=np.float32), n_workers * LONGEST_STEPS, []
    for seed in range(seeds_of(n_workers)):
        curve = train(
            network,
            method,
            rate,
            n_workers,
            budget,
            cluster=cluster,
            seed=seed,
            target=TARGET,
            longest_seconds=longest,
            points=POINTS,
        )
        found.append(curve.to(TARGET))
        if math.isinf(found[-1][0]):
            break
    seconds, gradients, gigabytes = (float(one) for one in np.mean(found, axis=0))
    return seconds, gradients, gigabytes


def best_cost(cell: Cell, rates: Sequence[float]) -> tuple[float, Cost]:
    """Return the learning rate with the fewest seconds, and what it costs."""
    key, n_workers, name = cell
    best, fewest = (rates[0], (math.inf,) * 3), math.inf
    for rate in rates:
        found = cost(METHODS[name](), rate, n_workers, NETWORKS[key], 2 * fewest)
        if found[0] < fewest:
            best, fewest = (rate, found), found[0]
    return best


class Here(Executor):
    """An executor that runs everything in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call the function."""
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def crossover(seconds: Mapping[str, Mapping[int, Cost]]) -> float:
    """Return the smallest number of workers from which on all-reduce is first, or infinity."""
    found = math.inf
    for n_workers in sorted(seconds["all-reduce"], reverse=True):
        if seconds["all-reduce"][n_workers][0] > min(seconds[name][n_workers][0] for name in METHODS):
            break
        found = n_workers
    return found


class Table:
    """The costs found so far, and the learning rates with which they were found.

    Args:
        outcome: The lines of the script.
    """

    def __init__(self, outcome: Outcome) -> None:
        self.costs: dict[str, dict[str, dict[int, Cost]]] = {key: {name: {} for name in METHODS} for key in NETWORKS}
        self.rates: dict[str, dict[int, float]] = {name: {} for name in METHODS}
        self._outcome = outcome
        outcome.say("network         workers  method       best lr    seconds  gradients   gigabytes")

    def fill(self, pool: Executor, cells: Sequence[Cell], tune: Collection[int]) -> None:
        """Compute cells, with the best learning rate of all for the numbers of workers in ``tune``."""
        for _, n_workers, name in cells:
            self.rates[name].setdefault(n_workers, self._rate_of(name, n_workers))
        rates = [LEARNING_RATES if cell[1] in tune else (self.rates[cell[2]][cell[1]],) for cell in cells]
        for (key, n_workers, name), (rate, found) in zip(cells, pool.map(best_cost, cells, rates), strict=True):
            self.rates[name][n_workers], self.costs[key][name][n_workers] = rate, found
            seconds, gradients, gigabytes = found
            self._outcome.say(
                f"{key:16}{n_workers:6}   {name:12}{rate:7g}{seconds:11.1f}{gradients:11.0f}{gigabytes:12.1f}"
            )

    def _rate_of(self, name: str, n_workers: int) -> float:
        """Return the learning rate of the most workers, up to this number, for which it is known."""
        known = [n for n in self.rates[name] if n <= n_workers]
        return self.rates[name][max(known)] if known else LEARNING_RATES[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    made = quick_parser(__doc__)
    made.add_argument("--jobs", type=int, default=1, help="runs at a time (default: %(default)s)")
    options = made.parse_args(arguments)
    outcome, network = Outcome("crossover", options), Network(dtype=np.float32)
    workers = QUICK_WORKERS if options.quick else WORKERS
    varied = QUICK_VARIED_WORKERS if options.quick else VARIED_WORKERS
    tuned = [n for n in workers if n <= TUNED_UP_TO]
    table = Table(outcome)
    with ProcessPoolExecutor(options.jobs) if options.jobs > 1 else Here() as pool:
        table.fill(pool, [("base", n, name) for n in tuned for name in METHODS], tuned)
        table.fill(pool, [("base", n, name) for n in workers if n > TUNED_UP_TO for name in METHODS], ())
        table.fill(pool, [(key, n, name) for key in NETWORKS if key != "base" for n in varied for name in METHODS], ())
    n_decayed = DECAYED_STEPS * DECAYED_WORKERS // (4 if options.quick else 1)
    decayed = {
        name: train(network, make(), 1.0, DECAYED_WORKERS, n_decayed, decay=[(0.5, 0.1)], points=20)
        for name, make in METHODS.items()
    }
    for name, curve in decayed.items():
        outcome.say(
            f"{DECAYED_WORKERS} workers, lr 1, then 0.1: {name:12} loss {curve.loss[-1]:.4f}, "
            f"error {curve.error[-1]:.2%}"
        )
    judge(outcome, table.costs, decayed)
    draw(outcome, table.costs)
    crossovers = {key: crossover(found) for key, found in table.costs.items()}
    return outcome.conclude(costs=table.costs, learning_rates=table.rates, crossover=crossovers)


def judge(outcome: Outcome, costs: Mapping[str, dict[str, dict[int, Cost]]], decayed: Mapping[str, Curve]) -> None:
    """Check the criteria of the published picture."""
    base = costs["base"]
    least, most = min(base["EASGD"]), max(base["EASGD"])

    def ahead(key: str, n_workers: int, name: str = "all-reduce") -> float:
        others = [costs[key][other][n_workers][0] for other in METHODS if other != name]
        return costs[key][name][n_workers][0] / min(others)

    outcome.criterion(
        f"{least} workers: an asynchronous method is first. Value: the {SECONDS}",
        ahead("base", least),
        ahead("base", least) > 1,
        contradicts=AGAINST_FEW,
    )
    outcome.criterion(
        f"{most} workers: all-reduce is first. Value: the {SECONDS}",
        ahead("base", most),
        ahead("base", most) < 1,
        contradicts=AGAINST_MANY,
    )
    gradients = max(base["all-reduce"][n][1] / base["EASGD"][n][1] for n in base["EASGD"])
    outcome.criterion(
        "all-reduce needs at most as many gradients as EASGD at every number of workers. Value: the largest ratio",
        gradients,
        gradients <= 1,
    )
    volume = max(base["EASGD"][n][2] / base["all-reduce"][n][2] for n in base["EASGD"])
    outcome.criterion(
        "EASGD sends fewer bytes than all-reduce at every number of workers. Value: the largest ratio",
        volume,
        volume < 1,
    )
    slow = [ahead(key, n) for key in ("1 Gbit/s", "stragglers") if key in costs for n in costs[key]["EASGD"]]
    outcome.criterion(
        f"1 Gbit/s, stragglers: an asynchronous method is always first. Value: the smallest {SECONDS}",
        min(slow, default=math.nan),
        min(slow, default=math.nan) > 1,
    )
    lowest = decayed["all-reduce"].loss[-1] / min(curve.loss[-1] for curve in decayed.values())
    outcome.criterion(
        "all-reduce has the lowest loss after the decay of the learning rate. Value: its loss, over the lowest one",
        lowest,
        lowest <= 1,
        contradicts=AGAINST_END,
    )


def draw(outcome: Outcome, costs: Mapping[str, dict[str, dict[int, Cost]]]) -> None:
    """Draw seconds, gradients and bytes over the workers, and the seconds relative to all-reduce on each network."""
    figure, grid = panels(4)
    for colour, marker, name in zip(COLOURS, "os^", METHODS, strict=False):
        base = costs["base"][name]
        for axes, k in zip(grid[0], range(3), strict=False):
            axes.plot(list(base), [base[n][k] for n in base], color=colour, marker=marker, label=name)
    for axes, words in zip(grid[0], ("seconds", "gradients", "gigabytes"), strict=False):
        axes.set_title(f"{words} to a loss of {TARGET}")
        axes.set_ylabel(words)
        axes.set_yscale("log")
    for colour, key in zip(COLOURS, NETWORKS, strict=False):
        found = costs[key]
        ratios = [
            min(found[x][n][0] for x in METHODS if x != "all-reduce") / s[0] for n, s in found["all-reduce"].items()
        ]
        grid[0, 3].plot(list(found["all-reduce"]), ratios, color=colour, marker="o", label=key)
    grid[0, 3].axhline(1, color="black", linewidth=0.8)
    grid[0, 3].set_title("best asynchronous / all-reduce, seconds")
    for axes in grid[0]:
        axes.set_xscale("log", base=2)
        axes.set_xlabel("workers")
        axes.legend(frameon=False, fontsize="small")
    outcome.save(figure)


if __name__ == "__main__":
    sys.exit(main())
