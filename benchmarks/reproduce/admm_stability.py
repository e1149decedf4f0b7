"""B3: round-robin ADMM is unstable in regions where round-robin EASGD is stable.

Zhang, Choromanska, LeCun 2015, https://arxiv.org/abs/1412.6651, figure 1: the largest eigenvalue modulus of one sweep,
with 3 and 8 workers, over learning rates eta up to 0.01 and elastic coefficients rho up to 10, at curvature 1. Beside
it the center from the paper's start, 1000, at eta = 0.001 and rho = 2.5: ADMM falls first, as EASGD does, and then
oscillates with a growing amplitude.

    python -m benchmarks.reproduce.admm_stability [--points 50] [--sweeps 6000] [--out runs/reproduce] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import TwoSlopeNorm
from numpy.typing import NDArray

from benchmarks.reproduce.figure import COLOURS, Outcome, panels, parser
from mpitrain import theory

Array = NDArray[np.float64]

LARGEST_ETA, LARGEST_RHO = 0.01, 10.0
ETA, RHO, START, WORKERS = 0.001, 2.5, 1000.0, 8  # of the trajectories

# The unstable part of the grid that counts as the published picture.
EXPECTED = {1: (0.0, 0.0), 2: (0.0, 0.0), 3: (0.10, 0.20), 8: (0.28, 0.42)}


def radii(sweep: Callable[[float, float], Array], etas: Array, rhos: Array) -> Array:
    """Return the spectral radius of a sweep at each grid point, shape (rhos, etas)."""
    stack = np.array([[sweep(eta, rho) for eta in etas] for rho in rhos])
    radius: Array = np.abs(np.linalg.eigvals(stack)).max(axis=-1)
    return radius


def trajectory(sweep: Array, start: Array, n_sweeps: int) -> Array:
    """Return the center, the last entry of the state, after 0, 1, ..., n_sweeps sweeps."""
    centers, state = [start[-1]], start
    for _ in range(n_sweeps):
        state = sweep @ state
        centers.append(state[-1])
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
    admm = {p: radii(lambda eta, rho: theory.round_robin_admm_matrix(eta, rho, p), etas, rhos) for p in EXPECTED}  # noqa: B023
    easgd = {
        p: radii(lambda eta, rho: theory.round_robin_easgd_matrix(eta, eta * rho, p), etas, rhos)  # noqa: B023
        for p in EXPECTED
    }
    fractions = {p: float((admm[p] > 1).mean()) for p in EXPECTED}
    outcome.say(f"unstable part of a grid of {options.points} x {options.points}")
    outcome.say("workers      ADMM   EASGD   largest ADMM radius")
    for p in EXPECTED:
        outcome.say(f"{p:7}{fractions[p]:10.1%}{(easgd[p] > 1).mean():8.1%}{admm[p].max():14.6f}")
    for p, (low, high) in EXPECTED.items():
        wanted = f"{low:.0%} to {high:.0%} of" if high else "nothing of"
        outcome.criterion(
            f"ADMM with {p} workers is unstable on {wanted} the grid", fractions[p], low <= fractions[p] <= high
        )
    largest = max(float(radius.max()) for radius in easgd.values())
    outcome.criterion("EASGD is stable on all of the grid, largest radius minus 1", largest - 1, largest < 1)

    admm_start = np.concatenate([np.zeros(WORKERS), np.full(WORKERS + 1, START)])
    admm_center = trajectory(theory.round_robin_admm_matrix(ETA, RHO, WORKERS), admm_start, options.sweeps)
    easgd_center = trajectory(
        theory.round_robin_easgd_matrix(ETA, ETA * RHO, WORKERS), np.full(WORKERS + 1, START), options.sweeps
    )
    swing = float(np.abs(admm_center[-options.sweeps // 6 :]).max())
    outcome.criterion(f"ADMM's center beyond twice its start, {START:g}, at the end", swing, swing > 2 * START)
    rest = float(np.abs(easgd_center[-1]))
    outcome.criterion("EASGD's center below a hundredth of its start at the end", rest, rest < START / 100)

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
