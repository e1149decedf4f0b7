"""The other workers, as a method looks for them: those that live."""

from __future__ import annotations

import numpy as np

from mpitrain.collectives.communicator import Communicator
from mpitrain.collectives.topology.graphs import uniform_peer


def alive_ranks(comm: Communicator) -> list[int]:
    """The workers that have not died, as far as this one knows, ascending. Local."""
    dead = comm.dead
    return [rank for rank in range(comm.size) if rank not in dead]


def draw_peer(comm: Communicator, rng: np.random.Generator) -> int | None:
    """A worker drawn uniformly from the others that live; None where there is none. Local."""
    if not comm.dead:
        return uniform_peer(rng, comm.rank, comm.size) if comm.size > 1 else None
    others = [rank for rank in alive_ranks(comm) if rank != comm.rank]
    return others[int(rng.integers(len(others)))] if others else None


def saves_shared_state(comm: Communicator) -> bool:
    """Whether this worker's part of a checkpoint holds what all have between them: the first that lives. Local.

    When it is loaded all live, and the part of each that had died is that of the next one: worker 0 has it then.
    """
    return comm.rank == 0 if not comm.dead else comm.rank == alive_ranks(comm)[0]
