"""What the tests of the parameter-server methods share."""

from collections.abc import Callable
from typing import Any

import numpy as np

from mpitrain import kernels
from mpitrain.algorithms.base.method import Method
from mpitrain.algorithms.base.replica import ParamGroupSlice, Replica
from mpitrain.algorithms.base.worker import Worker
from mpitrain.simulation.engine import Simulation


def delayed(q: float, p: int) -> np.ndarray:
    """c_{k+1} = c_k - q c_{k-(p-1)} on (c_k, ..., c_{k-p+1}): a server that is visited in turn."""
    matrix = np.eye(p, k=-1)
    matrix[0, 0] += 1
    matrix[0, -1] -= q
    return matrix


def bound(p: int) -> float:
    """Of q, for ``delayed`` to be stable."""
    return 2 * np.sin(np.pi / (2 * (2 * p - 1)))


def not_committed(simulation: Simulation) -> np.ndarray:
    """(n,) the sum over workers of what they have changed and not committed."""
    own = [dict(worker.state()) for worker in simulation.workers]
    return sum(worker.x.local - state["origin"] for worker, state in zip(simulation.workers, own, strict=True))


def whole_numbers(p: int, n: int, seed: int) -> tuple[np.ndarray, Callable[[int, np.ndarray], np.ndarray], list[Any]]:
    """A start (n,), gradients that are whole numbers, and the list in which each (rank, gradient) is noted.

    Sums of whole numbers are exact in any order: what is lost or counted twice cannot hide in the rounding.
    """
    rng, noted = np.random.default_rng(seed), []

    def gradient(rank: int, x: np.ndarray) -> np.ndarray:
        g = rng.integers(-50, 50, x.size).astype(float)
        noted.append((rank, g))
        return g

    return rng.integers(-50, 50, n).astype(float), gradient, noted


class OnRank:
    """A worker of a method on this MPI rank, without a model. Collective to enter and to leave.

    Args:
        world: ``mpitrain.init()``.
        method: Its hyper-parameters.
        start: (n,) the same on all ranks.
        eta: The learning rate of plain SGD.
    """

    def __init__(self, world: Any, method: Method, start: np.ndarray, eta: float) -> None:
        from mpitrain.collectives.mpi import MPICommunicator

        self.comm, self.eta, self.owns_update = MPICommunicator(world), eta, method.owns_update
        x, g = self.comm.vector(start.size, start.dtype), self.comm.vector(start.size, start.dtype)
        x.local[...] = start
        self.comm.barrier()
        self.worker: Worker = method.worker(Replica(self.comm, x, g))

    def step(self, g: np.ndarray) -> None:
        """One step with this gradient."""
        worker, eta = self.worker, self.eta
        worker.g.local[...] = g
        group_slices = [ParamGroupSlice(slice(0, g.size), eta)]
        update = None if self.owns_update else lambda: kernels.sgd_step(worker.x.local, worker.g.local, eta, 0.0)
        worker.step(group_slices, update)

    def consensus(self) -> np.ndarray:
        """(n,) what the method evaluates, when all ranks have come here. Collective."""
        self.comm.barrier()
        out = np.zeros_like(self.worker.x.local)
        self.worker.consensus(out)
        self.comm.barrier()
        return out

    def __enter__(self) -> "OnRank":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:  # with a failure on one rank only, the others would never come
            self.comm.barrier()
            self.comm.free()
