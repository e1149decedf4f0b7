"""The test bed of the algorithms: f_i(x) = h_i (x - b_i)^2 / 2 for each worker, every coordinate on its own.

A linear method on a quadratic is a matrix on (x_1, ..., x_p, c). Coordinates do not mix, so that one run with as many
coordinates as states, each started in a unit vector of its own, returns that matrix column by column.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mpitrain.algorithms import Method
from mpitrain.simulation.communicator import SimulatedCommunicator
from mpitrain.simulation.engine import Gradient, Simulation
from mpitrain.simulation.schedules import RoundRobin, Schedule
from mpitrain.simulation.world import SimulatedWorld


def slope(h: Any = 1.0, b: Any = 0.0, *, sigma: float = 0.0, seed: int = 0) -> Gradient:
    """g_i(x) = h_i (x - b_i) - xi, xi ~ N(0, sigma^2); h and b are numbers, or one each worker."""
    rng = np.random.default_rng(seed)

    def gradient(rank: int, x: np.ndarray) -> np.ndarray:
        g = np.asarray(_of(h, rank) * (x - _of(b, rank)), x.dtype)
        return g - sigma * rng.standard_normal(x.size) if sigma else g

    return gradient


def _of(values: Any, rank: int) -> Any:
    return values if np.ndim(values) == 0 else values[rank]


def simulate(
    method: Method,
    p: int,
    *,
    start: Any,
    eta: float,
    gradient: Gradient | None = None,
    schedule: Schedule | None = None,
    decay: float = 0.0,
    seed: int = 0,
    **world: Any,
) -> Simulation:
    """A simulation of ``p`` workers, ready to run; the gradient is that of h = 1 unless one is given."""
    simulated = SimulatedWorld(p, schedule, **world)
    return Simulation(method, simulated, gradient or slope(), np.asarray(start), eta, decay, seed=seed)


def states(simulation: Simulation) -> list[dict[str, Any]]:
    """A copy of what a checkpoint would hold of each worker, with what its model holds under ``parameters``."""
    return [
        {"parameters": worker.x.local.copy()}
        | {name: value.copy() if hasattr(value, "copy") else value for name, value in worker.state()}
        for worker in simulation.workers
    ]


def load(simulation: Simulation, new: list[dict[str, Any]]) -> Simulation:
    """Put such states back, all workers at once, whatever the schedule."""

    def program(comm: SimulatedCommunicator) -> None:
        worker = simulation.workers[comm.rank]
        worker.x.local[...] = new[comm.rank]["parameters"]
        comm.barrier()
        worker.load(new[comm.rank])

    schedule, simulation.world.schedule = simulation.world.schedule, RoundRobin()
    simulation.world.run(program)
    simulation.world.schedule = schedule
    return simulation


def change(simulation: Simulation, **values: Any) -> Simulation:
    """Replace a part of the state of all workers, by one row each or by one for all; who lacks it is given none."""
    new = states(simulation)
    for name, value in values.items():
        for rank, state in enumerate(new):
            if name in state:
                state[name] = np.array(value[rank] if np.ndim(value) == 2 else value)
    return load(simulation, new)


def sweep_matrix(method: Method, p: int, *, eh: float, steps: int = 1) -> np.ndarray:
    """The matrix on (x_1, ..., x_p, c) of ``steps`` steps of each of ``p`` workers, in turn."""
    unit = np.eye(p + 1)
    simulation = simulate(method, p, start=unit[:p], eta=eh)
    change(simulation, center=unit[p]).run(steps)
    return np.vstack([simulation.x(), simulation.consensus()])


def radius(matrix: np.ndarray) -> float:
    """The largest modulus of an eigenvalue."""
    return float(np.abs(np.linalg.eigvals(matrix)).max())


def statistics(simulation: Simulation, name: str) -> list[Any]:
    """One counter of each worker."""
    return [getattr(worker.comm.statistics, name) for worker in simulation.workers]


def standard_error(variance: float, n: int) -> float:
    """Of the variance estimated from n independent normal numbers."""
    return float(variance * np.sqrt(2 / n))


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are one to the last bit; an ``assert`` on the bytes would spend minutes on a diff."""
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


def assert_states_equal(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    """The same names and, to the bit, the same values."""
    assert a.keys() == b.keys()
    for name in a:
        assert np.array_equal(np.asarray(a[name]), np.asarray(b[name])), name
