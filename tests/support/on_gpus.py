"""Real ranks that have a stand-in GPU each (`standin_gpu`), reached by each of the transports."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from support.on_ranks import ranks
from support.standin_gpu import StandInGpu, install

TRANSPORTS = ("ipc", "cuda-aware", "staged")


@contextmanager
def gpus(n_nodes: int, wanted: str, *, maps: bool = True, proved: tuple[bool, bool] | None = None) -> Iterator[Any]:
    """Collective. A communicator of all ranks of this launch, whose vectors lie in device memory.

    Args:
        n_nodes: For so many nodes the ranks are taken (one where a rank is alone).
        wanted: The transport.
        maps: Whether the GPUs can map each other's memory.
        proved: Whether MPI is known to sum device memory and to reach it by windows; only under ``cuda-aware`` if not
            given.
    """
    from mpitrain.collectives.mpi import MPICommunicator
    from mpitrain.collectives.world import transport

    with pytest.MonkeyPatch.context() as patch, ranks(n_nodes) as host_comm:
        device = install(patch, StandInGpu(maps=maps))
        found = (wanted == "cuda-aware",) * 2 if proved is None else proved
        patch.setattr(transport, "_proved", lambda comm: found)
        world = host_comm.world
        world.gpu = device
        world.transport = transport.choose(world.ranks, wanted, device)
        comm = MPICommunicator(world)
        with device.exchanging(0):
            yield comm
            world.comm.Barrier()  # nobody is still reading
            comm.free()
