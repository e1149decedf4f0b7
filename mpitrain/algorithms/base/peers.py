"""The other workers that are alive, from which a method draws its peers."""

from __future__ import annotations

import numpy as np

from mpitrain.collectives.communicator import Communicator
from mpitrain.collectives.topology.graphs import uniform_peer


def alive_ranks(comm: Communicator) -> list[int]:
    """Return the workers that are alive, as far as is known, in ascending order. Local."""
    dead = comm.dead
    return [rank for rank in range(comm.size) if rank not in dead]


def draw_peer(comm: Communicator, rng: np.random.Generator) -> int | None:
    """Draw a worker uniformly from the other living workers; return None if there is none. Local."""
    if not comm.dead:
        return uniform_peer(rng, comm.rank, comm.size) if comm.size > 1 else None
    others = [rank for rank in alive_ranks(comm) if rank != comm.rank]
    return others[int(rng.integers(len(others)))] if others else None


def saves_shared_state(comm: Communicator) -> bool:
    """Whether this worker's part of a checkpoint contains the shared state. True for the first living worker. Local.

    For a dead worker, the checkpoint contains a copy of the part of the next living worker. The run that loads the
    checkpoint has all workers again, and the part of worker 0 always contains the shared state.
    """
    return comm.rank == 0 if not comm.dead else comm.rank == alive_ranks(comm)[0]
