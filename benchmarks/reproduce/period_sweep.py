"""B1: with long communication periods, DOWNPOUR becomes unstable; EASGD and EAMSGD do not.

Zhang, Choromanska, LeCun 2015, https://arxiv.org/abs/1412.6651, figure 2: 4 workers exchange every tau = 1, 4, 16 or 64
steps, with the best of a few learning rates for each method and period. Here the workers are simulated. They step in a
random order, and train a network of one hidden layer on the digits of scikit-learn. The script compares the loss of the
center on all training samples after a fixed number of gradients.

    python -m benchmarks.reproduce.period_sweep [--steps 640] [--seeds 1] [--out runs/reproduce] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.reproduce.digits import MiniBatches, Network
from benchmarks.reproduce.figure import COLOURS, Outcome, panels, parser
from mpitrain.algorithms import METHODS
from mpitrain.simulation.engine import Simulation
from mpitrain.simulation.schedules import RandomOrder
from mpitrain.simulation.world import SimulatedWorld

Array = NDArray[np.float64]

WORKERS, PERIODS = 4, (1, 4, 16, 64)
# DOWNPOUR's center takes the steps of all workers in full, so its learning rates are smaller by a factor of 4 to 8;
# momentum 0.99 makes EAMSGD's steps long.
LEARNING_RATES = {"downpour": (0.1, 0.02, 0.005), "easgd": (0.4, 0.2, 0.04), "eamsgd": (0.05, 0.02, 0.01)}
LABELS = {"downpour": "DOWNPOUR", "easgd": "EASGD", "eamsgd": "EAMSGD"}
CURVE_POINTS = 16


@dataclass(frozen=True)
class Run:
    """One run of a method: the center's loss over time and at the end, and its cost."""

    learning_rate: float
    curve: Array
    loss: float
    accuracy: float
    n_bytes: int


