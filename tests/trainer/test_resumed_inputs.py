"""A resumed run continues with the data and the model that it began with: known by content, not by name."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from support import small_models
from torch import nn

from mpitrain.data import hdf5_format
from mpitrain.errors import UsageError
from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.loop import train


def write_data(path: Path, seed: int) -> None:
    draw = np.random.default_rng(seed)
    path.parent.mkdir(exist_ok=True)
    with h5py.File(path, "w") as content:
        hdf5_format.create(content, classes=["a", "b"], shape=(1, 8, 8), n=(64, 8))
        for split in ("train", "test"):
            content[split]["images"][...] = draw.integers(0, 255, content[split]["images"].shape)
            content[split]["labels"][...] = draw.integers(0, 2, content[split]["labels"].shape)
        content.attrs["mean"], content.attrs["std"] = np.full(1, 0.5), np.full(1, 0.2)


def on_rank_0(world, action) -> None:
    """Act on rank 0 while the others wait. Collective."""
    world.barrier()
    if world.rank == 0:
        action()
    world.barrier()


@pytest.fixture
def begun(world, mpi_tmp_path):
    """The folder of a run of a few steps with the file `data/some.h5` beside it. Collective."""
    folder, file = Path(mpi_tmp_path) / "run", Path(mpi_tmp_path) / "data" / "some.h5"
    on_rank_0(world, lambda: write_data(file, 0))
    train(TrainConfig("allreduce", data=str(file), out=str(folder), quiet=True, epochs=None, steps=3), world)
    world.barrier()
    return folder, file


@pytest.mark.ranks(2)
def test_data_that_moved_are_named_anew_and_the_run_continues(world, begun):
    folder, file = begun
    moved = file.parent / "moved" / "other.h5"
    on_rank_0(world, lambda: (moved.parent.mkdir(), shutil.move(file, moved)))
    with pytest.raises(UsageError, match=r"no data file .*some\.h5: check the path \(--data\)"):
        train(TrainConfig.of_run(folder, steps=5), world, resume=folder)
    world.barrier()
    done = train(TrainConfig.of_run(folder, data=str(moved), steps=5), world, resume=folder)
    assert done["steps"] == 5
    world.barrier()
    assert train(TrainConfig.of_run(folder, steps=6), world, resume=folder)["steps"] == 6  # the new name is kept


@pytest.mark.ranks(2)
@pytest.mark.parametrize("data", [None, "another name", "digits", "synthetic:n=64,shape=1x8x8,classes=2,test=8"])
def test_other_data_are_refused_under_any_name_and_nothing_changes(world, begun, data):
    folder, file = begun
    if data is None or data == "another name":
        file = file if data is None else file.with_name("new.h5")
        on_rank_0(world, lambda: write_data(file, 1))
        data = data and str(file)
    kept = [(folder / name).read_bytes() for name in ("config.json", "metrics.h5", "result.json")]
    words = "training samples instead of 64" if data == "digits" else "other contents"
    with pytest.raises(UsageError, match=f"is not the data of the run .*/run: it has .*{words}; name the file"):
        train(TrainConfig.of_run(folder, data=data, steps=5), world, resume=folder)
    world.barrier()
    assert [(folder / name).read_bytes() for name in ("config.json", "metrics.h5", "result.json")] == kept


@pytest.mark.ranks(1)
def test_a_run_that_does_not_say_what_its_data_were_is_refused(world, begun):
    folder, _ = begun
    document = json.loads((folder / "config.json").read_text())
    del document["data"]
    (folder / "config.json").write_text(json.dumps(document))
    with pytest.raises(UsageError, match="does not describe the data of the run"):
        train(TrainConfig.of_run(folder, steps=5), world, resume=folder)


class Net(nn.Module):
    """A classifier of the digits with two layers of the same shape."""

    def __init__(self, names: tuple[str, str], width: int, buffers: dict[str, int]) -> None:
        super().__init__()
        self.first = nn.Linear(64, width)
        for name in names:
            setattr(self, name, nn.Linear(width, width))
        self.last = nn.Linear(width, 10)
        for name, size in buffers.items():
            self.register_buffer(name, torch.zeros(size))
        self.names = names

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x.flatten(1))
        for name in self.names:
            x = getattr(self, name)(x)
        return self.last(x)


NETS = {
    "another name": ((("a", "c"), 8, {"seen": 1}), r"parameter number 4 is b\.weight \(8, 8\) .* c\.weight \(8, 8\)"),
    "another order": ((("b", "a"), 8, {"seen": 1}), r"number 2 is a\.weight \(8, 8\) .* b\.weight \(8, 8\)"),
    "another shape": ((("a", "b"), 9, {"seen": 1}), r"number 0 is first\.weight \(8, 64\) .* \(9, 64\)"),
    "one layer less": ((("a",), 8, {"seen": 1}), r"number 4 is b\.weight \(8, 8\) .* last\.weight \(10, 8\)"),
    "one layer more": ((("a", "b", "c"), 8, {"seen": 1}), r"number 6 is last\.weight \(10, 8\) .* c\.weight"),
    "another buffer": ((("a", "b"), 8, {"met": 1}), r"buffer seen is \(1,\) in the checkpoint and absent"),
    "a longer buffer": ((("a", "b"), 8, {"seen": 3}), r"buffer seen is \(1,\) in the checkpoint and \(3,\)"),
    "one buffer more": ((("a", "b"), 8, {"seen": 1, "met": 2}), r"buffer met is absent .* and \(2,\)"),
}


@pytest.mark.ranks(2)
def test_another_model_of_the_same_function_is_refused_with_one_line(world, mpi_tmp_path, monkeypatch):
    folder = Path(mpi_tmp_path) / "run"
    begins_with = (("a", "b"), 8, {"seen": 1})
    monkeypatch.setattr(small_models, "net", lambda: Net(*begins_with), raising=False)
    config = TrainConfig("allreduce", model="support.small_models:net", quiet=True, epochs=None, steps=3)
    train(dataclasses.replace(config, out=str(folder)), world)
    for arguments, words in NETS.values():
        world.barrier()
        monkeypatch.setattr(small_models, "net", lambda arguments=arguments: Net(*arguments))
        with pytest.raises(UsageError, match=f"^(?=.*another model).*{words}"):
            train(TrainConfig.of_run(folder, steps=5), world, resume=folder)
    world.barrier()
    monkeypatch.setattr(small_models, "net", lambda: Net(*begins_with))
    assert train(TrainConfig.of_run(folder, steps=5), world, resume=folder)["steps"] == 5
