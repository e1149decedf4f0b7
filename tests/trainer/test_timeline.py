"""The timeline of a run: a valid trace of every rank that shows a straggler, evaluations and checkpoints."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from support import trace_format
from support.slow_model import STEADY_STEP_SECONDS
from torch import nn

from mpitrain import EASGD, AllReduceSGD, DistributedOptimizer, Timeline, UsageError
from mpitrain.collectives.world.phases import recorder
from mpitrain.optimizer import exchange
from mpitrain.records import event_ring
from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.loop import train
from mpitrain.trainer.plan import RunPlan

STEPS = 24
TINY: dict[str, Any] = {
    "data": "synthetic:n=64,shape=6,classes=3",
    "batch_size": 8,
    "quiet": True,
    "timeline": True,
}


def of_rank(spans: dict[tuple[str, str], Any], rank: int, track: str) -> list[tuple[str, float, float]]:
    """Return the spans of a track of a rank."""
    [key] = [key for key in spans if key[0].startswith(f"rank {rank} ") and key[1] == track] or [None]
    return [] if key is None else spans[key]


@pytest.mark.ranks(2, 4)
def test_the_trace_of_a_run_is_valid_and_shows_the_straggler(world: Any, mpi_tmp_path: Path) -> None:
    folder = Path(mpi_tmp_path) / "run"
    config = TrainConfig(
        "easgd",
        **TINY,
        model="support.slow_model:steady_mlp",
        settings={"period": "2"},
        steps=STEPS,
        evaluate_every=8,
        checkpoint_every=8,
        inject=("slow:rank=1,factor=4",),
        out=str(folder),
    )
    found = train(config, world)
    assert not recorder.is_on
    if world.rank == 0:
        trace = trace_format.load(folder / "timeline.json")
        compute = {
            rank: [duration for name, _, duration in of_rank(trace.spans, rank, "compute") if name == "compute"]
            for rank in range(world.size)
        }
        assert all(len(spans) >= STEPS for spans in compute.values())
        medians = {rank: statistics.median(spans) for rank, spans in compute.items()}
        assert medians[1] >= 4e6 * STEADY_STEP_SECONDS
        others = [median for rank, median in medians.items() if rank != 1]
        assert medians[1] > 2 * statistics.median(others)
        for rank in range(world.size):
            updates = [name for name, _, _ in of_rank(trace.spans, rank, "compute") if name == "local update"]
            assert len(updates) == STEPS
            assert len(of_rank(trace.spans, rank, "exchange")) >= STEPS
        evaluations = of_rank(trace.spans, 0, "evaluation")
        assert len(evaluations) == len(found["evaluation"]) - 1  # the first one is before the first step
        assert of_rank(trace.spans, 1, "evaluation") == []
        assert of_rank(trace.spans, 0, "checkpoint")
        assert of_rank(trace.spans, 1, "checkpoint")
        assert trace.document["otherData"]["dropped_events"] == {str(rank): 0 for rank in range(world.size)}
        assert not (folder / ".timeline").exists()
    world.barrier()


def a_step(world: Any) -> DistributedOptimizer:
    """Return an optimizer that has made one step."""
    model = nn.Linear(3, 2).to(world.device)
    optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, EASGD(period=1), world=world)
    step(optimizer, model)
    return optimizer


def step(optimizer: DistributedOptimizer, model: nn.Module) -> None:
    optimizer.zero_grad()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()


@pytest.mark.ranks(1, 2)
def test_a_script_records_its_steps_and_its_evaluation(world: Any, mpi_tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    with (
        DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, AllReduceSGD(), world=world) as optimizer,
        Timeline(Path(mpi_tmp_path) / "mine", world=world) as timeline,
    ):
        with pytest.raises(UsageError, match="being recorded already"):
            Timeline(Path(mpi_tmp_path) / "other", world=world).start()
        for _ in range(3):
            step(optimizer, model)
        with optimizer.consensus():
            model(torch.ones(1, 3))
    if world.rank == 0:
        spans = trace_format.load(timeline.path).spans
        for rank in range(world.size):
            kinds = dict.fromkeys(("compute", "local update", "exchange", "evaluation"), 0)
            for track in ("compute", "exchange", "evaluation"):
                for name, _, _ in of_rank(spans, rank, track):
                    kinds[name] += 1
            assert kinds["local update"] == 3
            assert kinds["evaluation"] == 1
            assert kinds["exchange"] >= 3
            assert kinds["compute"] >= 3
    world.barrier()


@pytest.mark.ranks(1)
def test_the_phases_of_a_step_fill_the_time_between_its_first_and_its_last_event(
    world: Any, mpi_tmp_path: Path
) -> None:
    with Timeline(Path(mpi_tmp_path), world=world) as timeline:
        a_step(world).close()
    spans = trace_format.load(timeline.path).spans
    phases = sorted(
        (ts, duration)
        for track in ("compute", "exchange", "evaluation")
        for _, ts, duration in of_rank(spans, 0, track)
    )
    for (ts, duration), (following, _) in itertools.pairwise(phases):
        assert following == pytest.approx(ts + duration, abs=0.002)


@pytest.mark.ranks(1)
def test_an_error_leaves_a_trace_and_records_no_more(world: Any, mpi_tmp_path: Path) -> None:
    timeline = Timeline(Path(mpi_tmp_path), world=world)

    def fail() -> None:
        with timeline:
            a_step(world).close()
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail()
    assert not recorder.is_on
    assert of_rank(trace_format.load(timeline.path).spans, 0, "exchange")


@pytest.mark.ranks(1)
def test_a_disk_that_fills_up_ends_the_recording_and_not_the_run(
    world: Any, mpi_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(ring: Any, events: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(event_ring.EventRing, "append", no_room)
    folder = Path(mpi_tmp_path) / "run"
    config = TrainConfig("allreduce", **TINY, model="mlp:hidden=8", steps=600, evaluate_every=1000, out=str(folder))
    assert train(config, world)["steps"] == 600  # more events than are buffered


class Counting:
    """A recorder that is off and counts how often a step asks."""

    def __init__(self) -> None:
        self.n = 0

    @property
    def is_on(self) -> bool:
        self.n += 1
        return False


@pytest.mark.ranks(1)
def test_a_step_asks_once_at_each_of_its_phases_while_nothing_is_recorded(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer, counting = a_step(world), Counting()
    monkeypatch.setattr(exchange, "recorder", counting)
    model = optimizer._open_parts.evaluation._model
    step(optimizer, model)
    assert counting.n == 2  # the exchange, and the local update inside it
    optimizer.close()


@pytest.mark.ranks(1)
def test_a_torch_profiler_sees_the_phases_by_name(world: Any) -> None:
    from torch.profiler import ProfilerActivity, profile

    optimizer = a_step(world)
    model = optimizer._open_parts.evaluation._model
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step(optimizer, model)
        with optimizer.consensus():
            pass
    counts = {event.key: event.count for event in profiler.key_averages() if event.key.startswith("mpitrain.")}
    assert counts == {"mpitrain.exchange": 1, "mpitrain.update": 1, "mpitrain.evaluation": 1}
    optimizer.close()


def test_a_timeline_needs_a_folder() -> None:
    with pytest.raises(UsageError, match="--timeline writes to the folder of the run: add --out RUN"):
        RunPlan.of(TrainConfig(timeline=True))
