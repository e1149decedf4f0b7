"""The folder of a run must be the same on all ranks; a rank that does not see it is named before anything is loaded."""

from __future__ import annotations

import socket

import pytest

from mpitrain.errors import UsageError
from mpitrain.trainer import runfolder, runlock


@pytest.mark.ranks(1, 2, 3)
def test_a_shared_folder_is_accepted_and_left_as_it_was(world, mpi_tmp_path):
    runfolder.require_shared(mpi_tmp_path, world)
    world.barrier()
    assert list(mpi_tmp_path.iterdir()) == []


@pytest.mark.ranks(2, 3)
def test_a_rank_without_the_folder_is_named_on_all_ranks(world, mpi_tmp_path, monkeypatch):
    monkeypatch.setattr(runfolder, "SECONDS_TO_APPEAR", 0.0)
    own = mpi_tmp_path / ("shared" if world.rank != 1 else "of-another-node")
    with (
        pytest.raises(UsageError, match=f"^rank 1 on {socket.gethostname()} does not see the folder .*all nodes share"),
        runlock.held(own, world),
    ):
        pass
    world.barrier()
    assert [path.name for path in mpi_tmp_path.iterdir()] == ["shared"]
    assert list((mpi_tmp_path / "shared").iterdir()) == []  # neither the lock nor the file that was looked for
