"""B6: the numbers of workers and periods for which DOWNPOUR converges, and how AGN changes them.

Hermans' thesis, CERN-THESIS-2017-103, reports that DOWNPOUR with period 1 converges with 10 workers and diverges with
20, and that with 10 workers it diverges at periods 5, 10 and 20. For n workers that commit in turn on a quadratic, the
condition for stability has a closed form. With learning rate e, curvature h and lam local steps between two commits, a
run is

    stable iff q < 2 sin(pi / (2(2n-1))),   q = 1 - (1-eh)^lam  (DOWNPOUR),   q = (1 - (1-eh)^lam)/lam  (AGN).

At eh = 0.1, all of Hermans' observations follow from it. The script compares this bound with runs of mpitrain's
DOWNPOUR and AGN with simulated workers, on a grid of n and lam. To save time, one step with the same effect, which
multiplies x by 1-q, replaces the lam local steps of a period. At some points of the grid, among them those of the
thesis, the workers also make all lam steps.

    python -m benchmarks.reproduce.downpour_phase [--eh 0.1] [--most 40] [--rounds 160] [--out runs/reproduce] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter
from numpy.typing import NDArray

from benchmarks.reproduce.figure import COLOURS, Outcome, panels, parser
from mpitrain import theory
from mpitrain.algorithms.base.method import Method
from mpitrain.algorithms.parameter_server.agn import AGN
from mpitrain.algorithms.parameter_server.downpour import Downpour
from mpitrain.simulation.engine import Simulation
from mpitrain.simulation.world import SimulatedWorld

Array = NDArray[np.float64]

WORKERS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 25, 30, 35, 40)
PERIODS = (1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 40)
TICKS = (1, 2, 5, 10, 20, 40)
SIMULATED = tuple((n, period) for n in (2, 4, 10, 20) for period in (1, 2, 5, 10, 20))
METHODS: dict[str, Callable[[int], Method]] = {
    "DOWNPOUR": lambda period: Downpour(period=period),
    "AGN": lambda period: AGN(period=period),
}
NEAR = 0.01  # a point whose q is this near the bound, relatively, is not judged: it grows too slowly
OBSERVED = {(10, 1): True, (20, 1): False, (10, 5): False, (10, 10): False, (10, 20): False}


def growth(method: Method, n: int, q: Array, n_rounds: int) -> Array:
    """Return the growth of the center's swing in a round of n workers in turn, for each q; below 1 it converges.

    The method's period is 1, and a step pushes -q times what the worker pulled last. The swings of two halves of the
    run are compared; a swing lasts about four rounds.
    """
    simulation = Simulation(method, SimulatedWorld(n), lambda rank, x: q * x, np.ones(len(q)), 1.0)
    largest = np.zeros((n_rounds, len(q)))

    def watch(simulation: Simulation, rank: int) -> None:
        row = largest[simulation.workers[rank].t - 1]
        np.maximum(row, np.abs(simulation.consensus(rank)), out=row)

    with np.errstate(over="ignore"):  # the statistics of what diverges
        simulation.run(n_rounds, watch)
    swings = np.log(np.maximum(largest, 1e-300))
    half, window = n_rounds // 2, max(1, n_rounds // 4)
    late, early = (np.max(swings[end - window : end], axis=0) for end in (n_rounds, half))
    rate: Array = np.exp((late - early) / (n_rounds - half))
    return rate


def simulated(name: str, n: int, period: int, eh: float, n_rounds: int) -> bool:
    """Return whether the toolkit's method converges in the same setting: whether the center's swing shrinks."""
    centers: list[float] = []
    method = METHODS[name](period)
    simulation = Simulation(method, SimulatedWorld(n), lambda rank, x: x, np.ones(1), eh)

    def watch(simulation: Simulation, rank: int) -> None:
        if simulation.workers[rank].t % period == 0:
            centers.append(abs(float(simulation.consensus()[0])))

    simulation.run(n_rounds * period, watch)
    swings = np.reshape(centers, (n_rounds, n)).max(axis=1)
    half, window = n_rounds // 2, max(1, n_rounds // 4)
    return bool(swings[-window:].max() < swings[half - window : half].max())


def judge(outcome: Outcome, name: str, axes: Axes, eh: float, most: int, n_rounds: int) -> dict[tuple[int, int], bool]:
    """Run the grid for one method, compare it with the bound and draw it; return which points converged."""
    workers, periods = ([v for v in values if v <= most] for values in (WORKERS, PERIODS))
    q = np.array([(theory.downpour_q if name == "DOWNPOUR" else theory.agn_q)(eh, period) for period in periods])
    converged, wrong, n_judged = {}, 0, 0
    for n in workers:
        stable = growth(METHODS[name](1), n, q, n_rounds) < 1
        bound = theory.downpour_bound(n)
        for period, one, q_one in zip(periods, stable, q):
            converged[n, period] = bool(one)
            if abs(q_one / bound - 1) > NEAR:
                n_judged += 1
                wrong += bool(one) != bool(q_one < bound)
    outcome.criterion(
        f"{name}: the runs agree with the bound at all of {n_judged} points. Value: the exceptions", wrong, wrong == 0
    )
    points = [point for point in SIMULATED if point in converged]
    other = [point for point in points if simulated(name, *point, eh, min(n_rounds, 40)) != converged[point]]
    outcome.criterion(
        f"{name}: runs with all local steps agree with the others at {len(points)} points. Value: the exceptions",
        len(other),
        not other,
    )
    for stable, marker, colour, label in (
        (True, "o", COLOURS[0], "converged"),
        (False, "x", COLOURS[1], "diverged"),
    ):
        drawn = np.array([point for point, one in converged.items() if one == stable]).reshape(-1, 2)
        axes.plot(drawn[:, 0], drawn[:, 1], marker, color=colour, markersize=5, linestyle="none", label=label)
    n_line, period_line = np.linspace(1, most, 300), np.geomspace(1, most, 300)
    decay = 1 - (1 - eh) ** period_line
    q_line = decay if name == "DOWNPOUR" else decay / period_line
    bounds = 2 * np.sin(np.pi / (2 * (2 * n_line - 1)))
    axes.contour(n_line, period_line, q_line[:, None] - bounds[None, :], levels=[0], colors="black", linewidths=1.5)
    axes.plot([], [], color="black", linewidth=1.5, label="q = 2 sin(π/(2(2n-1)))")
    axes.set_title(f"{name}, ηh = {eh:g}")
    ticks = [tick for tick in TICKS if tick <= most]
    for axis, words in ((axes.xaxis, "workers n"), (axes.yaxis, "period λ")):
        axis.set_label_text(words)
        axis.set_minor_formatter(NullFormatter())
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
    axes.set_yticks(ticks, [str(tick) for tick in ticks], minor=False)
    axes.minorticks_off()
    axes.set_xlim(0.92, most * 1.09)
    axes.set_ylim(0.92, most * 1.09)
    return converged


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    made = parser(__doc__)
    made.add_argument("--eh", type=float, default=0.1, help="learning rate times curvature (default: %(default)s)")
    made.add_argument("--most", type=int, default=40, help="largest number of workers, and period (%(default)s)")
    made.add_argument("--rounds", type=int, default=160, help="pushes of each worker in a run (default: %(default)s)")
    options = made.parse_args(arguments)
    outcome = Outcome("downpour_phase", options)
    figure, ((left, right),) = panels(2, sharey=True)
    downpour = judge(outcome, "DOWNPOUR", left, options.eh, options.most, options.rounds)
    agn = judge(outcome, "AGN", right, options.eh, options.most, options.rounds)
    observed = {point: stable for point, stable in OBSERVED.items() if point in downpour}
    for (n, period), stable in observed.items():
        words = f"{n} workers, period {period}: DOWNPOUR {'converges' if stable else 'diverges'}, as in Hermans' thesis"
        outcome.criterion(words, "converges" if downpour[n, period] else "diverges", downpour[n, period] == stable)
    rescued = sum(agn[point] and not downpour[point] for point in agn)
    lost = sum(downpour[point] and not agn[point] for point in agn)
    outcome.criterion(
        "AGN converges at every point where DOWNPOUR does, and at others. Value: the number of others",
        rescued,
        lost == 0 and rescued > 0,
    )
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    outcome.save(figure)
    rows = [
        {"n": n, "period": period, "downpour": downpour[n, period], "agn": agn[n, period]} for n, period in downpour
    ]
    return outcome.conclude(eh=options.eh, converged=rows)


if __name__ == "__main__":
    sys.exit(main())
