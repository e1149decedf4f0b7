"""Many options at once on several ranks: the run of one process with all samples, and an early end on all ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mpitrain import data, models
from mpitrain.errors import UsageError
from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.loop import train
from mpitrain.trainer.objective import Objective
from mpitrain.trainer.schedules import Cosine, RateCurve
from mpitrain.trainer.study import OneProcess

DATA, MODEL, STEPS = "synthetic:n=128,test=64,shape=6,classes=7,separation=2", "mlp:hidden=8", 9
OPTIONS = {"data": DATA, "model": MODEL, "quiet": True}


def one_process() -> dict[str, float]:
    """AdamW, cosine, warm-up and clipping on batches of 32 samples."""
    dataset = data.load(DATA, world=OneProcess())
    net = models.build(MODEL, shape=dataset.shape, n_classes=7, seed=0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02, betas=(0.9, 0.95), weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, RateCurve(Cosine(final=0.1), 3, STEPS))
    sampler = data.Sampler(128, 32, mode="sharded")
    for _ in range(STEPS):
        x, y = dataset.batch(sampler.draw())
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.3)
        optimizer.step()
        scheduler.step()
    with torch.no_grad():
        ((x, y),) = dataset.test_batches(64)
        outputs = net(x)
    return {
        "test_loss": float(torch.nn.functional.cross_entropy(outputs, y)),
        "test_metric": float((outputs.topk(5).indices == y[:, None]).any(1).float().mean()),
    }


@pytest.mark.ranks(2)
def test_two_unequal_ranks_are_one_process_with_all_samples_and_continue_bit_for_bit(world, mpi_tmp_path):
    options = {
        **OPTIONS,
        "lr": 0.02,
        "optimizer": "adamw",
        "optimizer_settings": {"beta2": "0.95"},
        "weight_decay": 0.1,
        "schedule": "cosine",
        "schedule_settings": {"final": "0.1"},
        "warmup": 3,
        "clip_norm": 0.3,
        "batch_size": 4,
        "batch_sizes": {"1": "12"},
        "accumulate": 2,
        "sampling": "sharded",
        "metric": "top5",
    }
    found = train(TrainConfig("allreduce", **options, steps=STEPS), world)
    for name, value in one_process().items():
        assert found[name] == pytest.approx(value, rel=1e-4), name
    assert found["samples_per_second"] == pytest.approx(STEPS * 32 / found["seconds"])

    folder = Path(mpi_tmp_path) / "run"
    config = TrainConfig("allreduce", **options, steps=STEPS, out=str(folder), checkpoint_every=4)
    train(config, world)
    for checkpoint in sorted((folder / "checkpoints").iterdir())[1:] if world.rank == 0 else ():
        checkpoint.rename(folder / checkpoint.name)  # as if the run had been killed in its last steps
    world.barrier()
    again = train(TrainConfig.of_run(folder), world, resume=folder)
    assert (again["test_loss"], again["steps"]) == (found["test_loss"], STEPS)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", ["allreduce", "easgd"])
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_target_ends_the_run_on_all_ranks(world, name, precision):
    config = TrainConfig(name, **OPTIONS, steps=100_000, evaluate_every=5, target="accuracy=0.4", precision=precision)
    found = train(config, world)
    assert (found["ended_by"], found["complete"]) == ("target", True)
    assert max(found["steps_of_ranks"]) < 100_000
    assert max(point["test_accuracy"] for point in found["evaluation"]) >= 0.4
    assert world.comm.bcast(found["steps_of_ranks"]) == found["steps_of_ranks"]


@pytest.mark.ranks(2)
def test_a_batch_size_is_for_a_rank_that_exists(world):
    with pytest.raises(UsageError, match="--batch-size-of names rank 2: there are ranks 0 to 1"):
        train(TrainConfig("allreduce", **OPTIONS, steps=1, batch_sizes={"2": "4"}), world)


@pytest.mark.ranks(2)
def test_the_metric_of_vectors_that_are_evaluated_later_is_the_same(world):
    options = {**OPTIONS, "steps": 6, "evaluate_every": 2, "metric": "top5"}
    now, later = (train(TrainConfig("allreduce", **options, defer_evaluation=late), world) for late in (False, True))
    names = ("step", "test_loss", "test_accuracy", "test_metric")
    assert [[p[n] for n in names] for p in now["evaluation"]] == [[p[n] for n in names] for p in later["evaluation"]]
    assert Objective(TrainConfig(metric="top5"), data.load(DATA, world=OneProcess())).metric_name == now["metric"]
