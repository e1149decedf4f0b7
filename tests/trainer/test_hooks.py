"""A hook sees every event of a run in order, and can end the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.loop import train
from mpitrain.trainer.run import Hook

TINY = {"data": "synthetic:n=64,shape=6,classes=3", "model": "mlp:hidden=8", "batch_size": 8, "quiet": True}


class Diary(Hook):
    """The names of the events, with the step at which they came."""

    def __init__(self):
        self.events, self.totals, self.points, self.paths = [], [], [], []

    def on_start(self, run):
        self.events.append(("start", run.step))

    def on_step(self, run):
        self.events.append(("step", run.step))

    def on_totals(self, run, totals, *, in_full):
        if in_full:
            self.totals.append((run.step, totals.gradients))

    def on_evaluation(self, run, point):
        self.events.append(("evaluation", run.step))
        self.points.append(point)

    def on_checkpoint(self, run, path):
        self.events.append(("checkpoint", run.step))
        self.paths.append(path)

    def on_last_step(self, run):
        self.events.append(("last step", run.step))

    def on_end(self, run):
        assert run.is_complete
        self.events.append(("end", run.step))

    def close(self):
        self.events.append(("close", None))


@pytest.mark.ranks(1, 2)
def test_the_events_of_a_run_come_in_order(world, mpi_tmp_path):
    diary = Diary()
    config = TrainConfig(
        "allreduce", **TINY, steps=4, evaluate_every=2, checkpoint_every=3, out=str(Path(mpi_tmp_path) / "run")
    )
    result = train(config, world, hooks=[diary])
    expected = [
        *(("evaluation", 0), ("start", 0), ("step", 1), ("evaluation", 2), ("step", 2), ("step", 3)),
        *(("step", 4), ("last step", 4), ("evaluation", 4), ("end", 4)),
        *(("checkpoint", 4), ("checkpoint", 4), ("close", None)),  # each was written while the run went on
    ]
    evaluated = world.rank == 0
    assert diary.events == [event for event in expected if evaluated or event[0] != "evaluation"]
    assert [vars(point) for point in diary.points] == (result["evaluation"] if evaluated else [])
    assert [path.name for path in diary.paths] == ["step-00000003", "step-00000004"]
    if evaluated:
        assert diary.totals[0] == (0, 0)
        assert diary.totals[-1] == (4, 4 * world.size)


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("name", ["allreduce", "easgd"])
@pytest.mark.parametrize(
    "budget", [{"steps": 200}, {"gradients": 10_000}, {"minutes": 5.0}], ids=lambda b: next(iter(b))
)
def test_a_hook_stops_a_run_early_and_the_run_is_complete(world, name, budget):
    class StopEarly(Hook):
        def on_step(self, run):
            if run.step == 10 and run.is_leader:
                run.request_stop()

    result = train(TrainConfig(name, **TINY, **budget), world, hooks=[StopEarly()])
    assert result["complete"]
    assert result["evaluation"][-1]["step"] == result["steps"]
    assert 10 <= result["steps"] < 200
    assert result["test_loss"] == result["evaluation"][-1]["test_loss"]


@pytest.mark.ranks(1)
def test_hooks_are_closed_after_an_error(world):
    class Fail(Hook):
        def on_step(self, run):
            raise ArithmeticError

    diary = Diary()
    with pytest.raises(ArithmeticError):
        train(TrainConfig("allreduce", **TINY, steps=3), world, hooks=[diary, Fail()])
    assert diary.events[-1] == ("close", None)
