"""B17, B18, B19: Parle fits training data less and test data better, also with split data, at 1/25 of the bytes.

Chaudhari et al. 2017, https://arxiv.org/abs/1707.00424: with WRN-28-10 on CIFAR-10, Parle's training error is above
those of Elastic-SGD and SGD (5.03 % against 0.003 and 0.01), and its validation error is below theirs (3.24 % against
4.38 and 4.29): Parle has found a wider valley. In the experiment with split data, each of 3 replicas sees half of the
data, and Parle (5.89 %) beats Elastic-SGD (6.51 %) and SGD with all data (6.15 %). Parle communicates once every
L = 25 gradients.

Here 3 replicas train a network of 64 hidden units on 400 digits. A fifth of these have a random label, so that a low
training error does not mean that the network has learnt the digits. Elastic-SGD is synchronous EASGD with period 1, and
SGD is a single worker; both have Nesterov momentum 0.9, as in the paper. Every replica of every method computes the
same number of gradients. All learning rates are divided by 10 after 60 % of them. Error bars are standard errors over
seeds.

    python -m benchmarks.reproduce.flat_minima [--quick] [--out DIR] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.reproduce.digits import Network
from benchmarks.reproduce.figure import COLOURS, Outcome, panels, quick_parser
from benchmarks.reproduce.training import train
from mpitrain.algorithms import EASGD, AllReduceSGD, Parle
from mpitrain.algorithms.base.method import Method
from mpitrain.simulation.engine import Simulation

REPLICAS, N_TRAIN, NOISE, HIDDEN, BATCH = 3, 400, 0.2, 64, 16
STEPS, QUICK_STEPS, SEEDS = 1500, 750, 4
DECAY = ((0.6, 0.1),)
BATCHES_PER_EPOCH = N_TRAIN // BATCH


@dataclass(frozen=True)
class Contender:
    """A method, its learning rate and its number of replicas."""

    make: Callable[[], Method]
    learning_rate: float
    replicas: int = REPLICAS
    momentum: float = 0.9


METHODS = {
    "SGD": Contender(AllReduceSGD, 0.1, replicas=1),
    "Elastic-SGD": Contender(lambda: EASGD(period=1, synchronous=True), 0.1),
    "Parle": Contender(lambda: Parle(scoping_batches=BATCHES_PER_EPOCH), 0.1, momentum=0.0),
}


@dataclass(frozen=True)
class Result:
    """Errors at the end of runs, (seeds,) each, and the bytes of a gradient."""

    train_error: np.ndarray
    test_error: np.ndarray
    bytes_per_gradient: float


def halves(seed: int) -> list[np.ndarray]:
    """Return a random half of the training samples for each replica."""
    rng = np.random.default_rng([seed, 5])
    return [rng.permutation(N_TRAIN)[: N_TRAIN // 2] for _ in range(REPLICAS)]


def run(network: Network, contender: Contender, steps: int, n_seeds: int, *, split: bool) -> Result:
    """Train with each seed."""
    train_errors, test_errors, volume = [], [], 0.0
    for seed in range(n_seeds):
        ends: list[np.ndarray] = []

        def keep(simulation: Simulation, ends: list[np.ndarray] = ends) -> None:
            ends.append(simulation.consensus())

        curve = train(
            network,
            contender.make(),
            contender.learning_rate,
            contender.replicas,
            steps * contender.replicas,
            seed=seed,
            points=1,
            batch_size=BATCH,
            momentum=contender.momentum,
            decay=DECAY,
            parts=halves(seed) if split else None,
            at_end=keep,
        )
        train_errors.append(network.error(ends[0], network.train))
        test_errors.append(network.error(ends[0]))
        volume = float(curve.gigabytes[-1]) * 1e9 / (steps * contender.replicas)
    return Result(np.array(train_errors), np.array(test_errors), volume)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    options = quick_parser(__doc__).parse_args(arguments)
    steps, n_seeds = (QUICK_STEPS, 2) if options.quick else (STEPS, SEEDS)
    outcome = Outcome("flat_minima", options)
    network = Network(HIDDEN, n_train=N_TRAIN, label_noise=NOISE, dtype=np.float32)
    found = {f"{name}, all data": run(network, one, steps, n_seeds, split=False) for name, one in METHODS.items()}
    for name in ("Elastic-SGD", "Parle"):
        found[f"{name}, half each"] = run(network, METHODS[name], steps, n_seeds, split=True)
    outcome.say("method                    training error   test error   standard error   MB per gradient")
    for name, one in found.items():
        outcome.say(
            f"{name:25}{one.train_error.mean():15.2%}{one.test_error.mean():13.2%}{_noise(one):17.2%}"
            f"{one.bytes_per_gradient / 1e6:18.2f}"
        )
    judge(outcome, found)
    draw(outcome, found)
    table = {
        name: {"train_error": one.train_error, "test_error": one.test_error, "bytes": one.bytes_per_gradient}
        for name, one in found.items()
    }
    return outcome.conclude(results=table)


def _noise(result: Result) -> float:
    """Return the standard error of the test error."""
    return float(result.test_error.std(ddof=1) / np.sqrt(result.test_error.size))


def judge(outcome: Outcome, found: Mapping[str, Result]) -> None:
    """Check the criteria of the published picture."""
    parle = found["Parle, all data"]
    for other in ("Elastic-SGD", "SGD"):
        ratio = parle.train_error.mean() / max(found[f"{other}, all data"].train_error.mean(), 1e-9)
        outcome.criterion(f"Parle's training error is above that of {other}. Value: the ratio", ratio, ratio > 1)
        ratio = parle.test_error.mean() / found[f"{other}, all data"].test_error.mean()
        outcome.criterion(f"Parle's test error is below that of {other}. Value: the ratio", ratio, ratio < 1)
    half = found["Parle, half each"]
    ratio = half.test_error.mean() / found["Elastic-SGD, half each"].test_error.mean()
    outcome.criterion(
        "half of the data each: Parle's test error is below Elastic-SGD's. Value: the ratio", ratio, ratio < 1
    )
    ratio = half.test_error.mean() / found["SGD, all data"].test_error.mean()
    outcome.criterion(
        "half of the data each: Parle's test error is at most that of SGD with all data. Value: the ratio",
        ratio,
        ratio <= 1,
    )
    saved = found["Elastic-SGD, all data"].bytes_per_gradient / parle.bytes_per_gradient
    outcome.criterion(
        "bytes per gradient: Elastic-SGD sends 25 times as many as Parle, within 10 %. Value: the ratio",
        saved,
        abs(saved / 25 - 1) < 0.1,
    )


def draw(outcome: Outcome, found: Mapping[str, Result]) -> None:
    """Draw training and test errors side by side."""
    figure, ((axes,),) = panels(1, width_inches=8)
    places = np.arange(len(found))
    for k, (words, part) in enumerate((("training", "train_error"), ("test", "test_error"))):
        values = np.array([getattr(one, part) for one in found.values()]) * 100
        errors = values.std(axis=1, ddof=1) / np.sqrt(values.shape[1])
        axes.bar(places + 0.4 * k - 0.2, values.mean(axis=1), 0.38, yerr=errors, color=COLOURS[k], label=words)
    axes.set_xticks(places, [name.replace(", ", "\n") for name in found])
    axes.set_ylabel("error, %")
    axes.legend(frameon=False)
    outcome.save(figure)


if __name__ == "__main__":
    sys.exit(main())
