"""B16: the spread of gossiping workers as a function of their number.

Jin, Yuan, Iandola, Keutzer 2016, https://arxiv.org/abs/1611.04581, section 3: each of p workers pulls from (or pushes
to) another one drawn uniformly. The spread of the workers is V = sum_i |x_i - mean|^2. The pull of one worker
multiplies it on average by

    c(p) = 1 - (p + 1)/(2p(p - 1))

and moves the mean of the workers at random: E|mean' - mean|^2 = V/(2p^2(p - 1)). A round, in which each worker pushes
once, multiplies V by the factor that ``mpitrain.theory.push_contraction(p)`` returns.

With curvature h and gradient noise of variance sigma^2, V settles where the noise of the steps and the contraction of
the pulls balance. The script measures V/(p - 1) in units of (eta sigma)^2, for workers that step one after the other in
random order, as asynchronous workers do. For 2 and 3 workers, it also computes this value from the second moments of x,
one for each possible set of pairs that have averaged since their last steps (the function ``settled``).

All of this is measured on the steps that the gossip method makes in training.

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
from mpitrain.simulation.schedules import RandomOrder, RoundRobin, Scripted
from mpitrain.simulation.world import SimulatedWorld

Array = NDArray[np.float64]

WORKERS = (2, 3, 4, 5, 6, 8, 12, 16, 24, 32)
N = 64  # coordinates, each with noise of its own
ETA, H, SIGMA = 0.1, 1.0, 1.0
BURN_IN = 40  # steps of each worker: the start is forgotten
BATCHES = 20  # of rounds, for the standard error of an average over a run
LIMIT = 4.0  # standard errors
MOST_EXACT = 3  # workers for which all second moments are computed


def pull_contraction(p: int) -> float:
    """Return the mean of V'/V when one worker pulls."""
    return 1 - (p + 1) / (2 * p * (p - 1))


def pull_mean_variance(p: int) -> float:
    """Return the mean of |mean' - mean|^2/V when one worker pulls."""
    return 1 / (2 * p**2 * (p - 1))


def settled(p: int) -> float:
    """Return V/(p - 1) per coordinate in units of (eta sigma)^2, for noisy steps in random order, each before a pull.

    Worker i steps, x_i <- (1 - eta h) x_i + noise, and everybody may average with it again; it draws j and, unless it
    has averaged with this x_j, sets x_i <- (x_i + x_j)/2. With M_s = E[x x^T; s], s being who has averaged with whom,
    one event maps all M_s linearly; this iterates the map. There are 2^(p(p - 1)) sets s.
    """
    pairs = [(i, j) for i in range(p) for j in range(p) if i != j]
    bit = {pair: 1 << k for k, pair in enumerate(pairs)}
    states = np.arange(1 << len(pairs))
    events = []
    for i, j in pairs:
        fresh = states & ~sum(bit[k, i] for k in range(p) if k != i)
        step, pull, noise = np.eye(p), np.eye(p), np.zeros((p, p))
        step[i, i], noise[i, i], pull[i] = 1 - ETA * H, 1.0, 0.0
        pull[i, [i, j]] = 0.5
        seen = (fresh & bit[i, j]) > 0
        events.append((fresh | bit[i, j], np.where(seen[:, None, None], np.eye(p), pull), step, noise))
    share, moments = np.zeros(len(states)), np.zeros((len(states), p, p))
    share[0], spread_before = 1.0, -1.0
    centre = np.eye(p) - 1 / p
    while abs((now := float(np.einsum("sij,ij->", moments, centre))) - spread_before) > 1e-9:
        spread_before = now
        for _ in range(2 * p):
            new_share, new_moments = np.zeros_like(share), np.zeros_like(moments)
            for to, pull, step, noise in events:
                moved = step @ moments @ step.T + share[:, None, None] * noise
                np.add.at(new_share, to, share / len(events))
                np.add.at(new_moments, to, pull @ moved @ pull.transpose(0, 2, 1) / len(events))
            share, moments = new_share, new_moments
    return now / (p - 1)


def gossip(direction: str, p: int, seed: int, *, eta: float, in_turn: bool) -> Simulation:
    """Create p workers at 0 with noisy gradients that exchange after every step, in random order or lock by lock."""
    noise = np.random.default_rng([seed, p])
    return Simulation(
        GossipSGD(direction=direction, grad_point="post"),
        SimulatedWorld(p, RoundRobin() if in_turn else RandomOrder(seed), interleave_locks=in_turn),
        lambda rank, x: H * x - SIGMA * noise.standard_normal(N),
        np.zeros(N),
        learning_rate=eta,
        seed=seed,
    )


def spread(x: Array) -> float:
    """Return V of (p, n)."""
    return float(((x - x.mean(0)) ** 2).sum())


def place(simulation: Simulation, x: Array) -> None:
    """Give the workers parameters (p, n)."""
    for worker, row in zip(simulation.workers, x, strict=True):
        worker.x.local[...] = row


