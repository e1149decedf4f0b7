"""B24: with an outer optimizer, long periods between exchanges hardly cost accuracy; more workers need more momentum.

DiLoCo (Douillard et al. 2023, https://arxiv.org/abs/2311.08105): 8 workers match fully synchronous training with 500
times less communication. SlowMo (Wang, Tantia, Ballas, Rabbat 2019, https://arxiv.org/abs/1910.00643): a slow momentum,
that of the outer optimizer, improves Local SGD. The slow momenta that fairscale documents as best grow from 0 with
fewer than 4 nodes to 0.6 with 16 nodes.

Here 8 simulated workers train a classifier of digits with Local SGD, SlowMo and DiLoCo, and with periods of H = 1 to 64
steps. Each method has the best of the same learning rates, and all compute the same number of gradients. The script
compares the training loss of the consensus and the bytes sent. A second experiment varies SlowMo's slow momentum for 2
to 16 workers at H = 16, with the best of two learning rates.

    python -m benchmarks.reproduce.local_updates [--quick] [--out DIR] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np

from benchmarks.reproduce.digits import Network
from benchmarks.reproduce.figure import COLOURS, Outcome, panels, quick_parser
from benchmarks.reproduce.training import Curve, train
from mpitrain.algorithms import DiLoCo, LocalSGD, SlowMo
from mpitrain.algorithms.base.method import Method

METHODS: dict[str, Callable[[int], Method]] = {
    "Local SGD": lambda period: LocalSGD(period=period),
    "SlowMo": lambda period: SlowMo(period=period),
    "DiLoCo": lambda period: DiLoCo(period=period),
}
PERIODS, QUICK_PERIODS = (1, 4, 16, 64), (1, 64)
WORKERS, STEPS, QUICK_STEPS = 8, 512, 256
LEARNING_RATES = (2.0, 1.0, 0.3, 0.1)
MOMENTA, QUICK_MOMENTA = (0.0, 0.2, 0.4, 0.6, 0.8), (0.0, 0.4, 0.8)
MOMENTUM_WORKERS, MOMENTUM_PERIOD, MOMENTUM_RATES = (2, 4, 8, 16), 16, (2.0, 0.5)


def best_of(network: Network, make: Callable[[int], Method], period: int, steps: int) -> Curve:
    """Return the run whose learning rate gives the lowest final loss."""
    tried = [train(network, make(period), rate, WORKERS, steps * WORKERS, points=8) for rate in LEARNING_RATES]
    return min(tried, key=lambda curve: curve.loss[-1])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    options = quick_parser(__doc__).parse_args(arguments)
    outcome, network = Outcome("local_updates", options), Network(dtype=np.float32)
    periods, steps = (QUICK_PERIODS, QUICK_STEPS) if options.quick else (PERIODS, STEPS)
    momenta = QUICK_MOMENTA if options.quick else MOMENTA
    found = {name: {h: best_of(network, make, h, steps) for h in periods} for name, make in METHODS.items()}
    outcome.say("method         H    training loss   test error   gigabytes")
    for name, curves in found.items():
        for period, curve in curves.items():
            outcome.say(f"{name:10}{period:6}{curve.loss[-1]:17.4f}{curve.error[-1]:13.2%}{curve.gigabytes[-1]:12.1f}")
    losses: dict[int, dict[float, float]] = {}
    outcome.say()
    outcome.say(f"SlowMo, H = {MOMENTUM_PERIOD}: training loss by slow momentum")
    outcome.say("workers" + "".join(f"{m:10g}" for m in momenta) + "      best")
    for n in MOMENTUM_WORKERS:
        losses[n] = {}
        for m in momenta:
            method = SlowMo(period=MOMENTUM_PERIOD, slow_momentum=m)
            runs = [train(network, method, rate, n, steps // 2 * n, points=1) for rate in MOMENTUM_RATES]
            losses[n][m] = min(float(curve.loss[-1]) for curve in runs)
        best = min(losses[n], key=lambda m: losses[n][m])
        outcome.say(f"{n:7}" + "".join(f"{loss:10.4f}" for loss in losses[n].values()) + f"{best:10g}")
    judge(outcome, found, losses)
    draw(outcome, found, losses)
    table = {name: {h: [c.loss[-1], c.gigabytes[-1]] for h, c in curves.items()} for name, curves in found.items()}
    return outcome.conclude(losses_and_gigabytes=table, slow_momentum=losses)


def judge(
    outcome: Outcome, found: Mapping[str, Mapping[int, Curve]], losses: Mapping[int, Mapping[float, float]]
) -> None:
    """Check the criteria of the published picture."""
    longest = max(found["DiLoCo"])
    synchronous = found["Local SGD"][1].loss[-1]
    ratio = found["DiLoCo"][longest].loss[-1] / synchronous
    outcome.criterion(
        f"H = {longest}: DiLoCo's loss is at most 1.1 times that of synchronous SGD. Value: the ratio",
        ratio,
        ratio <= 1.1,
    )
    ratio = found["DiLoCo"][longest].loss[-1] / found["Local SGD"][longest].loss[-1]
    outcome.criterion(f"H = {longest}: DiLoCo's loss is below Local SGD's. Value: the ratio", ratio, ratio < 1)
    ratio = found["SlowMo"][longest].loss[-1] / found["Local SGD"][longest].loss[-1]
    outcome.criterion(f"H = {longest}: SlowMo's loss is below Local SGD's. Value: the ratio", ratio, ratio < 1)
    volume = max(
        abs(curve.gigabytes[-1] * h / curves[1].gigabytes[-1] - 1)
        for name, curves in found.items()
        for h, curve in curves.items()
    )
    outcome.criterion("the bytes are proportional to 1/H. Value: the largest relative deviation", volume, volume < 0.01)
    best = [min(row, key=lambda m: row[m]) for row in losses.values()]
    grows = all(a <= b for a, b in pairwise(best)) and best[-1] > best[0]
    outcome.criterion(
        f"the best slow momentum grows from {min(losses)} to {max(losses)} workers. Value: the best ones in this order",
        ", ".join(f"{m:g}" for m in best),
        grows,
        contradicts="gradients of this easy problem have too little noise to limit the momentum: a large one is best "
        "for any number of workers",
    )


def draw(
    outcome: Outcome, found: Mapping[str, Mapping[int, Curve]], losses: Mapping[int, Mapping[float, float]]
) -> None:
    """Draw losses over bytes, and over the slow momentum."""
    figure, ((left, right),) = panels(2)
    for colour, marker, (name, curves) in zip(COLOURS, "os^", found.items(), strict=False):
        volume = [curve.gigabytes[-1] for curve in curves.values()]
        left.plot(volume, [curve.loss[-1] for curve in curves.values()], color=colour, marker=marker, label=name)
    left.set_xscale("log")
    left.set_xlabel("gigabytes sent, all workers (H = 1 at the right)")
    for colour, (n, row) in zip(COLOURS, losses.items(), strict=False):
        right.plot(list(row), list(row.values()), color=colour, marker="o", label=f"{n} workers")
    right.set_xlabel("slow momentum")
    right.set_title(f"SlowMo, H = {MOMENTUM_PERIOD}")
    for axes in (left, right):
        axes.set_yscale("log")
        axes.set_ylabel("training loss of the consensus")
        axes.legend(frameon=False)
    outcome.save(figure)


if __name__ == "__main__":
    sys.exit(main())
