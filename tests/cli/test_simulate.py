"""`mpitrain simulate`: real methods, models and data under a virtual clock."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpitrain.cli.main import main
from mpitrain.cli.simulate import add_arguments, simulate
from mpitrain.errors import UsageError
from mpitrain.records.metrics import read_metrics
from mpitrain.report import load_run, write_report
from mpitrain.simulation.engine import Simulation


def result(*words: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return simulate(parser.parse_args(["--model", "mlp", "--evaluations", "3", *words]))


def test_many_workers_learn_and_the_same_seed_gives_the_same_run() -> None:
    words = ["--workers", "24", "--epochs", "12", "--jitter", "0.3", "--set", "period=4"]
    one, again, other = result(*words), result(*words), result(*words, "--seed", "1")
    assert one == again
    assert one["test_loss"] != other["test_loss"]
    assert one["workers"] == 24
    assert one["test_accuracy"] > 0.8
    assert one["gradients"] == sum(one["steps_of_workers"]) == round(12 * 1438 / 32)
    assert sum(one["staleness"]) > 0
    seconds = [point["seconds"] for point in one["evaluation"]]
    assert seconds == sorted(seconds)
    assert len(seconds) == 4  # the start, two on the way, and the end


def test_torch_computes_with_one_thread_unless_the_environment_says_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    given: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    result("--workers", "2", "--gradients", "4")
    assert given == []
    monkeypatch.delenv("OMP_NUM_THREADS")
    result("--workers", "2", "--gradients", "4")
    assert given == [1]


def test_a_method_that_waits_for_a_straggler_takes_its_time() -> None:
    words = ["--workers", "4", "--gradients", "200", "--straggler", "2:5", "--step-seconds", "0.1"]
    in_lockstep, apart = result("--algorithm", "allreduce", *words), result("--algorithm", "gossip", *words)
    assert in_lockstep["seconds"] == pytest.approx(50 * 0.5, abs=0.51)
    assert apart["seconds"] == pytest.approx(200 / 32 * 1.0, rel=0.1)  # 3 workers make 10 steps a second, one makes 2
    assert max(in_lockstep["steps_of_workers"]) - min(in_lockstep["steps_of_workers"]) <= 1
    assert apart["steps_of_workers"][2] < min(apart["steps_of_workers"][k] for k in (0, 1, 3)) / 4


def test_exchanges_take_latency_and_the_time_of_their_bytes() -> None:
    words = ["--algorithm", "allreduce", "--workers", "2", "--gradients", "20", "--step-seconds", "1"]
    free = result(*words)
    costly = result(*words, "--latency", "0.5", "--bandwidth", "1e6")
    n_bytes = free["bytes_sent"] / 20
    assert free["seconds"] == pytest.approx(10.0)
    assert costly["seconds"] == pytest.approx(10 * (1 + 0.5 + n_bytes / 1e6))
    assert costly["test_loss"] == free["test_loss"]  # nothing else has changed


def test_seconds_are_a_budget() -> None:
    done = result("--workers", "3", "--seconds", "0.5", "--step-seconds", "0.1")
    assert done["steps_of_workers"] == [5, 5, 5]
    assert done["seconds"] == pytest.approx(0.5)


def test_a_dead_worker_is_left_behind_or_ends_the_simulation_with_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--workers", "4", "--seconds", "2", "--step-seconds", "0.1", "--death", "0:0.55", "--death", "2:0.95"]
    for algorithm in ("easgd", "gossip", "adpsgd"):
        done = result("--algorithm", algorithm, *words)
        assert done["died"] == [0, 2]
        assert done["steps_of_workers"] == [7, 20, 11, 20]
        assert done["seconds"] == pytest.approx(2)
        assert done["test_loss"] < done["evaluation"][0]["test_loss"]
    assert main(["simulate", "--algorithm", "allreduce", *words]) == 1
    assert capsys.readouterr().err.count("rank 0 died, and the ranks that wait for it cannot continue") == 1


def test_a_simulated_run_can_be_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    words = ["simulate", "--workers", "4", "--gradients", "60", "--set", "period=2", "--out", str(folder), "--json"]
    assert main(words) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document == json.loads((folder / "result.json").read_text())
    metrics = read_metrics(folder / "metrics.h5")
    assert metrics["evaluation"]["gradients"][-1] == 60
    assert np.all(np.diff(metrics["progress"]["bytes"]) > 0)
    assert metrics["progress"]["elastic_energy"][-1] > 0
    written = write_report([load_run(folder)], folder)
    assert {Path(name).name for name in written["files"]} >= {"curves.png", "staleness.png", "consensus.png"}
    assert main(words) == 2  # it holds a run now
    assert "already holds a run" in capsys.readouterr().err


def test_distance_and_energy_of_the_workers_are_those_of_the_formulas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # distance^2 = mean_i ||x_i - c||^2,  energy = (rho/2)*sum_i ||x_i - c||^2 with rho = moving_rate/eta
    made: list[Simulation] = []
    set_up = Simulation.__post_init__

    def keep(simulation: Simulation) -> None:
        set_up(simulation)
        made.append(simulation)

    monkeypatch.setattr(Simulation, "__post_init__", keep)
    words = ["--workers", "4", "--gradients", "60", "--set", "period=2", "--set", "moving_rate=0.2", "--lr", "0.04"]
    result(*words, "--out", str(tmp_path / "run"))
    (simulation,) = made
    squares = ((simulation.x().astype(np.float64) - simulation.consensus()) ** 2).sum(axis=1)
    progress = read_metrics(tmp_path / "run" / "metrics.h5")["progress"]
    assert progress["consensus_distance"][0] == 0
    assert progress["consensus_distance"][-1] == pytest.approx(np.sqrt(squares.mean()), rel=1e-5)
    assert progress["elastic_energy"][-1] == pytest.approx(0.2 / 0.04 / 2 * squares.sum(), rel=1e-5)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--workers", "0"], "--workers must be more than 0"),
        (["--step-seconds", "0"], "--step-seconds"),
        (["--latency", "-1"], "--latency must be 0 or more"),
        (["--jitter", "nan"], "--jitter"),
        (["--seconds", "inf"], "--seconds"),
        (["--straggler", "16:2"], "must be a worker from 0 to 15"),
        (["--straggler", "1:0.5"], "a factor of 1 or more"),
        (["--join", "16:2"], "must be a worker from 0 to 15"),
        (["--overhead", "1"], "--overhead needs --network loggp"),
        (["--pauses", "1:1"], "--pauses needs --network loggp"),
        (["--network", "loggp", "--uplink", "1e9"], "--uplink needs --rack-nodes"),
        (["--network", "loggp", "--pauses=-1:1"], "two numbers of 0 or more"),
        (["--network", "loggp", "--cores", "0"], "--cores must be more than 0"),
        (["--death", "16:2"], "must be a worker from 0 to 15"),
        (["--death", "1:-1"], "a time of 0 or more"),
        (["--workers", "2", "--death", "0:1", "--death", "1:2"], "must leave a worker alive"),
        (["--algorithm", "nosuch"], "nosuch"),
        (["--set", "period=0"], "period"),
        (["--average", "median"], "average"),
        (["--workers", "9999", "--sampling", "sharded"], "fewer workers"),
    ],
)
def test_wrong_options_are_reported(words: list[str], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        result(*words)
