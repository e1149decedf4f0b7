"""B11, B12, B14: LSGD is ahead of EASGD at first, every worker leads about as often, and LSGD sends half of the bytes.

Teng et al. 2019, https://arxiv.org/abs/1905.10395: with 4, 12 and 16 workers, LSGD reaches middling test errors in less
time than EASGD. The leader changes constantly, and each worker leads a similar number of times. A pull reads one
vector, whereas an elastic exchange moves two.

Here simulated workers train a classifier of digits, and draw their samples from the same distribution. Both methods
exchange every 10 steps, and have the best of the same learning rates. The middling target is a training loss of 0.5. At
every pull of another run, the script records which worker leads. A chi-square test at 1 % compares these counts with
equal chances.

    python -m benchmarks.reproduce.leaders [--quick] [--out DIR] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.stats import chi2

from benchmarks.reproduce.digits import Network
from benchmarks.reproduce.figure import COLOURS, Outcome, panels, quick_parser
from benchmarks.reproduce.training import Curve, mean_curve, train
from mpitrain.algorithms import EASGD, LSGD
from mpitrain.algorithms.base.method import Method
from mpitrain.simulation.engine import Simulation

PERIOD, PULL = 10, 0.3
METHODS: dict[str, Callable[[int], Method]] = {
    "LSGD": lambda n: LSGD(period=PERIOD, pull=PULL, global_pull=0.0, group_size=n, synchronous=True),
    "EASGD": lambda n: EASGD(period=PERIOD, synchronous=True),
}
WORKERS, QUICK_WORKERS = (4, 16), (4, 16)
LEARNING_RATES = (1.0, 0.3)
TARGET, STEPS, POINTS, SEEDS = 0.5, 150, 75, 3
LEADING_WORKERS, LEADING_STEPS, LEADING_RATE = 8, 1600, 0.1
SIGNIFICANCE = 0.01


def curve_of(network: Network, make: Callable[[int], Method], n_workers: int, n_seeds: int) -> Curve:
    """Return the mean curve at the learning rate that reaches the target after the fewest gradients."""
    tried = []
    for rate in LEARNING_RATES:
        curves = [
            train(network, make(n_workers), rate, n_workers, STEPS * n_workers, seed=seed, points=POINTS)
            for seed in range(n_seeds)
        ]
        tried.append(mean_curve(curves))
    return min(tried, key=lambda curve: curve.to(TARGET)[1])


def times_led(network: Network, steps: int) -> np.ndarray:
    """Return how often each worker led, (workers,)."""
    led: list[float] = []

    def count(simulation: Simulation) -> None:
        led.extend(worker.metrics()["leads"] for worker in simulation.workers)

    train(
        network,
        METHODS["LSGD"](LEADING_WORKERS),
        LEADING_RATE,
        LEADING_WORKERS,
        steps * LEADING_WORKERS,
        points=1,
        at_end=count,
    )
    return np.array(led)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    options = quick_parser(__doc__).parse_args(arguments)
    outcome, network = Outcome("leaders", options), Network(dtype=np.float32)
    workers, n_seeds = (QUICK_WORKERS, 1) if options.quick else (WORKERS, SEEDS)
    found = {n: {name: curve_of(network, make, n, n_seeds) for name, make in METHODS.items()} for n in workers}
    outcome.say(f"to a training loss of {TARGET}")
    outcome.say("workers   method    gradients    seconds   MB per exchange of a worker")
    volume: dict[str, float] = {}
    for n_workers, curves in found.items():
        for name, curve in curves.items():
            seconds, gradients, _ = curve.to(TARGET)
            volume[name] = float(curve.gigabytes[-1]) * 1e3 / (n_workers * (STEPS // PERIOD))
            outcome.say(f"{n_workers:7}   {name:8}{gradients:11.0f}{seconds:11.1f}{volume[name]:16.1f}")
    led = times_led(network, LEADING_STEPS // (2 if options.quick else 1))
    statistic = float(((led - led.mean()) ** 2 / led.mean()).sum())
    chance = float(chi2.sf(statistic, led.size - 1))
    outcome.say()
    outcome.say(f"times that each of {led.size} workers led: {', '.join(f'{n:.0f}' for n in led)}")
    outcome.say(f"chi-square {statistic:.1f} with {led.size - 1} degrees of freedom, p = {chance:.3f}")
    for n_workers, curves in found.items():
        ratio = curves["LSGD"].to(TARGET)[1] / curves["EASGD"].to(TARGET)[1]
        outcome.criterion(
            f"{n_workers} workers: LSGD needs at most as many gradients as EASGD. Value: the ratio", ratio, ratio <= 1
        )
    outcome.criterion(
        "the test at 1 % does not reject equal chances to lead. Value: the p-value", chance, chance > SIGNIFICANCE
    )
    half = volume["LSGD"] / volume["EASGD"]
    outcome.criterion(
        "bytes of an exchange: LSGD sends 0.4 to 0.55 times as many as EASGD. Value: the ratio",
        half,
        0.4 <= half <= 0.55,
    )
    draw(outcome, found, led)
    to_target = {name: {n: found[n][name].to(TARGET) for n in found} for name in METHODS}
    return outcome.conclude(to_target=to_target, led=led, chance=chance, megabytes=volume)


def draw(outcome: Outcome, found: Mapping[int, Mapping[str, Curve]], led: np.ndarray) -> None:
    """Draw losses over gradients for each number of workers, and the leaders."""
    figure, (grid,) = panels(len(found) + 1)
    for axes, (n_workers, curves) in zip(grid, found.items(), strict=False):
        for colour, (name, curve) in zip(COLOURS, curves.items(), strict=False):
            axes.plot(curve.gradients, curve.loss, color=colour, label=name)
        axes.axhline(TARGET, color="black", linewidth=0.8)
        axes.set_title(f"{n_workers} workers")
        axes.set_xlabel("gradients, all workers")
        axes.set_ylabel("training loss")
        axes.set_yscale("log")
        axes.legend(frameon=False)
    grid[-1].bar(range(led.size), led, color=COLOURS[0])
    grid[-1].axhline(led.mean(), color="black", linewidth=0.8)
    grid[-1].set_xlabel("worker")
    grid[-1].set_ylabel("times it led")
    outcome.save(figure)


if __name__ == "__main__":
    sys.exit(main())
