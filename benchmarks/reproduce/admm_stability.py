"""B3: round-robin ADMM is unstable in regions where round-robin EASGD is stable.

Zhang, Choromanska, LeCun 2015, https://arxiv.org/abs/1412.6651, figure 1. On a quadratic, one sweep, in which each
worker makes its turn, is a linear map. A run is unstable if the spectral radius of this map, its largest eigenvalue
modulus, is above 1. The figure shows the radius with 3 and 8 workers, for learning rates eta up to 0.01 and elastic
coefficients rho up to 10, at curvature 1. It also shows the center over time, from the paper's start, 1000, with
eta = 0.001 and rho = 2.5: the center of ADMM first falls, as that of EASGD does, and then oscillates with a growing
amplitude.

Everything is measured on mpitrain's ADMM and EASGD with simulated workers. The columns of the map's matrix are the
results of one sweep from each state of a basis. The centers over time come from runs.

    python -m benchmarks.reproduce.admm_stability [--points 50] [--sweeps 6000] [--out runs/reproduce] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.colors import TwoSlopeNorm
from numpy.typing import NDArray

from benchmarks.reproduce.figure import COLOURS, Outcome, panels, parser
from benchmarks.reproduce.linear import basis, place
from mpitrain import theory
from mpitrain.algorithms.base.method import Method
from mpitrain.algorithms.elastic.admm import ADMM
from mpitrain.algorithms.elastic.easgd import EASGD
from mpitrain.simulation.engine import Simulation
from mpitrain.simulation.world import SimulatedWorld

Array = NDArray[np.float64]

LARGEST_ETA, LARGEST_RHO = 0.01, 10.0
ETA, RHO, START, WORKERS = 0.001, 2.5, 1000.0, 8  # of the trajectories

# The unstable part of the grid that counts as the published picture.
EXPECTED = {1: (0.0, 0.0), 2: (0.0, 0.0), 3: (0.10, 0.20), 8: (0.28, 0.42)}


METHODS: dict[str, Method] = {
    "ADMM": ADMM(mode="round_robin", rho=RHO),
    "EASGD": EASGD(rho=RHO, period=1),  # the moving rate is eta*rho
}


def begin(method: Method, p: int, curvature: Callable[[], Array | float], start: Array, eta: float) -> Simulation:
    """Create p workers on f = h x^2 / 2, which make their turns in the order of their ranks."""
    return Simulation(method, SimulatedWorld(p), lambda rank, x: curvature() * x, start, eta)


def sweeps(name: str, p: int, n_points: int) -> Array:
    """Return the matrix of a sweep at each point of the grid, shape (rhos, etas, states, states).

    The states are (x_1, ..., x_p, c) for EASGD and (lam_1, ..., lam_p, x_1, ..., x_p) for ADMM, whose center is the
    mean of x_j - lam_j. The method depends on eta*h and eta*rho. So with rho fixed one run at the learning rate
    eta_i*rho_j/rho, with the coordinates' curvatures in proportion to eta_i, serves all points with the same i*j.
    """
    etas = LARGEST_ETA * np.arange(1, n_points + 1) / n_points
    n_states = 2 * p if name == "ADMM" else p + 1
    states = basis(n_states, n_points)
    h = np.zeros(states.shape[1])
    simulation = begin(METHODS[name], p, lambda: h, np.zeros(states.shape[1]), 0.0)
    found = np.full((n_points, n_points, n_states, n_states), np.nan)
    for product in sorted({i * j for i in range(1, n_points + 1) for j in range(1, n_points + 1)}):
        eta = simulation.learning_rate = product * etas[0] * LARGEST_RHO / n_points / RHO
        h[...] = np.tile(etas / eta, n_states)
        if name == "ADMM":
            contribution = states[p:] - states[:p]
            place(simulation, states[p:], multiplier=states[:p], contribution=contribution, center=contribution.mean(0))
        else:
            place(simulation, states[:p], center=states[p])
        simulation.run(1)
        if name == "ADMM":
            multipliers = [dict(worker.state())["multiplier"] for worker in simulation.workers]
            after = np.vstack([multipliers, simulation.x()])
        else:
            after = np.vstack([simulation.x(), simulation.consensus()])
        after = after.reshape(n_states, n_states, n_points)  # (row, column, eta)
        for i in range(1, n_points + 1):
            if product % i == 0 and product // i <= n_points:
                found[product // i - 1, i - 1] = after[:, :, i - 1]
    return found


def radii(matrices: Array) -> Array:
    """Return the spectral radius of each of (..., k, k) matrices."""
    radius: Array = np.abs(np.linalg.eigvals(matrices)).max(axis=-1)
    return radius


def radii_in_theory(name: str, p: int, n_points: int) -> Array:
    """Return the spectral radii of the paper's matrices at each grid point, shape (rhos, etas)."""
    steps = np.arange(1, n_points + 1) / n_points
    if name == "ADMM":
        sweep: Callable[[float, float], Array] = partial(theory.round_robin_admm_matrix, p=p)
    else:
        sweep = lambda eta, rho: theory.round_robin_easgd_matrix(eta, eta * rho, p)  # noqa: E731
    return radii(np.array([[sweep(eta, rho) for eta in LARGEST_ETA * steps] for rho in LARGEST_RHO * steps]))


