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


MOUNTS = """\
/dev/sda / ext4 rw 0 0
server:/home /home nfs4 rw 0 0
tmpfs /dev/shm tmpfs rw 0 0
server:/two /home/two\\040words lustre rw 0 0
/dev/sdb /home/me ext4 rw 0 0
server:/me /home/me nfs4 rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/a/run", "nfs4"),
        ("/homes/run", "ext4"),
        ("/dev/shm/run", "tmpfs"),
        ("/home/two words/run", "lustre"),
        ("/home/me/run", "nfs4"),
        ("/", "ext4"),
    ],
)
def test_the_file_system_is_that_of_the_deepest_and_last_mount(path, kind):
    assert runfolder.file_system(path, MOUNTS) == kind
