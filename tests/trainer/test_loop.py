"""Training runs: every method learns, budgets are kept, and the result is complete."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
from support import small_models

from mpitrain.algorithms import METHODS
from mpitrain.records.metrics import read_metrics
from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.loop import train
from mpitrain.trainer.plan import RunPlan

ASYNCHRONOUS = [name for name, method in METHODS.items() if not method().is_synchronous]


def kind(name: str) -> tuple[bool, ...]:
    """Return the properties of a method that the training loop and the optimizer tell apart."""
    properties = ("is_synchronous", "owns_update", "needs_gradient", "needs_loss", "shares_parameters", "on_host")
    method = RunPlan.of(TrainConfig(name)).method
    return tuple(getattr(method, prop) for prop in properties)


def kinds() -> list[str]:
    """Return the first method of each kind."""
    return list({kind(name): name for name in reversed(METHODS)}.values())


BUDGETED = ["allreduce", "easgd", "gossip"]
"""One method for each way to end a run: the ranks in lockstep, with a center, and on their own."""


GRADIENTS_MADE_BEFORE_AN_ORDER_IS_HEARD = 3000  # of a tiny model, in a second in which rank 0 does not get its turn


def one_of_each_family() -> list[str]:
    """Return the first method of each family.

    test_contract.py has the convergence and the state of every method, test_equal_gradients.py its accuracy.
    """
    return list({METHODS[name].__module__.split(".")[2]: name for name in reversed(METHODS)}.values())


@pytest.mark.ranks(4)
@pytest.mark.parametrize("name", one_of_each_family())
def test_a_method_of_each_family_learns_the_digits(world, name):
    lr = 0.05 * METHODS[name].learning_rate_factor
    settings = {key: str(value) for key, value in METHODS[name].short_run.items()}
    for _ in range(3):  # gossip with a rank that gets no core pulls the others back to its parameters
        result = train(TrainConfig(name, settings, lr=lr, epochs=6, batch_size=16, quiet=True), world)
        if min(result["steps_of_ranks"]) > max(result["steps_of_ranks"]) / 2:
            break
    assert result["test_accuracy"] >= 0.85
    assert result["test_loss"] < 0.7
    assert result["n_nonfinite"] == 0


@pytest.fixture(scope="module", params=kinds())
def finished(world, tmp_path_factory, request):
    """The name of a method, the folder of a run that ended in the middle of a period, and its result. Collective."""
    name = request.param
    folder = world.comm.bcast(tmp_path_factory.mktemp("finished") / "run" if world.rank == 0 else None)
    lr = 0.05 * METHODS[name].learning_rate_factor
    settings = {key: str(value) for key, value in three_for_every_period(name).items()}
    slow_rank = (world.size - 1, 3.0)
    config = TrainConfig(name, settings, lr=lr, steps=20, straggler=slow_rank, out=str(folder), quiet=True)
    return name, folder, train(config, world)


def three_for_every_period(name):
    return {field.name: 3 for field in dataclasses.fields(METHODS[name]) if field.name.endswith("period")}


@pytest.mark.ranks(3)
def test_the_result_says_what_was_asked_for_and_what_came_out(world, finished):
    name, folder, result = finished
    p = world.size
    assert (result["algorithm"], result["ranks"], result["complete"]) == (name, p, True)
    asked = METHODS[name](**three_for_every_period(name)).settings()
    shared = {"node_shared": True} if "node_shared" in asked else {}  # what train sets, as nobody else writes
    assert result["settings"] == {**asked, **shared}
    assert (result["steps"], result["steps_of_ranks"], result["gradients"]) == (20, [20] * p, 20 * p)
    assert 0 <= result["test_accuracy"] <= 1
    assert 0 < result["test_loss"] < math.inf
    assert 0 < result["train_loss"] < math.inf
    assert result["seconds"] > 0
    assert result["samples_per_second"] == pytest.approx(20 * p * 32 / result["seconds"])
    assert (
        result["bytes_sent"] > 0 or p == 1 or METHODS[name].needs_loss
    )  # a method that ranks workers may have nothing to send
    assert sum(result["shares"].values()) == pytest.approx(1)
    assert result["parameters"] > 1000
    assert {"mpitrain", "python", "torch", "numpy", "mpi4py"} <= result["versions"].keys()
    assert result["evaluation"][0]["step"] == 0
    assert result["evaluation"][-1]["step"] == 20
    assert result["evaluation"][-1]["gradients"] == 20 * p
    assert result["evaluation"][-1]["test_loss"] == result["test_loss"]
    assert world.comm.bcast(result) == result  # the same on every rank
    assert json.loads((folder / "result.json").read_text()) == json.loads(json.dumps(result))
    assert json.loads((folder / "config.json").read_text())["config"]["steps"] == 20


@pytest.mark.ranks(3)
def test_a_finished_run_is_saved_as_it_was_evaluated(world, finished):
    _, folder, result = finished
    again = train(TrainConfig.of_run(folder, quiet=True), world, resume=folder)  # nothing left to do
    for key in ("test_loss", "test_accuracy", "steps_of_ranks", "gradients", "bytes_sent", "train_loss", "evaluation"):
        assert again[key] == result[key], key
    assert json.loads((folder / "result.json").read_text())["steps"] == 20


@pytest.mark.ranks(2)
def test_a_run_that_diverges_still_writes_documents_that_any_reader_takes(world, mpi_tmp_path):
    folder = Path(mpi_tmp_path) / "run"
    train(TrainConfig(algorithm="allreduce", lr=1e30, steps=20, out=str(folder), quiet=True), world)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads((folder / "result.json").read_text(), parse_constant=refuse)["test_loss"] is None


@pytest.mark.ranks(3)
@pytest.mark.parametrize("name", BUDGETED)
def test_a_budget_of_gradients_counts_those_of_all_ranks(world, name):
    result = train(TrainConfig(algorithm=name, lr=0.005, gradients=121, quiet=True), world)
    more = world.size if METHODS[name]().is_synchronous else GRADIENTS_MADE_BEFORE_AN_ORDER_IS_HEARD
    assert 121 <= result["gradients"] < 121 + more
    assert sum(result["steps_of_ranks"]) == result["gradients"]


@pytest.mark.ranks(3)
@pytest.mark.parametrize("name", [name for name in one_of_each_family() if name in ASYNCHRONOUS])
def test_a_straggler_does_not_delay_asynchronous_methods(world, name):
    config = TrainConfig(algorithm=name, lr=0.005, gradients=300, straggler=(1, 20.0), quiet=True)
    fast, slow, also_fast = train(config, world)["steps_of_ranks"]
    assert 2 * slow < fast + also_fast  # ranks in lockstep make equally many; a busy machine may stop one of them


@pytest.mark.ranks(3)
@pytest.mark.parametrize("settings", [("allreduce", {}), ("easgd", {"synchronous": "true"})])
def test_a_straggler_delays_a_synchronous_method(world, settings):
    name, hyper_parameters = settings
    config = TrainConfig(algorithm=name, settings=hyper_parameters, gradients=90, straggler=(1, 4.0), quiet=True)
    assert train(config, world)["steps_of_ranks"] == [30, 30, 30]


@pytest.mark.ranks(3)
@pytest.mark.parametrize("name", BUDGETED)
def test_a_budget_of_minutes_ends_all_ranks_together(world, name):
    result = train(TrainConfig(algorithm=name, lr=0.005, minutes=0.005, quiet=True), world)
    assert result["seconds"] >= 0.3  # by how much more is the machine's business; that it ends is the watchdog's
    assert result["complete"]
    assert len(result["steps_of_ranks"]) == world.size  # how many is the machine's business too


@pytest.mark.ranks(2)
def test_metrics_can_be_read_while_the_run_goes_on(world, mpi_tmp_path):
    folder = Path(mpi_tmp_path) / "run"
    seen = []

    def look(n: int) -> None:
        if n == 40:
            time.sleep(0.6)  # two rows are a quarter of a second apart
        if n == 60 and world.rank == world.size - 1:
            until = time.monotonic() + 100
            while not len(rows := read_metrics(folder / "metrics.h5")["progress"]["step"]) and time.monotonic() < until:
                time.sleep(0.05)  # rank 0 writes them, in its own time
            seen.append(rows)

    small_models.on_batch = look
    try:
        train(TrainConfig(model="support.small_models:watched", steps=60, out=str(folder), quiet=True), world)
    finally:
        small_models.on_batch = None
    if world.rank == world.size - 1:
        assert len(seen[0]) > 0
    world.barrier()  # rank 0 has closed the file
    final = read_metrics(folder / "metrics.h5")
    assert final["progress"]["step"].max() == 60
    assert final["evaluation"]["test_accuracy"][-1] > 0
    assert np.nansum(final["staleness"]["histogram"][-1]) > 0
    assert np.nansum(final["staleness"]["distance"][-1]) == np.nansum(final["staleness"]["histogram"][-1])
    workers = final["workers"]
    assert workers["steps"][-1].shape == (world.size,)
    assert np.array_equal(workers["staleness"][-1].sum(0), final["staleness"]["histogram"][-1])
    assert np.array_equal(workers["exchanges"][-1].sum(), np.nanmax(final["progress"]["exchanges"]))
    assert np.all(workers["lock_wait_seconds"][-1] <= workers["waiting_seconds"][-1])


@pytest.mark.ranks(2)
def test_without_checkpoints_there_is_no_folder_for_them(world, mpi_tmp_path):
    folder = Path(mpi_tmp_path) / "run"
    train(TrainConfig(steps=5, checkpoint_every=0, out=str(folder), quiet=True), world)
    world.barrier()
    assert not (folder / "checkpoints").exists()
    assert (folder / "result.json").exists()


@pytest.mark.ranks(3)
@pytest.mark.parametrize("sampling", ["independent", "sharded"])
def test_both_ways_of_sampling_train(world, sampling):
    config = TrainConfig(algorithm="allreduce", sampling=sampling, epochs=3.5, quiet=True)
    result = train(config, world)
    assert result["test_accuracy"] > 0.5
    assert result["steps"] == round(3.5 * (1438 // (32 * world.size)))
