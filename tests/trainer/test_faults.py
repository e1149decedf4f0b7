"""`--inject`: what a fault is, and that it comes at its rank and step."""

from __future__ import annotations

import errno
import math
import time

import pytest
import torch

from mpitrain.errors import UsageError
from mpitrain.records import durable
from mpitrain.trainer import faults
from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.faults import Fault, Faults, check_ranks


@pytest.fixture
def model():
    model = torch.nn.Linear(2, 1)
    model(torch.ones(1, 2)).sum().backward()
    return model


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("kill:rank=2,step=50", Fault("kill", 2, 50)),
        ("kill:rank=2,step=50,after=0.1", Fault("kill", 2, 50, after=0.1)),
        ("slow:rank=1,factor=4", Fault("slow", 1, factor=4.0)),
        ("nan:rank=3,step=10", Fault("nan", 3, 10)),
        ("hang:rank=1,seconds=30", Fault("hang", 1, 1, seconds=30.0)),
        ("disk-full:step=40", Fault("disk-full", None, 40)),
    ],
)
def test_a_fault_is_what_its_text_says(text, fault):
    assert Fault.parse(text) == fault


@pytest.mark.parametrize(
    "text",
    [
        *("", "explode:rank=1", "kill", "kill:rank=1", "kill:rank=1,step=1,factor=2", "kill:rank=a,step=1"),
        *("kill:rank=-1,step=1", "kill:rank=1,step=0", "slow:rank=1,factor=0.5", "hang:rank=1,seconds=inf"),
    ],
)
def test_another_text_is_refused_before_the_run(text):
    with pytest.raises(UsageError, match="--inject"):
        TrainConfig(inject=(text,))


def test_a_rank_that_is_not_there_is_refused():
    check_ranks(["kill:rank=2,step=1", "disk-full:step=1"], 3)
    with pytest.raises(UsageError, match="names rank 3: there are ranks 0 to 2"):
        check_ranks(["kill:rank=3,step=1"], 3)


def test_only_the_rank_and_the_step_of_a_fault_have_it(model, monkeypatch):
    killed = []
    monkeypatch.setattr(faults, "_kill", lambda: killed.append(True))
    texts = ["kill:rank=1,step=3", "nan:rank=1,step=2"]
    for step in (1, 2, 3, 4):
        Faults(texts, 0).act(step, 0.0, model)
    assert killed == []
    assert torch.isfinite(model.weight.grad).all()
    mine = Faults(texts, 1)
    mine.act(1, 0.0, model)
    assert torch.isfinite(model.weight.grad).all()
    mine.act(2, 0.0, model)
    assert all(math.isnan(x) for x in model.weight.grad.flatten())
    assert killed == []
    mine.act(3, 0.0, model)
    assert killed == [True]
    mine.act(4, 0.0, model)
    assert killed == [True]


def test_a_slow_rank_sleeps_in_proportion_and_a_hanging_one_once(model, monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    both = Faults(["slow:rank=0,factor=4", "hang:rank=0,seconds=30,step=2"], 0)
    both.act(1, 0.5, model)
    both.act(2, 0.25, model)
    both.act(3, 0.0, model)
    assert slept == [1.5, 0.75, 30.0, 0.0]


def test_a_full_disk_has_no_room_for_a_file_and_leaves_the_previous_one(tmp_path, model, monkeypatch):
    monkeypatch.setattr(durable, "injected_errno", 0)
    full = Faults(["disk-full:step=2"], 7)
    full.act(1, 0.0, model)
    durable.replace_file(tmp_path / "file", [b"before"])
    full.act(2, 0.0, model)
    with pytest.raises(OSError) as caught:
        durable.replace_file(tmp_path / "file", [b"after"])
    assert caught.value.errno == errno.ENOSPC
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]


def test_a_resumed_run_does_not_have_the_faults_again(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"config": {"straggler": null, "steps": 9, "inject": ["kill:rank=0,step=5"]}}'
    )
    assert TrainConfig.of_run(tmp_path).inject == ()
    assert TrainConfig.of_run(tmp_path, inject=("nan:rank=0,step=7",)).inject == ("nan:rank=0,step=7",)
