"""What is under way when a run is saved, or at its end, is in the center that is saved or evaluated."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import small_models

from mpitrain import DistributedOptimizer, checkpoint
from mpitrain.algorithms.elastic import AsynchronousCenter
from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.evaluation import Evaluator
from mpitrain.trainer.loop import train

ON_THE_WAY_SECONDS = 0.2


@pytest.fixture
def evaluated(monkeypatch):
    """What this rank has evaluated."""
    evaluated, evaluate = [], Evaluator.evaluate

    def note(self, vector):
        evaluated.append(vector.copy())
        return evaluate(self, vector)

    monkeypatch.setattr(Evaluator, "evaluate", note)
    return evaluated


@pytest.fixture
def centers(world, monkeypatch):
    """The center of each run when nobody can be at it any more, on rank 0; None on the others."""
    centers, close = [], DistributedOptimizer.close

    def look(self):
        self.state_dict()  # waits for this rank's exchange
        world.barrier()
        centers.append(self.state_dict()["method"].get("center"))
        world.barrier()
        close(self)

    monkeypatch.setattr(DistributedOptimizer, "close", look)
    return centers


@pytest.fixture
def far_away(world, monkeypatch):
    """The last rank's exchanges in the background come to the center late."""
    displace = AsynchronousCenter.displace

    def displace_late(self, *arguments):
        if world.rank == world.size - 1:
            time.sleep(ON_THE_WAY_SECONDS)
        displace(self, *arguments)

    monkeypatch.setattr(AsynchronousCenter, "displace", displace_late)


def saved_center(world, run: Path) -> np.ndarray | None:
    return checkpoint.load(checkpoint.latest(run / "checkpoints"), world)["optimizer"]["method"].get("center")


OVERLAPPED = TrainConfig("easgd", {"overlap": "true", "period": "1"}, model="small_models:watched", quiet=True)


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("average", [None, "moving:0.5"])
def test_a_checkpoint_has_what_was_under_way(world, mpi_tmp_path, monkeypatch, far_away, centers, average):
    def interrupt(n: int) -> None:
        if n == 5 and world.rank == 0:
            os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(small_models, "on_batch", interrupt)
    run = Path(mpi_tmp_path) / "run"
    config = dataclasses.replace(OVERLAPPED, epochs=None, minutes=5, average=average, out=str(run))
    assert not train(config, world)["complete"]
    world.barrier()
    np.testing.assert_array_equal(saved_center(world, run), centers[0])


@pytest.mark.ranks(1, 2, 3)
def test_the_end_is_evaluated_with_what_was_under_way(world, mpi_tmp_path, far_away, centers, evaluated):
    run = Path(mpi_tmp_path) / "run"
    assert train(dataclasses.replace(OVERLAPPED, epochs=None, steps=3, out=str(run)), world)["complete"]
    if world.rank == 0:
        np.testing.assert_array_equal(evaluated[-1], centers[0])
        np.testing.assert_array_equal(saved_center(world, run), centers[0])
