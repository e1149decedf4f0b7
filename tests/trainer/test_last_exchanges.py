"""Checkpoints and the end of a run include pending exchanges and updates that are not exchanged yet."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from support import small_models

from mpitrain import DistributedOptimizer
from mpitrain.algorithms.elastic.center import AsynchronousCenter
from mpitrain.records import checkpoint
from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.evaluation import Evaluator
from mpitrain.trainer.loop import train

ON_THE_WAY_SECONDS = 0.2


@pytest.fixture
def evaluated(monkeypatch):
    """The vectors that this rank has evaluated."""
    evaluated, evaluate = [], Evaluator.evaluate

    def note(self, vector):
        evaluated.append(vector.copy())
        return evaluate(self, vector)

    monkeypatch.setattr(Evaluator, "evaluate", note)
    return evaluated


@pytest.fixture
def centers(world, monkeypatch):
    """The center of each run after all exchanges, on rank 0; None on the others."""
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
    """Background exchanges of the last rank reach the center late."""
    displace = AsynchronousCenter.displace

    def displace_late(self, *arguments):
        if world.rank == world.size - 1:
            time.sleep(ON_THE_WAY_SECONDS)
        displace(self, *arguments)

    monkeypatch.setattr(AsynchronousCenter, "displace", displace_late)


def saved_center(world, run: Path) -> np.ndarray | None:
    return checkpoint.load(checkpoint.latest(run / "checkpoints"), world)["optimizer"]["method"].get("center")


OVERLAPPED = TrainConfig("easgd", {"overlap": "true", "period": "1"}, model="support.small_models:watched", quiet=True)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("average", [None, "moving:0.5"])
def test_a_checkpoint_includes_pending_exchanges(world, mpi_tmp_path, monkeypatch, far_away, centers, average):
    def interrupt(n: int) -> None:
        if n == 5 and world.rank == 0:
            os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(small_models, "on_batch", interrupt)
    run = Path(mpi_tmp_path) / "run"
    config = dataclasses.replace(OVERLAPPED, epochs=None, minutes=5, average=average, out=str(run))
    assert not train(config, world)["complete"]
    world.barrier()
    np.testing.assert_array_equal(saved_center(world, run), centers[0])


@pytest.mark.ranks(2)
def test_the_end_is_evaluated_with_pending_exchanges(world, mpi_tmp_path, far_away, centers, evaluated):
    run = Path(mpi_tmp_path) / "run"
    assert train(dataclasses.replace(OVERLAPPED, epochs=None, steps=3, out=str(run)), world)["complete"]
    if world.rank == 0:
        np.testing.assert_array_equal(evaluated[-1], centers[0])
        assert (saved_center(world, run) != centers[0]).any()  # a longer run continues before the last exchange


@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", ["diloco", "easgd", "parle"])
def test_a_run_shorter_than_a_period_evaluates_and_saves_what_was_trained(world, mpi_tmp_path, evaluated, caplog, name):
    run = Path(mpi_tmp_path) / "run"
    config = TrainConfig(name, {"period": "100"}, model="support.small_models:watched", steps=10, quiet=True)
    train(dataclasses.replace(config, out=str(run)), world)
    if world.rank == 0:
        assert np.abs(evaluated[-1] - evaluated[0]).max() > 1e-3
        saved = checkpoint.load(checkpoint.latest(run / "checkpoints"), world)
        np.testing.assert_array_equal(saved["consensus"], evaluated[-1])
        assert "10 steps of each worker are fewer than 3 periods of 100 steps: set period=3 or less" in caplog.text


def not_committed(world, run: Path) -> np.ndarray:
    """Return the sum of the uncommitted changes in the newest checkpoint. Collective."""
    state = checkpoint.load(checkpoint.latest(run / "checkpoints"), world)["optimizer"]
    return world.comm.allreduce(state["parameters"].double().numpy() - state["method"]["origin"].double().numpy())


@pytest.mark.ranks(2)
@pytest.mark.parametrize("settings", [{"period": "7"}, {"push_period": "100", "fetch_period": "3"}])
def test_the_end_is_evaluated_with_every_step_and_saved_in_the_middle_of_a_period(
    world, mpi_tmp_path, evaluated, settings
):
    run = Path(mpi_tmp_path) / "run"
    finished = train(TrainConfig("downpour", settings, steps=20, lr=0.01, out=str(run), quiet=True), world)
    world.barrier()
    left = not_committed(world, run)
    assert np.abs(left).max() > 1e-3
    if world.rank == 0:
        np.testing.assert_allclose(evaluated[-1], saved_center(world, run) + left, rtol=0, atol=1e-6)
    again = train(TrainConfig.of_run(run, quiet=True), world, resume=run)  # nothing left to do
    for key in ("test_loss", "evaluation", "gradients", "bytes_sent"):
        assert again[key] == finished[key], key


@pytest.mark.ranks(1)
@pytest.mark.parametrize("name", ["downpour", "agn"])
def test_a_run_with_a_longer_budget_goes_on_as_if_it_had_not_been_at_its_end(world, mpi_tmp_path, name):
    folders = [Path(mpi_tmp_path) / name for name in ("whole", "parts")]
    config = TrainConfig(name, {"period": "8"}, lr=0.01, quiet=True)
    whole, _ = (
        train(dataclasses.replace(config, epochs=None, steps=steps, out=str(run)), world)
        for steps, run in zip((30, 20), folders, strict=True)
    )
    parts = train(TrainConfig.of_run(folders[1], steps=30, quiet=True), world, resume=folders[1])
    assert parts["test_loss"] == whole["test_loss"]
    assert parts["bytes_sent"] == whole["bytes_sent"]
    np.testing.assert_array_equal(*(saved_center(world, run) for run in folders))


@pytest.mark.ranks(1)
def test_an_evaluation_on_the_way_is_not_taken_for_that_of_the_end(world):
    result = train(TrainConfig("downpour", {"period": "100"}, gradients=20, evaluate_every=10, quiet=True), world)
    *on_the_way, end = result["evaluation"]  # the budget may be noticed some steps late
    assert [point["gradients"] for point in on_the_way][:2] == [0, 10]
    assert len({point["test_loss"] for point in on_the_way}) == 1
    assert end["gradients"] >= 20
    assert end["test_loss"] != on_the_way[0]["test_loss"]
