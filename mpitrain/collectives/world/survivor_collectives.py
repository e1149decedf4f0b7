"""Small collectives of the survivors: gather numbers, agree on maxima, send an object.

Their messages are arrays of a fixed size, or are decoded only after all ranks have received them. A death may leave a
message incomplete, and pickle would then read garbage.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mpitrain.collectives.world.world import World


def gather(world: World, values: Sequence[float]) -> np.ndarray:
    """Return a few numbers of each survivor, in the order of their ranks: (survivors, k) float64. Collective."""
    mine = np.asarray(values, np.float64)

    def collective(comm: Any) -> np.ndarray:
        found = np.empty((comm.Get_size(), mine.size))
        comm.Allgather(mine, found)
        return found

    return world.run_on_survivors(collective, "a gather")


def maximum(world: World, values: Sequence[int]) -> list[int]:
    """Return the element-wise maximum of some integers over all survivors. Collective."""
    from mpi4py import MPI

    mine = np.asarray(values, np.int64)

    def collective(comm: Any) -> np.ndarray:
        found = np.empty_like(mine)
        comm.Allreduce(mine, found, op=MPI.MAX)
        return found

    found: list[int] = world.run_on_survivors(collective, "an agreement").tolist()
    return found


def broadcast(world: World, make: Callable[[], Any]) -> Any:
    """Call ``make()`` on the first survivor, and return its result on all survivors. Collective.

    Args:
        world: The ranks.
        make: A function that returns a picklable object. If the first survivor dies, it is called on the next one.
    """

    def collective(comm: Any) -> np.ndarray:
        is_first = comm.Get_rank() == 0
        message = np.frombuffer(pickle.dumps(make()), np.uint8).copy() if is_first else np.empty(0, np.uint8)
        n_bytes = np.array([message.size], np.int64)
        comm.Bcast(n_bytes)
        if not is_first:
            message = np.empty(int(n_bytes[0]), np.uint8)
        comm.Bcast(message)
        return message

    return pickle.loads(world.run_on_survivors(collective, "a broadcast").tobytes())
