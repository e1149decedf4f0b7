"""B5: a bound from the spread of the inputs, a negative best moving rate, and a trap between two valleys.

Zhang's thesis, 2016, https://arxiv.org/abs/1605.02216, chapter 5. The figure has three panels.

1. The noise is multiplicative: in each gradient, the curvature is a random number u ~ Gamma(lam, om). If p workers
   average their gradients, a step multiplies E x^2 by 1/(p lam + 1) at best. The wider the spread of the inputs is
   (small lam), the more workers it takes to gain anything.
2. For a fixed learning rate eta, curvature h and center rate beta, the mean of the workers and the center of EASGD
   converge fastest at a negative moving rate alpha. The panel also shows the price: a step multiplies the differences
   between workers by 1 - eh - alpha, where eh is eta times h. This factor is above 1 at the best moving rate.
3. In a double well, a function with two minima, two workers of EASGD rest in different wells, and the center rests on
   the saddle between them, as long as rho < 2/3.

All of this is measured on mpitrain's all-reduce SGD and EASGD with simulated workers.

    python -m benchmarks.reproduce.input_spread [--samples 20000] [--steps 15000] [--out runs/reproduce] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from benchmarks.reproduce.figure import COLOURS, Outcome, panels, parser
from benchmarks.reproduce.linear import place
from mpitrain import theory
from mpitrain.algorithms import AllReduceSGD
from mpitrain.algorithms.elastic.easgd import EASGD
from mpitrain.simulation.engine import Simulation
from mpitrain.simulation.world import SimulatedWorld

Array = NDArray[np.float64]

SHAPES = (0.1, 0.5, 2.0)
WORKERS = (1, 2, 4, 8, 16, 32, 64)
EH, BETA = 0.1, 0.9
N_EASGD = 4
RHOS = np.arange(1, 50) * 0.02  # 0.66 and 0.68 are next to 2/3
WELL_START = (0.9, -0.899, 0.0)
WELL_LARGEST_ETA = 0.4  # gradient descent in a well is stable below 1
WELL_GROUPS = (RHOS < 0.1, (RHOS >= 0.1) & (RHOS < 0.3), RHOS >= 0.3)  # each with one moving rate


def sampled_factor(shape: float, p: int, n: int, rng: np.random.Generator) -> tuple[float, float]:
    """Return E x_{t+1}^2 / E x_t^2 at the best learning rate and its standard error, from n mini-batches of p draws.

    Each of n coordinates takes one step from 1 with p workers, whose gradients are averaged.
    """
    eta, _ = theory.spread_sgd_optimum(shape, shape, p)
    world = SimulatedWorld(p)
    simulation = Simulation(
        AllReduceSGD(), world, lambda rank, x: rng.gamma(shape, 1 / shape, n) * x, np.ones(n), learning_rate=eta
    )
    squares = simulation.run(1).consensus() ** 2
    return float(squares.mean()), float(squares.std() / np.sqrt(n))


def elastic(alpha: float, x: Array, c: Array) -> Simulation:
    """Create synchronous workers at ``x`` (p, n) with their center at ``c`` (n,), on the quadratic with eh = EH."""
    method = EASGD(moving_rate=alpha, center_rate=BETA / N_EASGD, period=1, synchronous=True)
    simulation = Simulation(method, SimulatedWorld(N_EASGD), lambda rank, x: x, x, EH)
    place(simulation, x, center=c)
    return simulation


def one_step(alpha: float) -> tuple[float, float]:
    """Return the factors of a step of EASGD: the radius for mean and center, and that of the workers' differences.

    Three coordinates start with the workers at 1, with the center at 1, and with two workers at 1 and -1.
    """
    x, c = np.zeros((N_EASGD, 3)), np.array([0.0, 1.0, 0.0])
    x[:, 0] = 1.0
    x[:2, 2] = 1.0, -1.0
    simulation = elastic(alpha, x, c).run(1)
    after, center = simulation.x(), simulation.consensus()
    radius = theory.spectral_radius(np.array([after.mean(0)[:2], center[:2]]))
    return radius, abs(float(after[0, 2] - after[1, 2])) / 2


def simulated_rate(alpha: float, n_steps: int = 400) -> float:
    """Return the late contraction per step of EASGD with equal workers, from a long run."""
    simulation = elastic(alpha, np.ones((N_EASGD, 1)), np.full(1, 0.3))

    def size() -> float:
        return float(np.hypot(simulation.x()[0, 0], simulation.consensus()[0]))  # equal workers stay equal, bit for bit

    half = n_steps // 2
    simulation.run(half)
    early = size()
    simulation.run(half)
    return float((size() / early) ** (1 / half))


def double_well_ends(rhos: Array, n_steps: int) -> Array:
    """Return where EASGD ends in the double well: (x_1, x_2, c) for each rho, shape (3, rhos).

    Workers and center move by the same eta*rho for all rhos of a group, each of which has a learning rate of its own.
    """
    ends = np.zeros((3, len(rhos)))
    for group in WELL_GROUPS:
        alpha = WELL_LARGEST_ETA * rhos[group].min()
        eta, start = alpha / rhos[group], np.outer(WELL_START, np.ones(group.sum()))
        method = EASGD(moving_rate=alpha, period=1, synchronous=True)
        simulation = Simulation(
            method, SimulatedWorld(2), lambda rank, x, eta=eta: eta * theory.double_well_gradient(x), start[:2], 1.0
        )
        place(simulation, start[:2], center=start[2])
        simulation.run(n_steps)
        ends[:, group] = np.vstack([simulation.x(), simulation.consensus()])
    return ends


def spread(outcome: Outcome, axes: Axes, n: int) -> dict[str, Any]:
    """Draw picture 1."""
    rng = np.random.default_rng(0)
    outcome.say("  shape  workers   1/(p lam+1)   measured   standard errors off")
    worst, rows = 0.0, []
    p_line = np.geomspace(WORKERS[0], WORKERS[-1], 100)
    for colour, shape in zip(COLOURS, SHAPES):
        measured = [sampled_factor(shape, p, n, rng) for p in WORKERS]
        for p, (factor, error) in zip(WORKERS, measured):
            off = abs(factor - theory.spread_sgd_optimum(shape, shape, p)[1]) / error
            worst = max(worst, off)
            rows.append({"shape": shape, "p": p, "factor": factor, "standard_error": error})
            outcome.say(f"{shape:7g}{p:9}{1 / (p * shape + 1):14.4f}{factor:11.4f}{off:15.2f}")
        axes.plot(p_line, 1 / (p_line * shape + 1), color=colour, label=f"λ = {shape:g}")
        factors, errors = np.array(measured).T
        axes.errorbar(WORKERS, factors, 4 * errors, fmt="o", color=colour, markersize=4, capsize=2)
    outcome.criterion(
        "all sampled rates within 4 standard errors of 1/(p lam + 1). Value: the largest deviation in standard errors",
        worst,
        worst < 4,
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(WORKERS, [str(p) for p in WORKERS])
    axes.set_title("Input spread bounds the speed-up")
    axes.set_xlabel("workers (or samples) averaged a step")
    axes.set_ylabel("best E x² ratio a step: 1/(pλ+1)")
    axes.legend(frameon=False, title="lines: theory, dots: sampled")
    return {"rates": rows}


def moving_rate(outcome: Outcome, axes: Axes) -> dict[str, Any]:
    """Draw picture 2."""
    best, _ = theory.optimal_moving_rate(EH, BETA)
    alphas = np.linspace(-0.9, 0.6, 751)
    center, apart = np.array([one_step(alpha) for alpha in alphas]).T
    found = float(alphas[np.argmin(center)])
    dots = np.array([-0.8, -0.6, best, -0.25, -0.1, 0.1, 0.225, 0.4])
    measured = [simulated_rate(alpha) for alpha in dots]
    error = max(
        abs(rate - theory.spectral_radius(theory.easgd_matrix(EH, alpha, BETA))) for alpha, rate in zip(dots, measured)
    )
    outcome.say(f"eh = {EH:g}, beta = {BETA:g}: radius {center.min():.4f} at alpha {found:.3f}, SGD {1 - EH:g}")
    outcome.criterion("the best moving rate is negative. Value: this rate", found, found < 0)
    outcome.criterion(
        f"the best moving rate is -(sqrt(beta)-sqrt(eh))^2 = {best:.3f}. Value: the difference",
        abs(found - best),
        abs(found - best) < 2e-3,
    )
    radius = float(center.min())
    outcome.criterion(
        "at the best moving rate, the mean converges faster than SGD. Value: the spectral radius",
        radius,
        radius < 1 - EH,
    )
    outcome.criterion(
        "runs of the algorithm shrink as predicted. Value: the largest difference of the rates", error, error < 0.01
    )
    wanted = [theory.spectral_radius(theory.easgd_matrix(EH, alpha, BETA)) for alpha in alphas]
    off = float(np.abs(center - wanted).max())
    outcome.criterion(
        "a step of the workers has the radius of the thesis' matrix. Value: the largest difference", off, off < 1e-6
    )
    alone = float(np.interp(best, alphas, apart))
    outcome.criterion(
        "the price: at the best moving rate, differences between workers grow. Value: the factor per step",
        alone,
        alone > 1,
    )
    axes.plot(alphas, center, color=COLOURS[0], label="mean and center")
    axes.plot(dots, measured, "o", color=COLOURS[0], markersize=4)
    axes.plot(alphas, apart, color=COLOURS[1], linestyle="--", label="differences between workers")
    axes.axhline(1 - EH, color="#777777", linewidth=1, linestyle=":", label="SGD")
    axes.axvline(best, color=COLOURS[0], linewidth=1, linestyle=":")
    axes.annotate(f"α* = {best:.2g}", (best, 0.62), xytext=(4, 0), textcoords="offset points", color=COLOURS[0])
    axes.set_ylim(0.6, 1.5)
    axes.set_title(f"Moving rate: ηh = {EH:g}, β = {BETA:g}")
    axes.set_xlabel("moving rate α")
    axes.set_ylabel("factor a step")
    axes.legend(frameon=False, loc="upper right")
    return {"best_alpha": found, "radius": radius, "disagreement_factor": alone}


def double_well(outcome: Outcome, axes: Axes, n_steps: int) -> dict[str, Any]:
    """Draw picture 3."""
    ends = double_well_ends(RHOS, n_steps)
    trapped = np.abs(ends[2]) < 0.5
    last, first = float(RHOS[trapped].max(initial=0)), float(RHOS[~trapped].min(initial=np.inf))
    expected = np.array([theory.trapped_easgd(rho)[0] if rho < theory.EASGD_TRAP else 1.0 for rho in RHOS])  # type: ignore[index]
    off = float(np.abs(ends[0] - expected).max())
    outcome.say(f"double well: trapped up to rho = {last:.2f}, free from {first:.2f}")
    around = last < theory.EASGD_TRAP < first and first - last < 0.03
    outcome.criterion(
        "the trap ends at rho = 2/3. Value: the largest rho with the trap, and the smallest without it",
        f"{last:.2f} to {first:.2f}",
        around,
    )
    outcome.criterion(
        "the workers end at sqrt(1-rho) in the trap, and else at 1. Value: the largest difference", off, off < 1e-3
    )
    line = np.linspace(0, theory.EASGD_TRAP, 200)
    for sign in (1, -1):
        axes.plot(line, sign * np.sqrt(1 - line), color="#777777", linewidth=1)
    axes.plot([theory.EASGD_TRAP, 1], [1, 1], color="#777777", linewidth=1, label="theory")
    for colour, marker, name, end in zip(COLOURS, "^vo", ("worker 1", "worker 2", "center"), ends):
        axes.plot(RHOS, end, marker, color=colour, markersize=4, label=name)
    axes.axvline(theory.EASGD_TRAP, color="#777777", linewidth=1, linestyle=":")
    axes.annotate("ρ = 2/3", (theory.EASGD_TRAP, -0.9), xytext=(4, 0), textcoords="offset points")
    axes.set_title("Double well: start at (0.9, -0.899, 0)")
    axes.set_xlabel("elastic coefficient ρ")
    axes.set_ylabel("where they end")
    axes.legend(frameon=False, loc="center right")
    return {"trapped_up_to": last, "free_from": first}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    made = parser(__doc__)
    made.add_argument("--samples", type=int, default=20_000, help="mini-batches sampled a point (default: %(default)s)")
    made.add_argument("--steps", type=int, default=15_000, help="steps in the double well (default: %(default)s)")
    options = made.parse_args(arguments)
    outcome = Outcome("input_spread", options)
    figure, ((left, middle, right),) = panels(3, width_inches=4.6)
    results = spread(outcome, left, options.samples)
    results |= moving_rate(outcome, middle)
    results |= double_well(outcome, right, options.steps)
    outcome.save(figure)
    return outcome.conclude(**results)


if __name__ == "__main__":
    sys.exit(main())
