"""The linear map that a step of a method is on a quadratic, measured on the method's own workers.

Every coordinate of the vector is an experiment of its own: coordinate k starts in the k-th state of a basis, and after
a step of all workers it holds the k-th column of the map.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpitrain.simulation.communicator import SimulatedCommunicator
from mpitrain.simulation.engine import Simulation

Array = NDArray[np.float64]


def place(simulation: Simulation, x: Array, **state: Array) -> None:
    """Give the workers parameters ``x`` (p, n) and, by name, entries of their states.

    An entry (n,) is shared by all workers, one (p, n) has a row for each. Entries that a worker's state lacks raise
    KeyError, unless another worker saves them for all.
    """
    unused = set(state)

    def program(comm: SimulatedCommunicator) -> None:
        worker = simulation.workers[comm.rank]
        worker.x.local[...] = x[comm.rank]
        present: Mapping[str, Any] = dict(worker.state())
        mine = {name: row if np.ndim(row) == 1 else row[comm.rank] for name, row in state.items() if name in present}
        unused.difference_update(mine)
        worker.load({**present, **mine})

    simulation.world.run(program)
    if unused:
        raise KeyError(f"no worker's state has {', '.join(sorted(unused))}")


def basis(n_states: int, repeats: int = 1) -> Array:
    """Return the unit vectors, each ``repeats`` times in a row: (n_states, n_states * repeats)."""
    return np.repeat(np.eye(n_states), repeats, axis=1)
