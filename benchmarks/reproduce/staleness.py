"""B9: the mean staleness of n workers is n - 1 for any step times; its distribution depends on the step times.

The staleness of a commit to a parameter server is the number of other commits since the last pull of its worker.
Hermans' thesis, CERN-THESIS-2017-103, shows histograms for 10, 20, 30 and 60 workers whose mean is n - 1. The script
measures the staleness of DOWNPOUR's commits with three kinds of workers:

- workers that commit in turn;
- equally fast machines, whose steps vary in length by 10 % (log-normal);
- workers whose steps have an exponentially distributed length, so that each worker is equally likely to be the next.

With the third kind, the staleness is geometric, and asynchrony acts as momentum 1 - 1/n (Mitliagkas et al. 2016).

    python -m benchmarks.reproduce.staleness [--commits 300] [--seed 0] [--out runs/reproduce] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.reproduce.figure import COLOURS, Outcome, panels, parser
from mpitrain.algorithms.parameter_server.downpour import Downpour
from mpitrain.simulation.engine import Simulation
from mpitrain.simulation.schedules import RandomOrder, Ready, RoundRobin, Schedule, VirtualTime
from mpitrain.simulation.world import SimulatedWorld

WORKERS = (10, 20, 30, 60)
JITTER = 0.1
KINDS: dict[str, Callable[[int, int], Schedule]] = {
    "in turn": lambda n, seed: RoundRobin(),
    "10 % jitter": lambda n, seed: VirtualTime([1.0] * n, jitter=JITTER, seed=seed),
    "exponential": lambda n, seed: RandomOrder(seed),
}


class Until:
    """A schedule that ends all workers after a total number of steps."""

    def __init__(self, schedule: Schedule, n_steps: int) -> None:
        self._schedule, self._left = schedule, n_steps

    def __getattr__(self, name: str) -> Any:
        """Return everything but the choice from the wrapped schedule."""
        return getattr(self._schedule, name)

    def choose(self, ready: Ready) -> int | None:
        """Choose as the wrapped schedule does, or None at the end."""
        self._left -= 1
        return self._schedule.choose(ready) if self._left >= 0 else None


def staleness(kind: str, n: int, n_commits: int, seed: int) -> NDArray[np.int64]:
    """Return the staleness (commits,) of n workers with ``n_commits`` each on average, without the first few."""
    warm_up = 5 * n  # all begin at once, and the first pulls are young
    found: list[int] = []
    world = SimulatedWorld(n, Until(KINDS[kind](n, seed), n * n_commits + warm_up))
    simulation = Simulation(Downpour(), world, lambda rank, x: np.zeros(1), np.zeros(1), 0.1)
    simulation.run(sys.maxsize, lambda s, rank: found.append(int(s.workers[rank].metrics()["staleness"])))
    return np.array(found[warm_up:])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    made = parser(__doc__)
    made.add_argument("--commits", type=int, default=300, help="of each worker, on average (default: %(default)s)")
    made.add_argument("--seed", type=int, default=0, help="of the lengths of steps (default: %(default)s)")
    options = made.parse_args(arguments)
    outcome = Outcome("staleness", options)
    found = {(name, n): staleness(name, n, options.commits, options.seed) for name in KINDS for n in WORKERS}
    outcome.say("  workers    n-1   mean (standard deviation) of the staleness")
    for n in WORKERS:
        cells = "".join(f"   {name}: {found[name, n].mean():6.3f} ({found[name, n].std():5.2f})" for name in KINDS)
        outcome.say(f"  {n:7}  {n - 1:5}{cells}")
    for name in KINDS:
        worst = max(abs(found[name, n].mean() / (n - 1) - 1) for n in WORKERS)
        outcome.criterion(
            f"{name}: the mean is n - 1 within 1 %. Value: the largest relative deviation", worst, worst < 0.01
        )
    spread = max(int(np.ptp(found["in turn", n])) for n in WORKERS)
    outcome.criterion(
        "in turn: all commits have the same staleness. Value: the largest difference", spread, spread == 0
    )
    distances = []
    for n in WORKERS:
        counts = np.bincount(found["exponential", n]) / found["exponential", n].size
        geometric = (1 / n) * (1 - 1 / n) ** np.arange(counts.size)
        distances.append(float((np.abs(counts - geometric).sum() + 1 - geometric.sum()) / 2))
    words = "exponential: the total variation distance from (1/n)(1-1/n)^l is below 0.1. Value: the largest distance"
    outcome.criterion(words, max(distances), max(distances) < 0.1)

    figure, (axes_of,) = panels(2, sharey=False)
    for axes, name in zip(axes_of, ("10 % jitter", "exponential"), strict=True):
        for colour, n in zip(COLOURS, WORKERS, strict=False):
            counts = np.bincount(found[name, n]) / found[name, n].size
            axes.stairs(counts, np.arange(counts.size + 1) - 0.5, color=colour, label=f"{n} workers")
            axes.axvline(n - 1, color=colour, linewidth=1, linestyle=":")
            if name == "exponential":
                k = np.arange(4 * n)
                axes.plot(k, (1 / n) * (1 - 1 / n) ** k, color="black", linewidth=0.8)
        axes.set_title(f"steps of {'exponential length' if name == 'exponential' else 'equal length, ' + name}")
        axes.set_xlabel("staleness (dotted: n - 1)")
        axes.set_ylabel("fraction of commits")
    axes_of[0].set_xlim(-1, 90)
    axes_of[1].set_xlim(-1, 150)
    figure.legend(*axes_of[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    outcome.save(figure)
    means = [
        {"kind": name, "workers": n, "mean": float(values.mean()), "standard_deviation": float(values.std())}
        for (name, n), values in found.items()
    ]
    return outcome.conclude(commits=options.commits, staleness=means)


if __name__ == "__main__":
    sys.exit(main())
