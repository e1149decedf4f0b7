"""Logs of whole runs: on the lead only, continued by a resumed run, and no danger to the training."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from mpitrain.loggers import BACKENDS, Backend
from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.loop import train

TINY: dict[str, Any] = {
    "data": "synthetic:n=64,shape=6,classes=3",
    "model": "mlp:hidden=8",
    "batch_size": 8,
    "quiet": True,
    "evaluate_every": 2,
    "log": ("csv",),
}


def rows(folder: Path, name: str) -> list[tuple[int, float]]:
    """Return the steps and the values of a column of the log."""
    with (folder / "log.csv").open(newline="") as file:
        return [(int(row["step"]), float(row[name])) for row in csv.DictReader(file) if row[name]]


@pytest.mark.ranks(1, 2)
def test_the_log_has_the_numbers_of_the_result_and_a_resumed_run_continues_it(world: Any, mpi_tmp_path: Path) -> None:
    folder = Path(mpi_tmp_path) / "run"
    train(TrainConfig("allreduce", **TINY, steps=4, checkpoint_every=4, out=str(folder)), world)
    found = train(TrainConfig.of_run(folder, steps=8), world, resume=folder)
    if world.rank == 0:
        expected = [(point["step"], point["test_loss"]) for point in found["evaluation"]]
        assert expected[-1][0] == 8
        assert list(dict.fromkeys(rows(folder, "test/loss"))) == expected
        assert rows(folder, "train/gradients")[-1] == (8, 8 * world.size)
    world.barrier()


class Breaks:
    """A back-end whose server goes away after the first numbers, and one that any other rank would notice."""

    begun = 0

    def __init__(self, folder: Path | None) -> None:
        self._n = 0

    def begin(self, config: Any) -> None:
        Breaks.begun += 1
        assert config["config"]["lr"] == 0.05
        assert config["algorithm"] == "easgd"

    def log(self, step: int, values: Any) -> None:
        self._n += 1
        if self._n == 2:
            raise OSError(28, "No space left on device")
        assert self._n < 2, "it was left out"

    def end(self, result: Any) -> None:
        raise AssertionError("it was left out")


@pytest.mark.ranks(2)
def test_a_backend_that_breaks_in_the_middle_does_not_change_the_run(
    world: Any, mpi_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKENDS, "csv", Backend(Breaks, None, needs_folder=False))
    Breaks.begun = 0
    found = train(TrainConfig("easgd", **TINY, steps=12), world)
    assert found["complete"]
    assert min(found["steps_of_ranks"]) == 12
    assert Breaks.begun == (world.rank == 0)
