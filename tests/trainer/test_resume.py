"""Resumed runs: a synchronous one equals an uninterrupted one, the others continue every counter."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from support import small_models

from mpitrain.algorithms import METHODS
from mpitrain.data import hdf5_format
from mpitrain.errors import UsageError
from mpitrain.optimizer.distributed import DistributedOptimizer
from mpitrain.records import checkpoint
from mpitrain.records.checkpoint_writer import CheckpointWriter
from mpitrain.records.metrics import read_metrics
from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.evaluation import Evaluator
from mpitrain.trainer.loop import train
from mpitrain.trainer.plan import RunPlan

SYNCHRONOUS = {
    "allreduce": TrainConfig(algorithm="allreduce", model="support.small_models:watched"),
    "eamsgd": TrainConfig(algorithm="eamsgd", settings={"synchronous": "true", "period": "4"}, lr=0.005),
}
ASYNCHRONOUS = [("eamsgd", {}), ("gossip", {"direction": "push"})]


@pytest.fixture
def go(world, mpi_tmp_path):
    """A function that trains in a folder of the test, or resumes there with a given budget. Collective."""

    def go(config: TrainConfig, name: str, *, resume: bool = False, **budget: float):
        folder = Path(mpi_tmp_path) / name
        if resume:
            return train(TrainConfig.of_run(folder, quiet=True, **budget), world, resume=folder)
        return train(dataclasses.replace(config, out=str(folder), quiet=True, epochs=None, **budget), world)

    go.folder = Path(mpi_tmp_path)
    return go


@pytest.fixture
def at_batch(world):
    """A function that registers a callback for a training batch of the model `small_models:watched`."""

    def at_batch(number: int, function, rank: int | None = None) -> None:
        small_models.on_batch = lambda n: function() if n == number and rank in (None, world.rank) else None

    yield at_batch
    small_models.on_batch = None


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)


def saved(world, run: Path) -> dict:
    """Return this rank's part of a run's newest checkpoint, without values that depend on the clock. Collective."""
    state = checkpoint.load(checkpoint.latest(run / "checkpoints"), world)
    of_clocks = ("seconds", "compute_seconds", "exchange_seconds", "cpu_seconds", "serving_cpu_seconds")
    for name in (*of_clocks, "statistics", "points"):
        del state[name]
    return state


def same(a, b) -> bool:
    """Return whether two nested states are equal to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return np.array_equal(a, b, equal_nan=isinstance(a, (float, np.ndarray)))


@pytest.mark.ranks(3)
@pytest.mark.parametrize("config", SYNCHRONOUS.values(), ids=SYNCHRONOUS)
def test_a_resumed_synchronous_run_equals_an_uninterrupted_one(world, go, config):
    whole = go(config, "whole", steps=30, evaluate_every=7)
    go(config, "parts", steps=13)  # in the middle of an epoch, and of a period
    parts = go(config, "parts", resume=True, steps=30)
    assert (parts["test_loss"], parts["test_accuracy"]) == (whole["test_loss"], whole["test_accuracy"])
    assert same(saved(world, go.folder / "parts"), saved(world, go.folder / "whole"))
    assert parts["bytes_sent"] == whole["bytes_sent"]


@pytest.mark.ranks(2)
def test_the_seconds_of_computing_and_exchanging_go_on_after_a_resume(world, go):
    config = TrainConfig(algorithm="allreduce", model="support.small_models:watched")
    go(config, "run", steps=30)
    before = checkpoint.load(checkpoint.latest(go.folder / "run" / "checkpoints"), world)
    go(config, "run", resume=True, steps=31)
    after = checkpoint.load(checkpoint.latest(go.folder / "run" / "checkpoints"), world)
    for name in ("seconds", "compute_seconds", "exchange_seconds", "cpu_seconds"):
        assert after[name] > before[name] > 0, name


TINY = {"data": "synthetic:n=96,shape=64,classes=10", "model": "support.small_models:watched", "batch_size": 8}
RANDOM = {
    **{name: TrainConfig(name, **TINY, lr=0.01 * METHODS[name].learning_rate_factor) for name in METHODS},
    "another seed, sharded, moving": TrainConfig("allreduce", **TINY, seed=7, sampling="sharded", average="moving:0.2"),
    "polyak": TrainConfig("easgd", {"synchronous": "true"}, **TINY, average="polyak"),
}
"""All of these draw for dropout, and the method or the option may draw as well."""


def of_each_family(names: list[str]) -> list[str]:
    """Return the first method of each family; all options. test_contract.py has the state of every method."""
    families = {METHODS[name].__module__.split(".")[2]: name for name in reversed(names) if name in METHODS}
    return [name for name in names if name in families.values() or name not in METHODS]


