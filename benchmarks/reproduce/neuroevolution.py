"""B21: a population that evolves between phases of SGD has a lower error than SGD alone; suppression keeps it diverse.

Zhang, Hao, Gao, Wei, Tang 2020, https://arxiv.org/abs/2012.11184: on four data sets, networks that neuroevolution and
SGD find together are better than those that SGD finds alone. Individuals whose weight updates are similar are
suppressed. Only the abstract was available to us, so mpitrain's method is a reconstruction.

Here populations of 8 networks train on 500 digits, a fifth of which have random labels. The fitness is the loss on 400
other samples; test errors are those on the remaining 897. The script compares three ways to spend the same total number
of gradients:

- a population, with and without suppression, from which the fittest network is chosen;
- 8 networks that train independently ("independent"), from which the fittest is chosen;
- a network with eight times as many steps ("single").

The likeness of a population is the mean cosine between the weight updates of two individuals in half a generation.

    python -m benchmarks.reproduce.neuroevolution [--quick] [--out DIR] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.reproduce.digits import MiniBatches, Network, Samples
from benchmarks.reproduce.figure import COLOURS, Outcome, panels, quick_parser
from mpitrain.algorithms import AllReduceSGD, NeuroevolutionSGD
from mpitrain.algorithms.base.method import Method
from mpitrain.simulation.engine import Simulation
from mpitrain.simulation.world import SimulatedWorld

POPULATION, GENERATIONS, PERIOD, LEARNING_RATE, BATCH = 8, 16, 40, 0.3, 16
QUICK_GENERATIONS, SEEDS = 8, 6
N_TRAIN, N_FITNESS, NOISE = 500, 400, 0.2
METHODS: dict[str, tuple[Method, int]] = {
    "suppression": (NeuroevolutionSGD(period=PERIOD, similarity=0.5), POPULATION),
    "no suppression": (NeuroevolutionSGD(period=PERIOD, similarity=1.0), POPULATION),
    "independent": (NeuroevolutionSGD(period=10**6, similarity=1.0), POPULATION),
    "single": (AllReduceSGD(), 1),
}

AGAINST = {
    "independent": "on this small problem, nearly all of the gain comes from choosing the best of several short runs "
    "by their fitness. Independent networks have this gain too",
}
"""Why the result contradicts the paper, by the population that it is compared with."""


class Problem:
    """The network, and the samples for fitness and tests."""

    def __init__(self) -> None:
        self.network = Network(n_train=N_TRAIN, label_noise=NOISE)
        x, y = self.network.test
        self.fitness_samples: Samples = (x[:N_FITNESS], y[:N_FITNESS])
        self.test_samples: Samples = (x[N_FITNESS:], y[N_FITNESS:])
        ends = np.cumsum([int(np.prod(shape)) for shape in self.network.shapes])
        self.layers = tuple(slice(a, b) for a, b in zip([0, *ends[1::2][:-1]], ends[1::2], strict=True))

    def fitness(self, x: np.ndarray) -> float:
        """Return the loss on the samples for fitness."""
        return self.network.loss(x, self.fitness_samples)

    def simulation(self, method: Method, size: int, seed: int) -> Simulation:
        """Return a population whose individuals start from different parameters."""
        starts = np.stack([self.network.start(100 * seed + k) for k in range(size)])
        batches = MiniBatches(self.network, size, batch_size=BATCH, seed=seed)
        return Simulation(
            method,
            SimulatedWorld(size),
            batches,
            starts,
            LEARNING_RATE,
            seed=seed,
            layers=self.layers,
            fitness=self.fitness,
            loss=batches.loss,
        )


def likeness(simulation: Simulation) -> float:
    """Return the mean cosine between the updates of two individuals in half a generation, which is run for it."""
    before = simulation.x()
    simulation.run(PERIOD // 2)
    u = simulation.x() - before
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    products = u @ u.T
    return float(products[np.triu_indices(len(u), 1)].mean())


def run(problem: Problem, name: str, generations: int, seed: int) -> tuple[float, float]:
    """Return the test error of the chosen network, and the likeness of the population (NaN for one network)."""
    method, size = METHODS[name]
    simulation = problem.simulation(method, size, seed)
    simulation.run(generations * PERIOD * POPULATION // size)
    best = min(simulation.x(), key=problem.fitness)
    error = problem.network.error(best, problem.test_samples)
    return error, likeness(simulation) if size > 1 else float("nan")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    options = quick_parser(__doc__).parse_args(arguments)
    generations, n_seeds = (QUICK_GENERATIONS, 2) if options.quick else (GENERATIONS, SEEDS)
    outcome, problem = Outcome("neuroevolution", options), Problem()
    found = {name: np.array([run(problem, name, generations, s) for s in range(n_seeds)]) for name in METHODS}
    outcome.say("population        test error of the best   standard error   likeness")
    for name, rows in found.items():
        noise = rows[:, 0].std(ddof=1) / np.sqrt(n_seeds)
        outcome.say(f"{name:18}{rows[:, 0].mean():22.2%}{noise:17.2%}{rows[:, 1].mean():11.3f}")
    judge(outcome, found)
    draw(outcome, found)
    return outcome.conclude(errors={name: rows[:, 0] for name, rows in found.items()})


def judge(outcome: Outcome, found: Mapping[str, np.ndarray]) -> None:
    """Check the criteria of the published picture."""
    error = {name: float(rows[:, 0].mean()) for name, rows in found.items()}
    for other in ("single", "independent"):
        ratio = error["suppression"] / error[other]
        outcome.criterion(
            f'equal gradients: the error of the population is below that of "{other}". Value: the ratio',
            ratio,
            ratio < 1,
            contradicts=AGAINST.get(other, ""),
        )
    pairs = found["suppression"][:, 1] - found["no suppression"][:, 1]
    noise = float(pairs.std(ddof=1) / np.sqrt(pairs.size))
    difference = float(pairs.mean())
    outcome.criterion(
        "suppression lowers the likeness by more than 2 standard errors. Value: the difference",
        difference,
        difference < -2 * noise,
        contradicts="networks from different starts have nearly orthogonal updates, so there is little to suppress. A "
        "suppressed network becomes a child of two survivors, and children of the same parents are alike",
    )


def draw(outcome: Outcome, found: Mapping[str, np.ndarray]) -> None:
    """Draw errors and likeness."""
    figure, ((left, right),) = panels(2)
    for axes, column, factor, words in ((left, 0, 100, "test error, %"), (right, 1, 1, "mean cosine of updates")):
        names = [name for name, rows in found.items() if np.isfinite(rows[:, column]).all()]
        values = [factor * found[name][:, column] for name in names]
        noise = [one.std(ddof=1) / np.sqrt(one.size) for one in values]
        axes.bar(names, [one.mean() for one in values], yerr=noise, color=COLOURS[column])
        axes.set_ylabel(words)
    outcome.save(figure)


if __name__ == "__main__":
    sys.exit(main())