def trajectory(name: str, n_sweeps: int) -> Array:
    """Return the center after 0, 1, ..., n_sweeps sweeps of all workers, which start where it does."""
    simulation = begin(METHODS[name], WORKERS, lambda: 1.0, np.full(1, START), ETA)
    centers = [START]

    def watch(simulation: Simulation, rank: int) -> None:
        if rank == WORKERS - 1:
            centers.append(float(simulation.consensus()[0]))

    simulation.run(n_sweeps, watch)
    return np.array(centers)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    made = parser(__doc__)
    made.add_argument("--points", type=int, default=50, help="grid points of each axis (default: %(default)s)")
    made.add_argument("--sweeps", type=int, default=6000, help="sweeps of the trajectories (default: %(default)s)")
    options = made.parse_args(arguments)
    outcome = Outcome("admm_stability", options)

    steps = np.arange(1, options.points + 1) / options.points
    etas, rhos = LARGEST_ETA * steps, LARGEST_RHO * steps
    measured = {(name, p): radii(sweeps(name, p, options.points)) for name in METHODS for p in EXPECTED}
    admm, easgd = ({p: measured[name, p] for p in EXPECTED} for name in METHODS)
    fractions = {p: float((admm[p] > 1).mean()) for p in EXPECTED}
    outcome.say(f"unstable part of a grid of {options.points} x {options.points}")
    outcome.say("workers      ADMM   EASGD   largest ADMM radius")
    for p in EXPECTED:
        outcome.say(f"{p:7}{fractions[p]:10.1%}{(easgd[p] > 1).mean():8.1%}{admm[p].max():14.6f}")
    for p, (low, high) in EXPECTED.items():
        wanted = f"on {low:.0%} to {high:.0%} of" if high else "nowhere on"
        outcome.criterion(
            f"ADMM with p = {p} is unstable {wanted} the grid. Value: the unstable fraction",
            fractions[p],
            low <= fractions[p] <= high,
        )
    largest = max(float(radius.max()) for radius in easgd.values())
    outcome.criterion("EASGD is stable on all of the grid. Value: the largest radius minus 1", largest - 1, largest < 1)
    for name in METHODS:
        off = max(float(np.abs(measured[name, p] - radii_in_theory(name, p, options.points)).max()) for p in EXPECTED)
        outcome.criterion(
            f"{name}: the radius is that of the paper's matrix. Value: the largest difference", off, off < 1e-6
        )

    admm_center, easgd_center = (trajectory(name, options.sweeps) for name in METHODS)
    swing = float(np.abs(admm_center[-options.sweeps // 6 :]).max())
    outcome.criterion(
        f"ADMM's center swings beyond twice its start, {START:g}. Value: its largest modulus at the end",
        swing,
        swing > 2 * START,
    )
    rest = float(np.abs(easgd_center[-1]))
    outcome.criterion(
        "EASGD's center ends below a hundredth of its start. Value: its modulus at the end", rest, rest < START / 100
    )

    draw(
        outcome,
        etas,
        rhos,
        {"ADMM, 3 workers": admm[3], "ADMM, 8 workers": admm[8], "EASGD, 8 workers": easgd[8]},
        {"ADMM": admm_center, "EASGD": easgd_center},
    )
    return outcome.conclude(points=options.points, unstable_fraction={str(p): one for p, one in fractions.items()})


def draw(outcome: Outcome, etas: Array, rhos: Array, maps: dict[str, Array], centers: dict[str, Array]) -> None:
    """Draw three maps of the radius and the two trajectories."""
    figure, grid = panels(2, 2)
    norm = TwoSlopeNorm(0, vmin=-2e-3, vmax=4e-3)
    mesh: Any = None
    for axes, (title, radius) in zip(grid.flat, maps.items()):
        mesh = axes.pcolormesh(etas, rhos, radius - 1, norm=norm, cmap="RdBu_r", shading="nearest", rasterized=True)
        if (radius > 1).any():
            axes.contour(etas, rhos, radius, levels=[1.0], colors="black", linewidths=1.2)
        axes.set_title(f"{title}: {(radius > 1).mean():.0%} unstable")
        axes.set_xlabel("learning rate η")
        axes.set_ylabel("elastic coefficient ρ")
    figure.colorbar(
        mesh, ax=list(grid.flat[:3]), label="spectral radius of a sweep, minus 1", extend="both", shrink=0.6
    )
    axes = grid.flat[3]
    for colour, (name, center) in zip(COLOURS[1::-1], centers.items()):
        axes.plot(center, color=colour, label=name)
    axes.set_yscale("symlog", linthresh=100)
    axes.set_title(f"{WORKERS} workers, η = {ETA:g}, ρ = {RHO:g}")
    axes.set_xlabel("sweeps")
    axes.set_ylabel("center")
    axes.legend(frameon=False)
    outcome.save(figure)


if __name__ == "__main__":
    sys.exit(main())
