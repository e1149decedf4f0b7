"""No test is marked for a number of ranks at which nobody runs it."""

from __future__ import annotations

import pytest
from run import LAUNCHED_RANKS
from support.mpi_plugin import MARKED_RANKS


def test_every_marked_rank_count_is_launched(request: pytest.FixtureRequest) -> None:
    marked = request.config.stash[MARKED_RANKS]  # of everything that this run collected, deselected or not
    nowhere = {nodeid: ranks for nodeid, ranks in marked.items() if not set(ranks) <= set(LAUNCHED_RANKS)}
    assert not nowhere, f"tests/run.py launches {LAUNCHED_RANKS} ranks only; marked for others: {nowhere}"


@pytest.mark.ranks(*LAUNCHED_RANKS)
def test_a_launch_is_one_world_of_the_size_asked_for(request: pytest.FixtureRequest) -> None:
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    assert comm.size in LAUNCHED_RANKS
    assert comm.allgather(comm.rank) == list(range(comm.size))
    assert len(set(comm.allgather(tuple(request.config.stash[MARKED_RANKS])))) == 1