def pulls(p: int, n_pulls: int) -> Array:
    """Return V'/V and |mean' - mean|^2/V, (pulls, 2), of single steps that pull, from random starts."""
    simulation, starts = gossip("pull", p, 0, eta=0.0, in_turn=True), np.random.default_rng(p)
    found = np.zeros((n_pulls, 2))
    for k in range(n_pulls):
        i = int(starts.integers(p))
        others = [j for j in range(p) if j != i]
        simulation.world.schedule = Scripted([i, *others])  # every other worker has stepped since i pulled
        simulation.run(2)
        x = starts.standard_normal((p, N))
        place(simulation, x)
        simulation.world.schedule = Scripted([i])
        after = simulation.run(2).x()
        found[k] = spread(after) / spread(x), ((after.mean(0) - x.mean(0)) ** 2).sum() / spread(x)
    return found


def pushes(p: int, n_rounds: int) -> Array:
    """Return V'/V, (rounds,), of rounds of pushes from random starts: each worker yields before every lock."""
    simulation, starts = gossip("push", p, 0, eta=0.0, in_turn=True), np.random.default_rng(p)
    found = np.zeros(n_rounds)
    for k in range(n_rounds):
        x = starts.standard_normal((p, N))
        place(simulation, x)
        found[k] = spread(simulation.run(1).x()) / spread(x)
    return found


def noisy_order(p: int, n_rounds: int) -> Array:
    """Return V/(p - 1) per coordinate in units of (eta sigma)^2, (rounds,), for steps in random order.

    A round is p steps, by workers drawn one by one.
    """
    simulation, order = gossip("pull", p, 1, eta=ETA, in_turn=False), np.random.default_rng([2, p])
    found = np.zeros(BURN_IN + n_rounds)
    for k in range(len(found)):
        simulation.world.schedule = Scripted(order.integers(p, size=p).tolist())
        found[k] = spread(simulation.run(p + 1).x())
    return found[BURN_IN:] / ((p - 1) * N * (ETA * SIGMA) ** 2)


def mean_and_error(values: Array) -> tuple[float, float]:
    """Return the mean of (k,) numbers in time order and its standard error, from batch means."""
    batches = np.array([batch.mean() for batch in np.array_split(values, BATCHES)])
    return float(values.mean()), float(batches.std(ddof=1) / np.sqrt(BATCHES))


FORMULAS = {
    "pull": pull_contraction,
    "drift": pull_mean_variance,
    "push": theory.push_contraction,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=400, help="of each measurement (default: %(default)s)")
    options = made.parse_args(arguments)
    outcome = Outcome("gossip_spread", options)

    outcome.say("measured and formula: V'/V of a pull, |mean' - mean|^2/V of it, V'/V of a round of pushes;")
    outcome.say("V/(p - 1) with noise, in units of (eta sigma)^2, in random order")
    outcome.say("  p             pull             drift              push             noise")
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in (*FORMULAS, "noise")}
    exact = {p: settled(p) for p in WORKERS if p <= MOST_EXACT}
    for p in WORKERS:
        pull = pulls(p, options.rounds)
        columns = (pull[:, 0], pull[:, 1], pushes(p, options.rounds), noisy_order(p, options.rounds))
        for column, values in zip(found.values(), columns, strict=True):
            column.append(mean_and_error(values))
        pairs = "".join(f"{found[name][-1][0]:9.4f}/{formula(p):.4f}  " for name, formula in FORMULAS.items())
        outcome.say(f"{p:3}{pairs}{found['noise'][-1][0]:9.4f}" + (f"/{exact[p]:.4f}" if p in exact else ""))

    wanted = {name: [formula(p) for p in WORKERS] for name, formula in FORMULAS.items()} | {
        "noise": list(exact.values())
    }
    for name, words in {
        "pull": "a pull multiplies V by 1-(p+1)/(2p(p-1))",
        "drift": "a pull moves the mean by a squared distance of V/(2p^2(p-1))",
        "push": "a round of pushes multiplies V by the factor of the theory",
        "noise": "with noise, V settles at the value from the second moments",
    }.items():
        mean, error = np.array(found[name])[: len(wanted[name])].T
        off = float((np.abs(mean - wanted[name]) / np.maximum(error, 1e-12)).max())
        outcome.criterion(f"{words}. Value: the largest deviation in standard errors", off, off < LIMIT)

    draw(outcome, found)
    return outcome.conclude(
        workers=WORKERS,
        rounds=options.rounds,
        formula=wanted,
        measured={name: {"mean": np.array(c)[:, 0], "standard_error": np.array(c)[:, 1]} for name, c in found.items()},
    )


def draw(outcome: Outcome, found: dict[str, list[tuple[float, float]]]) -> None:
    """Draw one round on the left and the spread under noise on the right."""
    figure, ((left, right),) = panels(2)
    every = np.arange(WORKERS[0], WORKERS[-1] + 1)
    for axes, name, colour, marker, label in (
        (left, "push", COLOURS[1], "s", "push"),
        (left, "pull", COLOURS[0], "o", "pull"),
        (right, "noise", COLOURS[0], "o", "pull, in random order"),
    ):
        mean, error = np.array(found[name]).T
        formula = FORMULAS.get(name)
        if formula is not None:
            axes.plot(every, [formula(int(p)) for p in every], color=colour, label=f"{label}: formula")
            label = f"{label}: measured"
        axes.errorbar(
            WORKERS, mean, 2 * error, fmt=marker, color=colour, markersize=4.5, markerfacecolor="white", label=label
        )
    left.set_ylabel("spread after a pull, or a round of pushes / before it")
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
