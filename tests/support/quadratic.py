"""The test bed of the algorithms: f_i(x) = h_i (x - b_i)^2 / 2 for each worker, coordinate by coordinate.

A linear method on a quadratic is a matrix on (x_1, ..., x_p, c). Coordinates do not mix, so that one run with as many
coordinates as states, each started from its own unit vector, returns that matrix column by column.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mpitrain.algorithms import Method
from mpitrain.algorithms.base import rescaling
from mpitrain.simulation.communicator import SimulatedCommunicator
from mpitrain.simulation.engine import Gradient, Simulation
from mpitrain.simulation.schedules import RoundRobin, Schedule
from mpitrain.simulation.world import SimulatedWorld


def slope(h: Any = 1.0, b: Any = 0.0, *, sigma: float = 0.0, seed: int = 0) -> Gradient:
    """Return g_i(x) = h_i (x - b_i) - xi, xi ~ N(0, sigma^2); h and b are numbers, or one per worker."""
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
    """Return a simulation of ``p`` workers, ready to run; the default gradient is that of h = 1."""
    simulated = SimulatedWorld(p, schedule, **world)
    return Simulation(method, simulated, gradient or slope(), np.asarray(start), eta, decay, seed=seed)


def states(simulation: Simulation) -> list[dict[str, Any]]:
    """Return a copy of each worker's checkpoint entries, with the model's parameters as ``parameters``."""
    return [
        {"parameters": worker.x.local.copy()}
        | {name: value.copy() if hasattr(value, "copy") else value for name, value in worker.state()}
        for worker in simulation.workers
    ]


def load(simulation: Simulation, new: list[dict[str, Any]]) -> Simulation:
    """Load the states of all workers, whatever the schedule."""

    def program(comm: SimulatedCommunicator) -> None:
        worker = simulation.workers[comm.rank]
        worker.x.local[...] = new[comm.rank]["parameters"]
        comm.barrier()
        worker.load(new[comm.rank])

    schedule, simulation.world.schedule = simulation.world.schedule, RoundRobin()
    simulation.world.run(program)
    simulation.world.schedule = schedule
    return simulation


def restart(simulation: Simulation, parts: list[dict[str, Any]]) -> Simulation:
    """Continue, with this simulation's workers, from the states of another number of workers."""
    worker = simulation.workers[0]
    merged = rescaling.merge_all(worker, simulation.method.common_start(parts), parts)
    return load(simulation, [{**merged, "parameters": merged[rescaling.START]} for _ in simulation.workers])


def change(simulation: Simulation, **values: Any) -> Simulation:
    """Replace entries of the state of all workers that have them, by one row each or by one for all."""
    new = states(simulation)
    for name, value in values.items():
        for rank, state in enumerate(new):
            if name in state:
                state[name] = np.array(value[rank] if np.ndim(value) == 2 else value)
    return load(simulation, new)


def sweep_matrix(method: Method, p: int, *, eh: float, steps: int = 1) -> np.ndarray:
    """Return the matrix on (x_1, ..., x_p, c) of ``steps`` steps of each of ``p`` workers, in turn."""
    unit = np.eye(p + 1)
    simulation = simulate(method, p, start=unit[:p], eta=eh)
    change(simulation, center=unit[p]).run(steps)
    return np.vstack([simulation.x(), simulation.consensus()])


def radius(matrix: np.ndarray) -> float:
    """Return the largest modulus of an eigenvalue."""
    return float(np.abs(np.linalg.eigvals(matrix)).max())


def statistics(simulation: Simulation, name: str) -> list[Any]:
    """Return one counter of each worker."""
    return [getattr(worker.comm.statistics, name) for worker in simulation.workers]


def standard_error(variance: float, n: int) -> float:
    """Return the standard error of the variance estimated from n independent normal numbers."""
    return float(variance * np.sqrt(2 / n))


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Return whether two arrays are equal to the last bit; an ``assert`` on the bytes would spend minutes on a diff."""
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


def assert_states_equal(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    """Assert that both have the same names and, to the bit, the same values."""
    assert a.keys() == b.keys()
    for name in a:
        assert np.array_equal(np.asarray(a[name]), np.asarray(b[name])), name
