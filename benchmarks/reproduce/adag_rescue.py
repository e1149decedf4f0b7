"""B8: with many workers, frequent commits and a high learning rate, AGN diverges at first and ADAG does not.

AGN (accumulated gradient normalization), ADAG, DOWNPOUR and DynSGD are methods with a parameter server, which stores
the center. In a commit, a worker adds its local steps to the center. Hermans' thesis, CERN-THESIS-2017-103, reports
that AGN with many workers and short periods diverges in the beginning, and that ADAG with gamma = 1e-4 prevents this.

Here 16 equally fast machines, whose steps vary in length by 10 %, fit a softmax regression to the digits, with periods
of 1 to 5 steps between two commits. One worker alone has no trouble with the same learning rate. The loss is that of
the center, on all images. Its initial value is ln 10.

AGN diverges here because equally fast machines commit nearly in turn. The last row of the table shows AGN with steps of
exponentially distributed length. Any worker may then be the next one, and most commits follow a recent pull; AGN does
not diverge at the same learning rate. DynSGD, which divides a commit by its staleness, does not diverge either.

    python -m benchmarks.reproduce.adag_rescue [--workers 16] [--lr 0.5] [--rounds 60] [--seeds 3] [--out DIR] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from benchmarks.reproduce.figure import COLOURS, DASHES, Outcome, panels, parser
from mpitrain.algorithms.base.method import Method
from mpitrain.algorithms.parameter_server.adag import ADAG
from mpitrain.algorithms.parameter_server.agn import AGN
from mpitrain.algorithms.parameter_server.downpour import Downpour
from mpitrain.algorithms.parameter_server.dynsgd import DynSGD
from mpitrain.simulation.engine import Simulation
from mpitrain.simulation.schedules import RandomOrder, Schedule, VirtualTime
from mpitrain.simulation.world import SimulatedWorld

Array = NDArray[np.float64]

PERIODS = (1, 2, 3, 4, 5)
SHOWN = 3
BATCH = 32
METHODS: dict[str, Callable[[int], Method]] = {
    "DOWNPOUR": lambda period: Downpour(period=period),
    "AGN": lambda period: AGN(period=period),
    "ADAG on AGN": lambda period: ADAG(period=period, gamma=1e-4),
    "DynSGD": lambda period: DynSGD(period=period),
}
DIVERGED, CALM = 1.2, 1.05
"""Largest loss, in units of that at the start: above the first it has diverged, below the second it has not risen."""


@dataclass
class Digits:
    """Softmax regression: 64 pixels and a constant, 10 classes, weights (650,)."""

    x: Array = field(init=False)
    y: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        found = load_digits()
        self.x = np.column_stack([found.data / 16, np.ones(len(found.data))])
        self.y = found.target

    @property
    def n_weights(self) -> int:
        """The number of weights of a model."""
        return int(self.x.shape[1]) * 10

    def _logarithms(self, weights: Array, rows: NDArray[np.int64] | slice) -> Array:
        """Return the logarithms of the probabilities, (rows, 10)."""
        z = self.x[rows] @ weights.reshape(-1, 10)
        z -= z.max(1, keepdims=True)
        logarithms: Array = z - np.log(np.exp(z).sum(1, keepdims=True))
        return logarithms

    def loss(self, weights: Array) -> float:
        """Return the cross-entropy over all images."""
        return -float(self._logarithms(weights, slice(None))[np.arange(self.y.size), self.y].mean())

    def accuracy(self, weights: Array) -> float:
        """Return the fraction of all images that is classified correctly."""
        return float((self._logarithms(weights, slice(None)).argmax(1) == self.y).mean())

    def gradients(self, seed: int) -> Callable[[int, Array], Array]:
        """Return the gradients of random mini-batches."""
        rng = np.random.default_rng(seed)

        def gradient(rank: int, weights: Array) -> Array:
            rows = rng.integers(self.y.size, size=BATCH)
            error = np.exp(self._logarithms(weights, rows))
            error[np.arange(BATCH), self.y[rows]] -= 1
            found: Array = (self.x[rows].T @ error / BATCH).ravel()
            return found

        return gradient


def train(
    digits: Digits, method: Method, schedule: Schedule, n: int, lr: float, n_rounds: int, seed: int
) -> tuple[Array, float]:
    """Train; return the center's loss (n_rounds + 1,) after each round and its final accuracy.

    A round is as many local steps as there are workers, by any of the workers.
    """
    world = SimulatedWorld(n, schedule)
    simulation = Simulation(method, world, digits.gradients(seed), np.zeros(digits.n_weights), lr)
    losses, steps = [digits.loss(simulation.consensus())], 0

    def watch(simulation: Simulation, rank: int) -> None:
        nonlocal steps
        steps += 1
        if steps % n == 0:
            losses.append(digits.loss(simulation.consensus()))

    simulation.run(n_rounds, watch)
    return np.array(losses), digits.accuracy(simulation.consensus())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    made = parser(__doc__)
    made.add_argument("--workers", type=int, default=16, help="default: %(default)s")
    made.add_argument("--lr", type=float, default=0.5, help="learning rate (default: %(default)s)")
    made.add_argument("--rounds", type=int, default=60, help="local steps of each worker (default: %(default)s)")
    made.add_argument("--seeds", type=int, default=3, help="runs of each setting (default: %(default)s)")
    options = made.parse_args(arguments)
    outcome, digits = Outcome("adag_rescue", options), Digits()

    def trained(method: Method, n: int, *, in_random_order: bool = False) -> list[tuple[Array, float]]:
        return [
            train(
                digits, method, RandomOrder(seed) if in_random_order else VirtualTime([1.0] * n, jitter=0.1, seed=seed),
                n, options.lr, options.rounds, seed,
            )
            for seed in range(options.seeds)
        ]  # fmt: skip

    cells = {("one worker alone", 1): trained(Downpour(), 1)}
    for name, make in METHODS.items():
        for period in PERIODS:
            cells[name, period] = trained(make(period), options.workers)
    cells["AGN, any order", 1] = trained(AGN(period=1), options.workers, in_random_order=True)
    start = float(np.log(10))
    rows = [
        {
            "method": name,
            "period": period,
            "largest_loss": max(losses.max() for losses, _ in found),
            "least_largest_loss": min(losses.max() for losses, _ in found),
            "last_loss": float(np.mean([losses[-1] for losses, _ in found])),
            "accuracy": float(np.mean([accuracy for _, accuracy in found])),
        }
        for (name, period), found in cells.items()
    ]
    outcome.say(f"{options.workers} workers, learning rate {options.lr:g}, {options.seeds} seeds, start {start:.2f}")
    outcome.say("                   period  largest loss  last loss  accuracy")
    for row in rows:
        outcome.say(
            f"  {row['method']:16} {row['period']:6}  {row['largest_loss']:12.2f}  {row['last_loss']:9.2f}"
            f"  {row['accuracy']:8.3f}"
        )

    def of(name: str, key: str) -> list[float]:
        return [row[key] / start for row in rows if row["method"] == name]

    for name in ("one worker alone", "ADAG on AGN", "DynSGD"):
        worst = max(of(name, "largest_loss"))
        outcome.criterion(
            f"{name}: the loss stays below {CALM:g} times its initial value. Value: the largest factor",
            worst,
            worst < CALM,
        )
    for name in ("DOWNPOUR", "AGN"):
        least = min(of(name, "least_largest_loss"))
        words = f"{name}: every run's loss rises above {DIVERGED:g} times its initial value. Value: the smallest factor"
        outcome.criterion(words, least, least > DIVERGED)

    figure, ((left, right),) = panels(2)
    for k, name in enumerate(METHODS):
        style = {"color": COLOURS[k], "linestyle": DASHES[k % len(DASHES)], "label": name}
        left.plot(np.mean([losses for losses, _ in cells[name, SHOWN]], axis=0), **style)
        right.plot(PERIODS, [start * value for value in of(name, "largest_loss")], marker="o", markersize=4, **style)
    for axes in (left, right):
        axes.axhline(start, color="black", linewidth=0.8)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    left.set_title(f"{options.workers} workers, period {SHOWN}, learning rate {options.lr:g}")
    left.set_xlabel("local steps of each worker")
    left.set_ylabel("loss of the center")
    left.annotate("ln 10", (options.rounds, start), ha="right", va="bottom")
    right.set_title("the worst that happens")
    right.set_xlabel("period λ")
    right.set_ylabel("largest loss of the center")
    right.set_xticks(PERIODS)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    outcome.save(figure)
    return outcome.conclude(workers=options.workers, learning_rate=options.lr, rows=rows)


if __name__ == "__main__":
    sys.exit(main())
