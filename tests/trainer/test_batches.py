"""The nodes of a run have the same data, whatever file each of them finds under the path."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from mpitrain.collectives.world.launch import create_world
from mpitrain.collectives.world.ranks import EMULATED_NODES
from mpitrain.data import hdf5_format
from mpitrain.errors import UsageError
from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.loop import train

pytestmark = [pytest.mark.ranks(2, 3), pytest.mark.time_limit(180)]


def write_data(path: Path, *, n: int = 64, classes: tuple[str, ...] = ("a", "b"), mean: float = 0.5) -> None:
    draw = np.random.default_rng(0)
    with h5py.File(path, "w") as content:
        hdf5_format.create(content, classes=list(classes), shape=(1, 8, 8), n=(n, 8))
        for split in ("train", "test"):
            content[split]["images"][...] = draw.integers(0, 255, content[split]["images"].shape)
            content[split]["labels"][...] = draw.integers(0, 2, content[split]["labels"].shape)
        content.attrs["mean"], content.attrs["std"] = np.full(1, mean), np.full(1, 0.2)


def change_one_pixel(path: Path) -> None:
    write_data(path)
    with h5py.File(path, "a") as content:
        content["train/images"][63, 0, 7, 7] ^= 1


def swap_two_samples(path: Path) -> None:
    write_data(path)
    with h5py.File(path, "a") as content:
        for array in content["train"].values():
            array[:2] = array[:2][::-1]


OTHERS = {
    "sample more": (
        lambda path: write_data(path, n=65),
        r"the data \(train\) differs between ranks: 64 on RANKS, 65 on",
    ),
    "class more": (
        lambda path: write_data(path, classes=("a", "b", "c")),
        r"the data \(classes\) .*: 2 on RANKS, 3 on",
    ),
    "class named otherwise": (lambda path: write_data(path, classes=("a", "c")), r"the data \(digest\) .* on RANKS, "),
    "normalisation": (lambda path: write_data(path, mean=0.4), r"the data \(digest\) .* on RANKS, "),
    "pixel": (change_one_pixel, r"the data \(digest\) .* on RANKS, "),
    "order": (swap_two_samples, r"the data \(digest\) .* on RANKS, "),
}


@pytest.fixture
def two_nodes(world, monkeypatch):
    """The ranks of this launch, as on two nodes. Collective."""
    from mpi4py import MPI

    monkeypatch.setenv(EMULATED_NODES, "2")
    made = create_world(MPI.COMM_WORLD.Dup())
    yield made
    made.comm.Barrier()
    if made.progress_thread is not None:
        made.progress_thread.stop()
    made.free()


@pytest.fixture
def on_own_node(two_nodes, mpi_tmp_path, monkeypatch):
    """Go to a folder of this rank's node, in which the path `data.h5` names another file than on the other node."""
    folder = Path(mpi_tmp_path) / f"node{two_nodes.node}"
    if two_nodes.local_rank == 0:
        folder.mkdir()
    two_nodes.comm.Barrier()
    monkeypatch.chdir(folder)
    return folder


def run(world, out):
    return train(TrainConfig("easgd", data="data.h5", out=str(out), quiet=True, epochs=None, steps=2), world)


@pytest.mark.parametrize("kind", OTHERS)
def test_another_file_on_another_node_is_refused_before_the_first_step(two_nodes, on_own_node, mpi_tmp_path, kind):
    write, words = OTHERS[kind]
    if two_nodes.local_rank == 0:
        (write if two_nodes.node else write_data)(on_own_node / "data.h5")
    two_nodes.comm.Barrier()
    first = [rank for rank, node in enumerate(two_nodes.comm.allgather(two_nodes.node)) if node == 0]
    ranks = f"rank{'s' * (len(first) > 1)} {', '.join(map(str, first))}"
    with pytest.raises(UsageError, match=words.replace("RANKS", ranks)) as error:
        run(two_nodes, Path(mpi_tmp_path) / "run")
    assert str(error.value).endswith("; give every node a copy of the same file")
    assert "\n" not in str(error.value)
    two_nodes.comm.Barrier()
    assert not [path.name for path in (Path(mpi_tmp_path) / "run").glob("*")]


def test_a_copy_of_the_file_on_every_node_is_accepted(two_nodes, on_own_node, mpi_tmp_path):
    if two_nodes.local_rank == 0:
        write_data(on_own_node / "data.h5")
    two_nodes.comm.Barrier()
    assert run(two_nodes, Path(mpi_tmp_path) / "run")["steps"] == 2