def run(network: Network, name: str, period: int, learning_rate: float, steps: int, seed: int) -> Run:
    """Let all workers make ``steps`` steps each."""
    world = SimulatedWorld(WORKERS, RandomOrder(seed))
    method = METHODS[name](period=period)  # type: ignore[call-arg]
    simulation = Simulation(method, world, MiniBatches(network, WORKERS, seed=seed), network.start(seed), learning_rate)
    curve = [network.loss(simulation.consensus(), network.train)]

    def observe(simulation: Simulation, rank: int) -> None:
        if rank == 0 and simulation.workers[0].t % (steps // CURVE_POINTS) == 0:
            curve.append(network.loss(simulation.consensus(), network.train))

    with np.errstate(all="ignore"):  # what diverges may overflow
        simulation.run(steps, observe)
        center = simulation.consensus()
        loss, accuracy = network.loss(center, network.train), 1 - network.error(center)
    n_bytes = sum(communicator.statistics.bytes_sent for communicator in world.communicators)
    return Run(learning_rate, np.array(curve), loss, accuracy, n_bytes)


def runs_of(network: Network, name: str, period: int, steps: int, n_seeds: int) -> list[Run]:
    """Return one run per learning rate, averaged over the seeds; the smallest final loss first."""
    means = []
    for learning_rate in LEARNING_RATES[name]:
        runs = [run(network, name, period, learning_rate, steps, seed) for seed in range(n_seeds)]
        curve = np.mean([one.curve for one in runs], axis=0)
        loss, accuracy = np.mean([(one.loss, one.accuracy) for one in runs], axis=0)
        means.append(Run(learning_rate, curve, float(loss), float(accuracy), runs[0].n_bytes))
    return sorted(means, key=lambda mean: mean.loss if np.isfinite(mean.loss) else np.inf)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    made = parser(__doc__)
    made.add_argument("--steps", type=int, default=640, help="of each worker, a multiple of 64 (default: %(default)s)")
    made.add_argument("--seeds", type=int, default=1, help="runs of each setting (default: %(default)s)")
    options = made.parse_args(arguments)
    if options.steps < 64 or options.steps % 64 or options.seeds < 1:
        made.error("--steps must be a multiple of 64, so that every period comes out even; --seeds at least 1")
    outcome, network = Outcome("period_sweep", options), Network()

    found: dict[str, dict[int, list[Run]]] = {}
    outcome.say("method     period   best lr   final loss   test accuracy   bytes a gradient")
    for name in LEARNING_RATES:
        found[name] = {}
        for period in PERIODS:
            found[name][period] = runs_of(network, name, period, options.steps, options.seeds)
            one = found[name][period][0]
            per_gradient = one.n_bytes / (WORKERS * options.steps)
            outcome.say(
                f"{LABELS[name]:8}{period:9}{one.learning_rate:10g}{one.loss:13.4f}{one.accuracy:15.1%}"
                f"{per_gradient:17,.0f}"
            )
    judge(outcome, found)
    draw(outcome, found, options.steps)
    table = {
        name: {str(period): figures(runs[0]) for period, runs in runs_at.items()} for name, runs_at in found.items()
    }
    return outcome.conclude(steps=options.steps, seeds=options.seeds, best=table)


def figures(one: Run) -> dict[str, float]:
    """Return the document's figures of a run."""
    return {
        "learning_rate": one.learning_rate,
        "loss": one.loss,
        "accuracy": one.accuracy,
        "bytes": one.n_bytes,
    }


def best_at_1(runs: dict[int, list[Run]], period: int) -> Run:
    """Return the run of a period with the learning rate that is best at period 1."""
    return next(one for one in runs[period] if one.learning_rate == runs[1][0].learning_rate)


def judge(outcome: Outcome, found: dict[str, dict[int, list[Run]]]) -> None:
    """Check the criteria of the published picture."""
    downpour, easgd, eamsgd = (found[name] for name in LEARNING_RATES)
    ratio = downpour[64][0].loss / easgd[64][0].loss
    outcome.criterion(
        "DOWNPOUR's final loss at period 64 is more than twice EASGD's, or NaN. Value: the ratio", ratio, not ratio <= 2
    )
    best = best_at_1(downpour, 64)
    grown = best.loss / best.curve[0]
    outcome.criterion(
        "DOWNPOUR at period 64, with the best rate of period 1: the loss ends above its start. Value: the ratio",
        grown,
        not grown <= 1,
    )
    own = easgd[64][0].loss / easgd[1][0].loss
    outcome.criterion("EASGD's final loss at period 64 is below twice that at period 1. Value: the ratio", own, own < 2)
    worst = max(eamsgd[period][0].loss / easgd[period][0].loss for period in PERIODS)
    outcome.criterion(
        "EAMSGD's final loss is below EASGD's at every period. Value: the largest ratio", worst, worst < 1
    )
    off = max(
        abs(runs[period][0].n_bytes * period / runs[1][0].n_bytes - 1) for runs in found.values() for period in PERIODS
    )
    outcome.criterion("the bytes are proportional to 1/period. Value: the largest relative deviation", off, off < 0.01)


def draw(outcome: Outcome, found: dict[str, dict[int, list[Run]]], steps: int) -> None:
    """Draw final losses over the period, the loss over time at the longest period, and bytes."""
    figure, ((final, way, volume),) = panels(3)
    gradients = np.linspace(0, WORKERS * steps, CURVE_POINTS + 1)
    for colour, marker, width, (name, runs) in zip(COLOURS, "os^", (6, 3.5, 1.5), found.items()):
        style = {"color": colour, "marker": marker, "label": LABELS[name]}
        final.plot(PERIODS, [runs[period][0].loss for period in PERIODS], **style)
        final.plot(PERIODS, [best_at_1(runs, period).loss for period in PERIODS], color=colour, linestyle=":")
        longest = runs[64][0]
        way.plot(gradients, longest.curve, color=colour, label=f"{LABELS[name]}, η = {longest.learning_rate:g}")
        per_gradient = [runs[period][0].n_bytes / (WORKERS * steps) / 1e3 for period in PERIODS]
        volume.plot(PERIODS, per_gradient, linewidth=width, **style)  # all three are one line
    for axes in (final, volume):
        axes.set_xscale("log", base=2)
        axes.set_xticks(PERIODS, [str(period) for period in PERIODS])
        axes.set_xlabel("period τ (local steps)")
        axes.set_yscale("log")
    way.set_yscale("log")
    final.set_title("best of three η (dotted: the best at τ = 1)")
    final.set_ylabel("final training loss of the center")
    way.set_title("τ = 64")
    way.set_xlabel("gradients, all workers")
    way.set_ylabel("training loss of the center")
    volume.set_title("communication")
    volume.set_ylabel("kB a gradient")
    final.legend(frameon=False)
    way.legend(frameon=False)
    volume.legend(frameon=False)
    outcome.save(figure)


if __name__ == "__main__":
    sys.exit(main())