SYNCHRONOUS_NAMES = [name for name in RANDOM if RunPlan.of(RANDOM[name]).method.is_synchronous]
IN_LOCKSTEP = [name for name in of_each_family(SYNCHRONOUS_NAMES) if name != "allreduce"]  # the options have allreduce
ALONE = [name for name in of_each_family(list(RANDOM)) if name not in SYNCHRONOUS_NAMES]


def check_resumed_as_if_uninterrupted(world, go, config):
    whole = go(config, "whole", steps=29, evaluate_every=5, checkpoint_every=100)  # at the end only
    go(config, "parts", steps=13)  # in the middle of an epoch
    parts = go(config, "parts", resume=True, steps=29, evaluate_every=5)
    assert (parts["test_loss"], parts["bytes_sent"]) == (whole["test_loss"], whole["bytes_sent"])
    assert same(saved(world, go.folder / "parts"), saved(world, go.folder / "whole"))
    if world.size == 1:  # with more, an evaluation on the way reads the other workers at whatever step they are
        late = [point["test_loss"] for point in whole["evaluation"] if point["step"] > 13]
        assert [point["test_loss"] for point in parts["evaluation"] if point["step"] > 13] == late


@pytest.mark.ranks(1)
@pytest.mark.parametrize("name", ALONE)
def test_one_rank_draws_the_same_after_a_resume(world, go, name):
    check_resumed_as_if_uninterrupted(world, go, RANDOM[name])


@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", IN_LOCKSTEP)
def test_ranks_in_lockstep_draw_the_same_after_a_resume(world, go, name):
    check_resumed_as_if_uninterrupted(world, go, RANDOM[name])


@pytest.mark.ranks(2)
def test_augmentation_draws_the_same_after_a_resume(world, go):
    file = go.folder / "images.h5"
    if world.rank == 0:
        draw = np.random.default_rng(0)
        with h5py.File(file, "w") as content:
            hdf5_format.create(content, classes=["a", "b"], shape=(1, 28, 28), n=(64, 8))
            for split in ("train", "test"):
                content[split]["images"][...] = draw.integers(0, 255, content[split]["images"].shape)
                content[split]["labels"][...] = 0
            content.attrs["mean"], content.attrs["std"] = np.full(1, 0.5), np.full(1, 0.2)
    world.barrier()
    config = TrainConfig("allreduce", data=str(file), batch_size=8, augment=True)
    whole = go(config, "whole", steps=9)
    go(config, "parts", steps=5)
    assert go(config, "parts", resume=True, steps=9)["test_loss"] == whole["test_loss"]
    assert same(saved(world, go.folder / "parts"), saved(world, go.folder / "whole"))
    plain = go(dataclasses.replace(config, augment=False), "plain", steps=9)
    assert plain["test_loss"] != whole["test_loss"]


@pytest.mark.ranks(2)
@pytest.mark.parametrize("budget", [{"steps": 40}, {"minutes": 5}])
def test_a_synchronous_run_stopped_by_a_signal_goes_on_as_if_it_had_not(world, go, at_batch, budget):
    config = SYNCHRONOUS["allreduce"]
    go(config, "whole", steps=40)
    at_batch(15, interrupt, rank=0)
    stopped = go(config, "stopped", **budget)
    assert not stopped["complete"]
    assert 15 <= stopped["steps"] <= 25
    assert "test_accuracy" not in stopped
    assert not (go.folder / "stopped" / "result.json").exists()
    world.barrier()
    small_models.on_batch = None
    finished = go(config, "stopped", resume=True, steps=40)
    assert finished["complete"]
    assert (go.folder / "stopped" / "result.json").exists()
    assert same(saved(world, go.folder / "stopped"), saved(world, go.folder / "whole"))


@pytest.mark.ranks(2)
def test_evaluations_that_are_deferred_wait_in_the_checkpoint(world, go, at_batch):
    config = dataclasses.replace(SYNCHRONOUS["allreduce"], defer_evaluation=True, evaluate_every=7)
    whole = go(config, "whole", steps=40)
    at_batch(15, interrupt, rank=0)
    assert not go(config, "stopped", steps=40)["complete"]
    small_models.on_batch = None
    finished = go(config, "stopped", resume=True)
    again = go(config, "stopped", resume=True)  # nothing left to do
    longer = go(config, "stopped", resume=True, steps=45)
    assert again["evaluation"] == finished["evaluation"] == longer["evaluation"][:-2]
    for point, wanted in zip(finished["evaluation"], whole["evaluation"], strict=True):
        for key in ("step", "test_loss", "test_accuracy"):
            assert point[key] == wanted[key], key
    assert [point["step"] for point in longer["evaluation"]] == [0, 7, 14, 21, 28, 35, 40, 42, 45]
    world.barrier()
    found = read_metrics(go.folder / "stopped" / "metrics.h5")["evaluation"]
    assert found["step"].tolist() == [point["step"] for point in longer["evaluation"]]
    assert found["test_loss"].tolist() == [point["test_loss"] for point in longer["evaluation"]]


