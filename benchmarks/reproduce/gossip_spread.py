"""B16: the spread of gossiping workers as a function of their number.

Jin, Yuan, Iandola, Keutzer 2016, https://arxiv.org/abs/1611.04581, section 3: each of p workers pulls from (or pushes
to) another one drawn uniformly. One round of pulls, all from the old state, multiplies the spread
V = sum_i |x_i - mean|^2 on average by

    c(p) = (p - 2)(2p - 3)/(4(p - 1)^2)

and moves the mean at random: E|mean' - mean|^2 = V (p - 2)/(4p(p - 1)^2). A round of pushes shrinks V by less (theory:
push_contraction). With curvature h and gradient noise of variance sigma^2 the spread settles where a step and a round
of pulls balance:

    V/(p - 1) = c (eta sigma)^2/(1 - c (1 - eta h)^2)

All of it is measured on the method itself, in rounds. Beside it the spread of workers that step one after the other in
random order, as asynchronous ones do: who pulls then finds what its peer published before its last step, and the
workers stay further apart. There is no formula for that here.

    python -m benchmarks.reproduce.gossip_spread [--rounds 400] [--out runs/reproduce] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from benchmarks.reproduce.figure import COLOURS, Outcome, panels, parser
from mpitrain import theory
from mpitrain.algorithms import GossipSGD
from mpitrain.simulation.engine import Simulation
from mpitrain.simulation.schedules import RandomOrder, RoundRobin
from mpitrain.simulation.world import SimulatedWorld

Array = NDArray[np.float64]

WORKERS = (2, 3, 4, 5, 6, 8, 12, 16, 24, 32)
N = 64  # coordinates, each with noise of its own
ETA, H, SIGMA = 0.1, 1.0, 1.0
BURN_IN = 40  # rounds: the start is forgotten by a factor c (1 - eta h)^2 < 0.41 in each
BATCHES = 20  # of rounds, for the standard error of an average over a run
LIMIT = 4.0  # standard errors


def settled(p: int) -> float:
    """Return V/(p - 1) per coordinate in units of (eta sigma)^2, for noisy steps each followed by a round of pulls."""
    c = theory.pull_contraction(p)
    return c / (1 - c * (1 - ETA * H) ** 2)


def gossip(direction: str, p: int, seed: int, *, in_turn: bool) -> Simulation:
    """Create p workers at 0 with noisy gradients that exchange after every step, in random order or lock by lock."""
    noise = np.random.default_rng([seed, p])
    return Simulation(
        GossipSGD(direction=direction, grad_point="post"),
        SimulatedWorld(p, RoundRobin() if in_turn else RandomOrder(seed), interleave_locks=in_turn),
        lambda rank, x: H * x - SIGMA * noise.standard_normal(N),
        np.zeros(N),
        learning_rate=ETA,
        seed=seed,
    )


def round_of_pulls(simulation: Simulation) -> None:
    """Let every worker pull once, all from the old state."""
    for worker in simulation.workers:
        worker.average_with(worker.comm.rank)  # with itself: publishes x and changes nothing
    for worker in simulation.workers:
        worker.exchange()


def round_of_pushes(simulation: Simulation) -> None:
    """Let every worker push once and then read its mailbox; each yields before every lock."""
    simulation.world.run(lambda comm: simulation.workers[comm.rank].exchange())


def spread(x: Array) -> float:
    """Return V of (p, n)."""
    return float(((x - x.mean(0)) ** 2).sum())


def one_round(direction: str, p: int, n_rounds: int) -> Array:
    """Return V'/V and |mean' - mean|^2/V, (rounds, 2), of rounds with random starts."""
    simulation, starts = gossip(direction, p, 0, in_turn=True), np.random.default_rng(p)
    found = np.zeros((n_rounds, 2))
    for k in range(n_rounds):
        x = starts.standard_normal((p, N))
        for worker, row in zip(simulation.workers, x, strict=True):
            worker.x.local[...] = row
        (round_of_pulls if direction == "pull" else round_of_pushes)(simulation)
        after = simulation.x()
        found[k] = spread(after) / spread(x), ((after.mean(0) - x.mean(0)) ** 2).sum() / spread(x)
    return found


def noisy_rounds(p: int, n_rounds: int) -> Array:
    """Return V/(p - 1) per coordinate after each round, (rounds,), in units of (eta sigma)^2."""
    simulation, found = gossip("pull", p, 1, in_turn=True), []
    for _ in range(BURN_IN + n_rounds):
        for worker in simulation.workers:
            x = worker.x.local
            x -= ETA * simulation.gradient(worker.comm.rank, x)
        round_of_pulls(simulation)
        found.append(spread(simulation.x()))
    return np.array(found[BURN_IN:]) / ((p - 1) * N * (ETA * SIGMA) ** 2)


def noisy_order(p: int, n_rounds: int) -> Array:
    """Return the same for whole steps in random order."""
    simulation = gossip("pull", p, 1, in_turn=False).run(BURN_IN)
    found = [spread(simulation.run(1).x()) for _ in range(n_rounds)]
    return np.array(found) / ((p - 1) * N * (ETA * SIGMA) ** 2)


def mean_and_error(values: Array) -> tuple[float, float]:
    """Return the mean of (k,) numbers in time order and its standard error, from batch means."""
    batches = np.array([batch.mean() for batch in np.array_split(values, BATCHES)])
    return float(values.mean()), float(batches.std(ddof=1) / np.sqrt(BATCHES))


FORMULAS = {
    "pull": theory.pull_contraction,
    "drift": theory.pull_mean_variance,
    "push": theory.push_contraction,
    "noise": settled,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=400, help="of each measurement (default: %(default)s)")
    options = made.parse_args(arguments)
    outcome = Outcome("gossip_spread", options)

    outcome.say("measured and formula: V'/V of a round of pulls, |mean' - mean|^2/V of it, V'/V of a round of pushes;")
    outcome.say("V/(p - 1) with noise, in units of (eta sigma)^2, in rounds, and measured in random order")
    outcome.say("  p             pull             drift              push             noise   random order")
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in (*FORMULAS, "random order")}
    for p in WORKERS:
        pull, push = one_round("pull", p, options.rounds), one_round("push", p, options.rounds)
        columns = (pull[:, 0], pull[:, 1], push[:, 0], noisy_rounds(p, options.rounds), noisy_order(p, options.rounds))
        for column, values in zip(found.values(), columns, strict=True):
            column.append(mean_and_error(values))
        pairs = "".join(f"{found[name][-1][0]:9.4f}/{formula(p):.4f}  " for name, formula in FORMULAS.items())
        outcome.say(f"{p:3}{pairs}{found['random order'][-1][0]:13.4f}")

    for name, words in {
        "pull": "a round of pulls multiplies V by (p-2)(2p-3)/(4(p-1)^2)",
        "drift": "it moves the mean by V(p-2)/(4p(p-1)^2)",
        "push": "a round of pushes multiplies V as the theory says",
        "noise": "with noise V settles where the formula says",
    }.items():
        mean, error = np.array(found[name]).T
        wanted = np.array([FORMULAS[name](p) for p in WORKERS])
        off = float((np.abs(mean - wanted) / np.maximum(error, 1e-12)).max())
        outcome.criterion(f"{words}; largest deviation in standard errors", off, off < LIMIT)
    apart = np.array(found["random order"])[:, 0] - np.array(found["noise"])[:, 0]
    outcome.criterion("in random order V is larger, mean difference", float(apart.mean()), apart.mean() > 0)

    draw(outcome, found)
    return outcome.conclude(
        workers=WORKERS,
        rounds=options.rounds,
        formula={name: [formula(p) for p in WORKERS] for name, formula in FORMULAS.items()},
        measured={name: {"mean": np.array(c)[:, 0], "standard_error": np.array(c)[:, 1]} for name, c in found.items()},
    )


def draw(outcome: Outcome, found: dict[str, list[tuple[float, float]]]) -> None:
    """Draw one round on the left and the spread under noise on the right."""
    figure, ((left, right),) = panels(2)
    every = np.arange(WORKERS[0], WORKERS[-1] + 1)
    for axes, name, colour, marker, label in (
        (left, "push", COLOURS[1], "s", "push"),
        (left, "pull", COLOURS[0], "o", "pull"),
        (right, "random order", COLOURS[2], "^", "pull, in random order"),
        (right, "noise", COLOURS[0], "o", "pull, in rounds"),
    ):
        mean, error = np.array(found[name]).T
        formula = FORMULAS.get(name)
        if formula is not None:
            axes.plot(every, [formula(int(p)) for p in every], color=colour, label=f"{label}: formula")
            label = f"{label}: measured"
        axes.errorbar(
            WORKERS, mean, 2 * error, fmt=marker, color=colour, markersize=4.5, markerfacecolor="white", label=label
        )
    left.set_ylabel("spread after a round / before it")
    left.set_title("One round of gossip")
    right.set_ylabel(r"spread, $V\,/\,(p-1)(\eta\sigma)^2$")
    right.set_title(rf"With gradient noise, $\eta h$ = {ETA * H:g}")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks([2, 4, 8, 16, 32], ["2", "4", "8", "16", "32"])
        axes.set_xlabel("workers")
        axes.set_ylim(bottom=0)
        axes.legend(loc="lower right", frameon=False)
    outcome.save(figure)


if __name__ == "__main__":
    sys.exit(main())
