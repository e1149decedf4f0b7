"""B13: between two valleys, an average is worse than its members and traps them; a leader does not.

LGD and EAGD are LSGD and EASGD with exact gradients. Teng et al. 2019, arXiv 1905.10395, report that LGD beats EAGD in
low-rank matrix completion at every rank. The sizes of the matrices here, and the thresholds of the double well, are not
from the paper.

Double well f(x) = (1 - x^2)^2/4, with one worker in each valley: in each step, the center or the leader pulls both
workers by a fraction of their distance from it, the "pull". With elastic averaging, the center stays on the hill
between the valleys up to pull/eta = 2/3; this is a local minimum of the sum that elastic averaging minimises. With a
leader, a follower stays in its valley only up to pull/eta = 1/4, and the leader reaches the bottom of its own valley
with any pull.

Matrix completion: half of the entries of a symmetric matrix of rank r are known. The objective F, a function of X
(d, r), is a quarter of the squared error of X X' in the known entries. If X is a solution, then X Q is a solution for
every rotation Q, and a mean of different solutions is not. As in the paper, the best of eight workers counts. The table
includes the cells in which LGD loses: under a strong pull, all workers follow the first leader immediately, and if it
reaches a plateau (rank 5, pull 0.1), no worker is left to find a way around the plateau.

    python -m benchmarks.reproduce.leader_escape [--steps 400] [--seeds 3] [--ranks 1 5 20] [--out DIR] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.reproduce.figure import COLOURS, Outcome, panels, parser
from mpitrain.algorithms.base.method import Method
from mpitrain.algorithms.elastic.easgd import EASGD
from mpitrain.algorithms.leader.lsgd import LSGD
from mpitrain.simulation.communicator import SimulatedCommunicator
from mpitrain.simulation.engine import Simulation
from mpitrain.simulation.world import SimulatedWorld

Array = NDArray[np.float64]

WELL_PULL, WELL_STEPS = 0.08, 12_000
RATIOS = np.arange(0.1, 1.0, 0.005)
EASGD_TRAP, LGD_TRAP = 2 / 3, 1 / 4

SIZE, WORKERS, LEARNING_RATE, KNOWN = 40, 8, 0.1, 0.5
PULLS = (0.003, 0.01, 0.03, 0.1)
SHOWN = 0.01
POINTS = 20
METHODS: dict[str, Callable[[float], Method]] = {
    "EAGD": lambda pull: EASGD(moving_rate=pull, period=1, synchronous=True),
    "LGD": lambda pull: LSGD(pull=pull, global_pull=0.0, period=1, synchronous=True, grad_point="pre"),
}


def double_well(method: str) -> Array:
    """Return where workers from (.9, -.899) and the center from 0 end, (2 + center, ratios), for each pull/eta.

    Every ratio is a coordinate of its own: the pull is the same for all, the learning rate is in the gradient.
    """
    eta = WELL_PULL / RATIOS

    def gradient(rank: int, x: Array) -> Array:
        found: Array = eta * (x**3 - x)
        return found

    def loss(rank: int, x: Array) -> float:
        return 0.25 * float(((1 - x**2) ** 2).sum())

    start = np.array([[0.9], [-0.899]]) * np.ones(RATIOS.size)
    simulation = Simulation(METHODS[method](WELL_PULL), SimulatedWorld(2), gradient, start, 1.0, loss=loss)
    put_center(simulation, np.zeros(RATIOS.size))
    simulation.run(WELL_STEPS)
    return np.vstack([simulation.x(), simulation.consensus()])


def put_center(simulation: Simulation, center: Array) -> None:
    """Move the center's start away from worker 0, for methods that have a center."""

    def program(comm: SimulatedCommunicator) -> None:
        worker = simulation.workers[comm.rank]
        state = dict(worker.state())
        worker.load({**state, "center": center} if "center" in state else state)

    simulation.world.run(program)


@dataclass
class Completion:
    """A symmetric matrix of known rank with half of its entries known.

    Args:
        rank: r.
        seed: Of the matrix, the entries and the starts.
    """

    rank: int
    seed: int

    def __post_init__(self) -> None:
        rng = np.random.default_rng([self.seed, self.rank])
        y = rng.normal(size=(SIZE, self.rank)) / np.sqrt(SIZE)
        self.matrix = y @ y.T
        known = np.triu(rng.random((SIZE, SIZE)) < KNOWN)
        self.weights = (known | known.T) / KNOWN
        self.starts = rng.normal(size=(WORKERS, SIZE * self.rank)) / np.sqrt(SIZE)

    def loss(self, worker: int, x: Array) -> float:
        """Compute F(X) = sum over known (i, j) of (X X' - M)_ij^2 / 4, per fraction known."""
        factor = x.reshape(SIZE, self.rank)
        return 0.25 * float((self.weights * (factor @ factor.T - self.matrix) ** 2).sum())

    def gradient(self, worker: int, x: Array) -> Array:
        """Return the gradient of F, (d*r,)."""
        factor = x.reshape(SIZE, self.rank)
        found: Array = ((self.weights * (factor @ factor.T - self.matrix)) @ factor).ravel()
        return found