@pytest.mark.ranks(2)
@pytest.mark.parametrize(("name", "settings"), ASYNCHRONOUS)
def test_a_resumed_asynchronous_run_continues_every_counter(world, go, at_batch, name, settings):
    config = TrainConfig(algorithm=name, settings=settings, model="support.small_models:watched", lr=0.005)
    at_batch(12, interrupt, rank=0)
    before = go(config, "run", steps=30)
    assert not before["complete"]
    small_models.on_batch = None
    after = go(config, "run", resume=True)
    assert after["complete"]
    assert after["steps_of_ranks"] == [30] * world.size
    assert after["gradients"] == 30 * world.size
    assert after["gradients"] > before["gradients"]
    assert after["bytes_sent"] >= before["bytes_sent"]
    assert after["seconds"] >= before["evaluation"][-1]["seconds"]
    assert after["evaluation"][: len(before["evaluation"])] == before["evaluation"]
    for table, columns in read_metrics(go.folder / "run" / "metrics.h5").items():
        for column in ("seconds", "gradients"):
            values = columns.get(column, np.zeros(1))
            assert (np.diff(values[np.isfinite(values)]) >= 0).all(), (table, column)


@pytest.mark.ranks(2)
def test_a_signal_is_obeyed_while_a_slow_rank_makes_its_last_steps(world, go, at_batch):
    config = TrainConfig(model="support.small_models:watched", checkpoint_every=0)
    at_batch(5, interrupt, rank=0)  # heard by rank 0, which has no more steps to make
    slow = dataclasses.replace(config, straggler=(1, 500.0))
    stopped = go(slow, "run", steps=5)
    assert not stopped["complete"]
    assert stopped["steps_of_ranks"][0] == 5
    assert stopped["steps_of_ranks"][1] < 5
    small_models.on_batch = None
    finished = go(config, "run", resume=True, straggler=(1, 1.0))
    assert finished["steps_of_ranks"] == [5, 5]


@pytest.fixture
def heard():
    """The signals that reach the handler from before the run, which must be restored after it."""
    heard: list[int] = []

    def note(number: int, frame: object) -> None:
        heard.append(number)

    before = signal.signal(signal.SIGUSR1, note)
    yield heard
    assert signal.getsignal(signal.SIGUSR1) is note
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.ranks(2)
def test_a_signal_after_the_last_step_does_not_interrupt_the_end_of_a_run(world, go, monkeypatch, heard):
    evaluate, start = Evaluator.evaluate, CheckpointWriter.start

    def evaluate_interrupted(self, vector):
        interrupt()
        return evaluate(self, vector)

    def save_interrupted(*arguments):
        interrupt()
        return start(*arguments)

    def last_step(n: int) -> None:
        if n == 6:
            monkeypatch.setattr(Evaluator, "evaluate", evaluate_interrupted)
            monkeypatch.setattr(CheckpointWriter, "start", save_interrupted)

    monkeypatch.setattr(small_models, "on_batch", last_step)
    config = TrainConfig(algorithm="allreduce", model="support.small_models:watched")
    assert go(config, "run", steps=6)["complete"]
    assert heard == []
    assert (go.folder / "run" / "result.json").exists()


@pytest.mark.ranks(1)
def test_a_run_that_fails_puts_the_handler_of_the_signal_back(world, go, at_batch, heard):
    def fail() -> None:
        raise ArithmeticError("a reason of the model's own")

    with pytest.raises(UsageError, match="--straggler"):
        go(TrainConfig(), "none", steps=5, straggler=(1, 2.0))
    interrupt()
    assert heard == [signal.SIGUSR1]
    at_batch(3, fail)
    with pytest.raises(ArithmeticError):
        go(TrainConfig(model="support.small_models:watched"), "run", steps=5)


