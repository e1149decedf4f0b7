"""Ranks that were given different options are refused before anything is loaded, with option, values and ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mpitrain.errors import UsageError
from mpitrain.trainer.agreement import options_in_words
from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.loop import train
from mpitrain.trainer.options import flag_of, options_of

OTHERS = {
    "learning rate": ({"lr": 0.001}, None, "--lr differs between ranks: 0.05 on rank 0, 0.001 on rank 1"),
    "budget": ({"steps": 7}, None, "--epochs differs between ranks: 10.0 on rank 0, not given on rank 1"),
    "setting": (
        {"settings": {"period": "7"}},
        None,
        "--set period differs between ranks: absent on rank 0, 7 on rank 1",
    ),
    "method": ({"algorithm": "allreduce"}, None, "--algorithm differs between ranks: easgd on rank 0, allreduce on"),
    "replicas": ({"replica_size": 2}, None, "--replica-size differs between ranks: 1 on rank 0, 2 on rank 1"),
    "data": ({"data": "nowhere.h5"}, None, "--data differs between ranks: digits on rank 0, nowhere.h5 on rank 1"),
    "resume": ({}, Path("run"), "--resume differs between ranks: not given on rank 0, run on rank 1"),
}


@pytest.mark.ranks(2)
def test_an_option_of_one_rank_only_is_named_on_all_ranks(world, mpi_tmp_path):
    for changes, resume, line in OTHERS.values():
        config = TrainConfig(**{"out": str(mpi_tmp_path / "run"), **(changes if world.rank else {})})
        with pytest.raises(UsageError) as caught:
            train(config, world, resume=resume if world.rank else None)
        assert str(caught.value).startswith(line)
        assert str(caught.value).endswith("; start all ranks with the same")
        assert caught.value.on_all_ranks
    world.barrier()
    assert list(mpi_tmp_path.iterdir()) == []


@pytest.mark.ranks(3)
def test_the_ranks_are_counted_by_value(world):
    with pytest.raises(UsageError, match=r"^--seed differs between ranks: 3 on ranks 0, 2, 4 on rank 1;"):
        train(TrainConfig(seed=4 if world.rank == 1 else 3), world)


ANOTHER = {
    "algorithm": "sgp",
    "settings": {"period": "3"},
    "data": "synthetic",
    "model": "cnn7",
    "model_settings": {"hidden": "5"},
    "epochs": 3.0,
    "steps": 5,
    "gradients": 5,
    "minutes": 1.0,
    "momentum": 0.5,
    "average": "polyak",
    "device": "cuda",
    "transport": "staged",
    "out": "run",
    "sampling": "sharded",
    "evaluate_every": 5,
    "evaluate_seconds": 1.0,
    "checkpoint_every": 5,
    "straggler": (0, 2.0),
    "wire": "bfloat16",
    "clip_norm": 1.0,
    "clip_displacement": 1.0,
    "on_nonfinite": "skip",
    "on_failure": "continue",
    "inject": ("kill:rank=2,step=50",),
    "optimizer": "lion",
    "optimizer_settings": {"nesterov": "true"},
    "schedule": "cosine",
    "schedule_settings": {"final": "0.1"},
    "precision": "bfloat16",
    "batch_sizes": {"1": "16"},
    "loss": "binary",
    "metric": "top5",
    "target": "loss=0.5",
    "patience": 3,
    "init_from": "run",
    "log": ("csv",),
}


@pytest.mark.parametrize("name", options_of(TrainConfig))
def test_every_option_is_compared(name):
    config = TrainConfig()
    value = getattr(config, name)
    other = ANOTHER[name] if name in ANOTHER else not value if isinstance(value, bool) else type(value)(value + 1)
    budget = {"epochs": None} if name in ("steps", "gradients", "minutes") else {}
    budget |= {"data": "own:data"} if name == "workers" else {}  # no other data have workers
    ours, theirs = (options_in_words(c, None) for c in (config, dataclasses.replace(config, **budget, **{name: other})))
    declared = options_of(TrainConfig)[name]
    flag = f"{flag_of(name, declared)}{f' {next(iter(other))}' if isinstance(other, dict) else ''}"
    assert ours.get(flag) != theirs[flag]
