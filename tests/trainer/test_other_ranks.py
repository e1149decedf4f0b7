"""A run is continued on another number of ranks: what the workers share stays, and the totals of the run go on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from mpitrain.collectives.world.launch import create_world
from mpitrain.records import checkpoint
from mpitrain.records.metrics import read_metrics
from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.loop import train
from mpitrain.trainer.run import Hook

TINY = {"data": "synthetic:n=96,shape=64,classes=10", "model": "support.small_models:watched", "batch_size": 8}
CASES = [("easgd", 4, 2), ("allreduce", 4, 2), ("slowmo", 2, 4), ("sgp", 3, 1)]
"""Method and numbers of ranks; ``tests/algorithms/base/test_rescaling.py`` has all methods and pairs."""

CONFIGS = {
    "easgd": TrainConfig("easgd", {"period": "2"}, **TINY),
    "allreduce": TrainConfig("allreduce", **TINY, momentum=0.9),
    "slowmo": TrainConfig("slowmo", {"period": "4"}, **TINY),
    "sgp": TrainConfig("sgp", **TINY),
}
COMMON = {"easgd": ["center"], "slowmo": ["theta", "momentum"]}
"""The entries of worker 0's part that hold for all workers."""

STEPS, LONGER = 6, 9


class Beginning(Hook):
    """Keeps the state of this rank before the first step."""

    def on_start(self, run):
        self.state, self.position, self.gradients = run.optimizer.state_dict(), run.position, run.gradients
        run.world.barrier()  # until then no rank moves a center


@pytest.fixture(scope="module")
def worlds():
    """Worlds of the first 1 to 4 ranks of this launch, by size; None on ranks that are not in them."""
    from mpi4py import MPI

    found = {}
    for size in (1, 2, 3, 4):
        comm = MPI.COMM_WORLD.Split(0 if size > MPI.COMM_WORLD.rank else MPI.UNDEFINED)
        found[size] = None if comm == MPI.COMM_NULL else create_world(comm)
    yield found
    MPI.COMM_WORLD.Barrier()
    for world in found.values():
        if world is not None:
            if world.progress_thread is not None:
                world.progress_thread.stop()
            world.free()


def vector(state, name):
    return np.asarray(state["method"][name])


@pytest.mark.ranks(4)
@pytest.mark.time_limit(240)
@pytest.mark.parametrize(("name", "p", "q"), CASES)
def test_a_run_goes_on_with_what_the_workers_share(world, worlds, mpi_tmp_path, name, p, q):
    folder, hook = Path(mpi_tmp_path) / "run", Beginning()
    config = dataclasses.replace(CONFIGS[name], epochs=None, steps=STEPS, out=str(folder), quiet=True)
    if worlds[p] is not None:
        train(config, worlds[p])
    world.barrier()
    parts = checkpoint.Parts(folder / "checkpoints" / f"step-{STEPS:08d}", p)
    old = [part["optimizer"] for part in parts]
    world.barrier()
    result = None
    if worlds[q] is not None:
        longer = TrainConfig.of_run(folder, steps=LONGER, quiet=True)
        result = train(longer, worlds[q], resume=folder, hooks=[hook])
        states = worlds[q].allgather((hook.state, hook.position, hook.gradients))
        new = [state for state, *_ in states]

        # All begin at one place: the center, or the mean of all.
        parameters = [np.asarray(state["parameters"]) for state in new]
        assert all(np.array_equal(x, parameters[0]) for x in parameters)
        if "center" in COMMON.get(name, []):
            np.testing.assert_array_equal(parameters[0], vector(old[0], "center"))
        else:
            mean = np.mean([np.asarray(state["parameters"], np.float64) for state in old], axis=0)
            np.testing.assert_allclose(parameters[0], mean, rtol=1e-6, atol=1e-8)

        # What is common is the same to the last bit.
        for entry in COMMON.get(name, []):
            np.testing.assert_array_equal(vector(new[0], entry), vector(old[0], entry))
        if name == "allreduce":  # in slices, because the ranks of a node share parameters
            velocities = [np.concatenate([vector(state, "velocity") for state in states]) for states in (old, new)]
            assert np.abs(velocities[0]).max() > 0
            np.testing.assert_array_equal(*velocities)
        if name == "sgp":
            assert sum(float(state["method"]["push_weight"]) for state in new) == q

        # The clocks: position by the budget, gradients in total.
        assert [position for _, position, _ in states] == [STEPS] * q
        assert sum(gradients for *_, gradients in states) == p * STEPS
        assert result["gradients"] == p * STEPS + q * (LONGER - STEPS)
    if world.rank == 0:
        gradients = [point["gradients"] for point in result["evaluation"]]
        assert gradients == sorted(gradients)
        steps = read_metrics(folder / "metrics.h5")["workers"]["steps"]
        assert steps.shape[1] == max(p, q)
        assert np.nansum(steps[-1]) == result["gradients"]
        assert result["ranks"] == q
        assert checkpoint.latest(folder / "checkpoints").name == f"step-{LONGER:08d}"


@pytest.mark.ranks(4)
@pytest.mark.time_limit(240)
def test_epochs_are_passes_of_all_ranks(world, worlds, mpi_tmp_path):
    """96 samples in batches of 8 are 12 gradients an epoch: 2 epochs on 4 ranks, then 2 more on 2 ranks."""
    folder = Path(mpi_tmp_path) / "run"
    train(dataclasses.replace(CONFIGS["allreduce"], epochs=2, out=str(folder), quiet=True), worlds[4])
    world.barrier()
    if worlds[2] is not None:
        result = train(TrainConfig.of_run(folder, epochs=4, quiet=True), worlds[2], resume=folder)
        assert result["gradients"] == 4 * 12
        assert result["evaluation"][-1]["epoch"] == 4
    world.barrier()