@pytest.mark.ranks(2)
def test_a_finished_run_goes_on_with_a_longer_budget_and_is_unfinished_meanwhile(world, go, at_batch):
    config = TrainConfig(model="support.small_models:watched", settings={"period": "3"})
    go(config, "run", steps=10)
    result = go.folder / "run" / "result.json"
    assert result.exists()
    world.barrier()
    there = []
    at_batch(10, lambda: there.append(result.exists()), rank=0)
    longer = go(config, "run", resume=True, epochs=1)
    assert longer["steps"] == 1438 // 32 // world.size
    assert longer["settings"]["period"] == 3
    assert result.exists()
    assert there == ([False] if world.rank == 0 else [])
    assert TrainConfig.of_run(go.folder / "run").epochs == 1  # and is kept for the next time


@pytest.mark.ranks(2)
def test_the_remains_of_a_checkpoint_after_a_crash_do_no_harm(world, go):
    config = TrainConfig(algorithm="allreduce")
    go(config, "run", steps=10)
    checkpoints = go.folder / "run" / "checkpoints"
    stale = checkpoints / ".step-00000020.partial"
    if world.rank == 0:
        stale.mkdir()
        (stale / "rank-00000.h5").write_bytes(b"half of a file")
        (stale / "rank-00009.h5").touch()
    world.barrier()
    assert go(config, "run", resume=True, steps=20)["steps"] == 20
    world.barrier()
    newest = checkpoint.latest(checkpoints)
    assert newest.name == "step-00000020"
    assert len(list(newest.glob("rank-*.h5"))) == world.size
    assert not stale.exists()


@pytest.mark.ranks(2)
def test_a_refused_resume_leaves_the_metrics_as_they_are(world, go, monkeypatch):
    config = TrainConfig(algorithm="allreduce", checkpoint_every=5)
    go(config, "run", steps=8)
    if world.rank == 0:  # the run continues from step 5, and the metrics have later rows
        shutil.rmtree(checkpoint.latest(go.folder / "run" / "checkpoints"))
    world.barrier()
    metrics = go.folder / "run" / "metrics.h5"
    before = world.comm.bcast(metrics.read_bytes() if world.rank == 0 else None)

    def refuse(self, state):
        raise UsageError("a state of another method")

    monkeypatch.setattr(DistributedOptimizer, "load_state_dict", refuse)
    with pytest.raises(UsageError, match="another method"):
        go(config, "run", resume=True, steps=20)
    world.barrier()
    assert metrics.read_bytes() == before


@pytest.mark.ranks(2)
def test_metrics_that_cannot_be_read_do_not_keep_a_run_from_going_on(world, go, capfd):
    go(TrainConfig(algorithm="allreduce"), "run", steps=10)
    folder = go.folder / "run"
    if world.rank == 0:
        (folder / "metrics.h5.damaged-1").touch()
        os.truncate(folder / "metrics.h5", 2000)
    world.barrier()
    assert go(TrainConfig(algorithm="allreduce"), "run", resume=True, steps=20)["steps"] == 20
    warnings = [line for line in capfd.readouterr().err.splitlines() if "it is renamed to metrics.h5.damaged-2" in line]
    assert len(warnings) == (world.rank == 0)
    world.barrier()
    assert (folder / "metrics.h5.damaged-2").stat().st_size == 2000
    assert max(read_metrics(folder / "metrics.h5")["progress"]["step"]) == 20


@pytest.mark.ranks(2)
def test_a_run_without_a_place_for_its_metrics_goes_on_without(world, go, capfd):
    folder = go.folder / "run"
    if world.rank == 0:
        (folder / "metrics.h5.building").mkdir(parents=True)
    world.barrier()
    assert go(TrainConfig(algorithm="allreduce"), "run", steps=10)["complete"]
    assert capfd.readouterr().err.count("this run has no metrics") == (world.rank == 0)


def test_only_options_that_do_not_change_the_result_can_be_changed(tmp_path):
    config = TrainConfig(settings={"period": "3"}, lr=0.1, straggler=(1, 2.0), out=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"config": config.to_json()}))
    assert TrainConfig.of_run(tmp_path) == config
    repeated = TrainConfig.of_run(tmp_path, settings={"period": "3"}, lr=0.1, algorithm="easgd", steps=7, quiet=True)
    assert repeated == dataclasses.replace(config, epochs=None, steps=7, quiet=True)
    for changes in ({"lr": 0.2}, {"settings": {"period": "4"}}, {"settings": {"rho": "1"}}, {"algorithm": "gossip"}):
        with pytest.raises(UsageError, match=r"in the run that is resumed, not .*: leave it out"):
            TrainConfig.of_run(tmp_path, **changes)


@pytest.mark.parametrize("text", ["", "{}", '{"config": 3}', '{"config": {"straggler": null, "unknown": 1}}'])
def test_a_folder_without_a_readable_configuration_is_no_run(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError, match="is not the folder of a run"):
        TrainConfig.of_run(tmp_path)