def complete(problem: Completion, method: Method, n_steps: int) -> Array:
    """Return F of the best worker and of the consensus over time, (points + 1, 2)."""
    simulation = Simulation(
        method, SimulatedWorld(WORKERS), problem.gradient, problem.starts, LEARNING_RATE, loss=problem.loss
    )

    def snapshot() -> list[float]:
        return [min(problem.loss(0, x) for x in simulation.x()), problem.loss(0, simulation.consensus())]

    seen = [snapshot()]
    for _ in range(POINTS):
        simulation.run(n_steps // POINTS)
        seen.append(snapshot())
    return np.array(seen)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    made = parser(__doc__)
    made.add_argument("--steps", type=int, default=400, help="of each worker, a multiple of 20 (default: %(default)s)")
    made.add_argument("--seeds", type=int, default=3, help="problems of each rank (default: %(default)s)")
    made.add_argument("--ranks", type=int, nargs="+", default=[1, 5, 20], help="of the matrices (default: 1 5 20)")
    options = made.parse_args(arguments)
    if options.steps < POINTS or options.steps % POINTS:
        made.error(f"--steps must be a multiple of {POINTS}")
    if options.seeds < 1 or not all(1 <= rank <= SIZE for rank in options.ranks):
        made.error(f"--seeds must be 1 or more, and --ranks from 1 to {SIZE}")
    outcome = Outcome("leader_escape", options)

    well = {name: double_well(name) for name in METHODS}
    stays = {"EAGD": np.abs(well["EAGD"][2]) < 0.5, "LGD": well["LGD"][1] < 0}
    found = {name: float(RATIOS[trapped].max()) for name, trapped in stays.items()}
    outcome.say("double well: largest pull/eta at which")
    outcome.say(f"  the center of EAGD stays on the hill     {found['EAGD']:.3f}  (2/3)")
    outcome.say(f"  a follower of LGD stays in its valley    {found['LGD']:.3f}  (1/4)")

    curves = {
        (name, rank, pull): np.median(
            [complete(Completion(rank, seed), make(pull), options.steps) for seed in range(options.seeds)], axis=0
        )
        for name, make in METHODS.items()
        for rank in options.ranks
        for pull in PULLS
    }
    outcome.say()
    outcome.say(f"matrix completion, F after {options.steps} steps, median of {options.seeds}")
    outcome.say("                     best worker        consensus")
    outcome.say("  rank   pull      EAGD       LGD       EAGD       LGD")
    for rank in options.ranks:
        for pull in PULLS:
            (best, center), (leader, mean) = (curves[name, rank, pull][-1] for name in METHODS)
            outcome.say(f"  {rank:4} {pull:6g}  {best:8.1e}  {leader:8.1e}   {center:8.1e}  {mean:8.1e}")

    for name, wanted in (("EAGD", EASGD_TRAP), ("LGD", LGD_TRAP)):
        error = abs(found[name] - wanted)
        outcome.criterion(
            f"{name}: the trap ends within 0.01 of pull/eta = {wanted:.3f}. Value: the difference", error, error < 0.01
        )
    trapped = float(np.abs(well["EAGD"][2, RATIOS < 0.65]).max())
    outcome.criterion(
        "EAGD: in the trap, the center stays on the hill. Value: its largest distance from the top",
        trapped,
        trapped < 1e-3,
    )
    leader = float(np.abs(well["LGD"][0] - 1).max())
    outcome.criterion(
        "LGD's leader is at the bottom of its valley at every pull. Value: its largest distance from it",
        leader,
        leader < 1e-6,
    )

    def best(name: str, rank: int, pulls: Sequence[float]) -> float:
        return min(float(curves[name, rank, pull][-1, 0]) for pull in pulls)

    for words, pulls in ((f"pull {SHOWN:g}", [SHOWN]), ("the best pull of each", PULLS)):
        worst = max(best("LGD", rank, pulls) / best("EAGD", rank, pulls) for rank in options.ranks)
        outcome.criterion(
            f"{words}: at every rank, the F of LGD's best worker is below EAGD's. Value: the largest ratio",
            worst,
            worst < 1,
        )

    figure, ((left, middle, right),) = panels(3)
    left.plot(RATIOS, well["EAGD"][2], color=COLOURS[0], label="EAGD, center")
    left.plot(RATIOS, well["LGD"][1], color=COLOURS[1], linestyle="--", label="LGD, follower")
    for ratio in (LGD_TRAP, EASGD_TRAP):
        left.axvline(ratio, color="black", linewidth=0.8)
    left.set_title("double well: who leaves")
    left.set_xlabel("pull/η (lines: 1/4, 2/3)")
    left.set_ylabel("where it ends")
    for k, rank in enumerate(options.ranks):
        colour = COLOURS[k % len(COLOURS)]
        for name, dash in zip(METHODS, ("-", "--"), strict=True):
            steps = np.linspace(0, options.steps, POINTS + 1)
            style = {"color": colour, "linestyle": dash, "label": f"{name}, rank {rank}"}
            middle.plot(steps, curves[name, rank, SHOWN][:, 0], **style)
            values = [curves[name, rank, pull][-1, 0] for pull in PULLS]
            right.plot(PULLS, values, marker="o", markersize=4, **style)
    middle.set_title(f"matrix completion, pull {SHOWN:g}")
    middle.set_xlabel("steps")
    right.set_title(f"after {options.steps} steps")
    right.set_xlabel("pull per step")
    right.set_xscale("log")
    for axes in (middle, right):
        axes.set_yscale("log")
        axes.set_ylabel("F of the best worker")
    left.legend(frameon=False)
    middle.legend(frameon=False, fontsize="small")
    outcome.save(figure)
    cells = [
        {"method": name, "rank": rank, "pull": pull, "best_worker": curve[-1, 0], "evaluated": curve[-1, 1]}
        for (name, rank, pull), curve in curves.items()
    ]
    return outcome.conclude(largest_trapping_ratio=found, steps=options.steps, completion=cells)


if __name__ == "__main__":
    sys.exit(main())
