"""Run a method on real ranks without a model, as ``quadratic`` does with simulated workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from mpitrain import kernels
from mpitrain.algorithms.base.method import Method
from mpitrain.algorithms.base.replica import ParamGroupSlice, Replica
from mpitrain.algorithms.base.worker import Worker

Gradient = Callable[[int, np.ndarray], Any]


class RankRun:
    """This rank's worker.

    Args:
        method: The method, with its hyper-parameters.
        comm: The communicator between the ranks.
        start: (n,), the first parameters of this rank.
        seed: Seeds the method's random choices.
    """

    def __init__(self, method: Method, comm: Any, start: np.ndarray, seed: int = 0) -> None:
        self.comm, self._owns_update = comm, method.owns_update
        x, g = comm.vector(start.size, start.dtype), comm.vector(start.size, start.dtype)
        x.local[...] = start
        comm.barrier()
        self.worker: Worker = method.worker(Replica(comm, x, g, seed))

    @classmethod
    def resumed(cls, method: Method, comm: Any, state: dict[str, Any]) -> RankRun:
        """Return a run that continues from this rank's entry of ``states``. Collective."""
        run = cls(method, comm, np.zeros_like(state["parameters"]))
        run.worker.x.local[...] = state["parameters"]
        comm.barrier()
        run.worker.load(state)
        return run

    def run(self, steps: int, eta: float, gradient: Gradient) -> np.ndarray:
        """Make steps and return the sum (n,) of the gradients that this rank used."""
        worker, total = self.worker, np.zeros(self.worker.x.local.size)
        x, g = worker.x.local, worker.g.local
        for _ in range(steps):
            g[...] = gradient(self.comm.rank, x)
            total += g
            update = None if self._owns_update else (lambda: kernels.sgd_step(x, g, eta, 0.0))
            worker.step([ParamGroupSlice(slice(0, x.size), eta)], update)
        return total

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Return the sum over all ranks. Collective."""
        return np.asarray(self.comm.world.comm.allreduce(values))

    def states(self) -> list[dict[str, Any]]:
        """Return what a checkpoint would hold of each rank, as ``quadratic.states`` does. Collective."""
        mine = {"parameters": self.worker.x.local.copy()} | dict(self.worker.state())
        return list(self.comm.world.comm.allgather(mine))


@contextmanager
def ranks(n_nodes: int) -> Iterator[Any]:
    """Yield a communicator of all ranks of this launch, as if they were on ``n_nodes`` nodes. Collective."""
    from mpi4py import MPI

    from mpitrain.collectives.mpi import MPICommunicator
    from mpitrain.collectives.world.launch import create_world
    from mpitrain.collectives.world.ranks import EMULATED_NODES

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(EMULATED_NODES, str(n_nodes))
        world = create_world(MPI.COMM_WORLD.Dup())
    comm = MPICommunicator(world)
    yield comm
    world.comm.Barrier()  # no rank still reads
    comm.free()
    if world.progress_thread is not None:
        world.progress_thread.stop()
    world.free()
