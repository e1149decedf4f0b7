"""Every option of `mpitrain simulate` has its effect: a number of the run becomes what the option says."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import plain_sgd
from support.plain_sgd import DATA, MODEL, STEPS

from mpitrain.cli.main import main
from mpitrain.records.metrics import MetricsWriter
from mpitrain.trainer import study
from mpitrain.trainer.cluster_config import ClusterConfig
from mpitrain.trainer.metrics import tables
from mpitrain.trainer.options import options_of
from mpitrain.trainer.study_config import SHARED, StudyConfig

BASE = ["--algorithm", "allreduce", "--data", DATA, "--model", MODEL, "--batch-size", "16", "--workers", "1"]
TWO = ["--workers", "2"]
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*words: str, budget: tuple[str, ...] = ("--gradients", str(STEPS))) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["simulate", *BASE, *budget, "--json", *words]) == 0
        document: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return document

    return run


def close(value: float) -> Any:
    return pytest.approx(value, rel=1e-4)


def has_loss_of(*words: str, **expected: Any) -> Callable[..., None]:
    """The result is that of SGD with these options, which differs from that of the defaults."""

    def check(run: Run, **_: Any) -> None:
        wanted = plain_sgd.loss_after(**expected)
        assert wanted != close(plain_sgd.loss_after())
        assert run(*words)["test_loss"] == close(wanted)

    return check


def algorithm(run: Run, **_: Any) -> None:
    assert run("--algorithm", "gossip")["algorithm"] == "gossip"


def settings(run: Run, **_: Any) -> None:
    few, many = (run("--algorithm", "easgd", "--set", f"period={period}", *TWO) for period in (3, 1))
    assert few["settings"]["period"] == 3
    assert few["exchanges"] < many["exchanges"]


def dataset(run: Run, **_: Any) -> None:
    other = "synthetic:n=96,shape=6,classes=3"
    found = run("--data", other)
    assert found["evaluation"][-1]["epoch"] == STEPS * 16 / 96
    assert found["test_loss"] == close(plain_sgd.loss_after(name=other))


def epochs(run: Run, **_: Any) -> None:
    assert run(budget=("--epochs", "2.5"))["gradients"] == round(2.5 * 64 / 16)


def gradients(run: Run, **_: Any) -> None:
    assert run(budget=("--gradients", "5"))["gradients"] == 5


def seconds(run: Run, **_: Any) -> None:
    assert run("--step-seconds", "0.5", budget=("--seconds", "3"))["gradients"] == 6


def out(run: Run, tmp_path: Path, **_: Any) -> None:
    found = run("--out", str(tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == found
    stored = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert (stored["gradients"], stored["epochs"], stored["batch_size"]) == (STEPS, None, 16)


def workers(run: Run, **_: Any) -> None:
    found = run("--workers", "3", budget=("--gradients", "9"))
    assert (found["workers"], found["steps_of_workers"]) == (3, [3, 3, 3])


def workers_per_node(run: Run, monkeypatch: pytest.MonkeyPatch, **_: Any) -> None:
    worlds = []

    class Noted(study.SimulatedWorld):
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            super().__init__(*arguments, **keywords)
            worlds.append(self)

    monkeypatch.setattr(study, "SimulatedWorld", Noted)
    run("--workers", "5", "--workers-per-node", "2")
    run("--workers", "5")
    assert [list(world.communicators[0].nodes) for world in worlds] == [[0, 0, 1, 1, 2], [0] * 5]


def calibrate(run: Run, tmp_path: Path, **_: Any) -> None:
    document = {
        "algorithm": "allreduce",
        "settings": {"overlap": False},
        "seconds": 50.0,
        "parameters": 10,
        "steps_of_ranks": [100],
        "shares": {"compute": 0.5, "exchange": 0.0},
        "of_ranks": {name: [0] for name in ("bytes", "wire_bytes", "exchange_cpu", "serving_cpu", "gradient_cpu")}
        | {"exchanges": [100]},
        "world": {"ranks_of_node": [1]},
    }
    (tmp_path / "result.json").write_text(json.dumps(document))
    with MetricsWriter(tmp_path / "metrics.h5", tables(1, ())) as metrics:
        metrics.append("progress", exchanges=100)
        metrics.append("staleness", histogram=np.zeros(33))
    assert run("--calibrate", str(tmp_path), "--cores", "1")["seconds"] == close(STEPS * 50.0 / 100 * 0.5)


def step_seconds(run: Run, **_: Any) -> None:
    assert run("--step-seconds", "0.5")["seconds"] == close(STEPS * 0.5)
    assert run()["seconds"] == close(STEPS * 0.01)


def jitter(run: Run, **_: Any) -> None:
    """A step takes exp(J*N(0, 1) - J^2/2) times as long."""
    numbers = np.random.default_rng(3).standard_normal(STEPS)
    expected = 0.5 * np.exp(0.4 * numbers - 0.4**2 / 2).sum()
    assert run("--step-seconds", "0.5", "--jitter", "0.4", "--seed", "3")["seconds"] == close(expected)


def latency(run: Run, **_: Any) -> None:
    assert run(*TWO, "--latency", "0.25", budget=("--gradients", "6"))["seconds"] == close(3 * (0.01 + 0.25))


def bandwidth(run: Run, **_: Any) -> None:
    found = run(*TWO, "--bandwidth", "1000", budget=("--gradients", "6"))
    assert found["seconds"] == close(3 * (0.01 + found["bytes_sent"] / 6 / 1000))


def straggler(run: Run, **_: Any) -> None:
    assert run("--straggler", "0:4")["seconds"] == close(STEPS * 4 * 0.01)
    words = ("--algorithm", "gossip", *TWO, "--step-seconds", "0.125", "--straggler", "1:4", "--straggler", "0:2")
    assert run(*words, budget=("--seconds", "1"))["steps_of_workers"] == [4, 2]


def death(run: Run, **_: Any) -> None:
    words = ("--algorithm", "gossip", "--workers", "3", "--step-seconds", "0.1", "--death", "1:0.25")
    found = run(*words, budget=("--seconds", "0.6"))
    assert (found["died"], found["steps_of_workers"]) == ([1], [6, math.ceil(0.25 / 0.1) + 1, 6])


def join(run: Run, **_: Any) -> None:
    words = ("--algorithm", "gossip", *TWO, "--step-seconds", "0.125", "--join", "1:0.5")
    assert run(*words, budget=("--seconds", "1"))["steps_of_workers"] == [8, 4]


LOGGP = ("--network", "loggp", *TWO)
APART = ("--workers-per-node", "1")


def seconds_of_three_steps(run: Run, *words: str) -> float:
    return float(run(*words, budget=("--gradients", "6"))["seconds"])


def network(run: Run, **_: Any) -> None:
    words = (*APART, "--latency", "0.25", "--workers", "4")
    for kind, messages in (("private", 1), ("loggp", 2)):  # recursive doubling among 4 nodes
        found = run("--network", kind, *words, budget=("--gradients", "12"))
        assert found["seconds"] == close(3 * (0.01 + messages * 0.25))


def takes(*words: str, more: Callable[[float], float]) -> Callable[..., None]:
    """A step takes longer than a gradient by ``more(size of the vector in bytes)``."""

    def check(run: Run, **_: Any) -> None:
        n_bytes = run(*LOGGP, budget=("--gradients", "6"))["bytes_sent"] / 6
        assert seconds_of_three_steps(run, *LOGGP, *words) == close(3 * (0.01 + more(n_bytes)))

    return check


def serving(*words: str, seconds: Callable[[float], float]) -> Callable[..., None]:
    """The home of a shard needs at least that long for one of two workers, given the size of the vector in bytes."""

    def check(run: Run, **_: Any) -> None:
        words_of_both = (*LOGGP, *APART, "--algorithm", "downpour")
        free = run(*words_of_both, budget=("--gradients", "6"))
        slow = seconds_of_three_steps(run, *words_of_both, *words)
        assert slow - free["seconds"] >= seconds(free["bytes_sent"] / 6 / 2)

    return check


def time_slice(run: Run, **_: Any) -> None:
    words = (*LOGGP, "--algorithm", "gossip", "--cores", "1")
    for seconds, steps in (("0.001", [3, 3]), ("1", [6, 0])):
        assert run(*words, "--time-slice", seconds, budget=("--gradients", "6"))["steps_of_workers"] == steps


def sharing(run: Run, **_: Any) -> None:
    words = (*LOGGP, "--cores", "1", "--time-slice", "1", "--sharing", "0.5")  # two workers
    assert seconds_of_three_steps(run, *words) == close(3 * (0.015 + 0.015))


def pauses(run: Run, **_: Any) -> None:
    found = run("--network", "loggp", "--pauses", "1e6:1e-3")
    assert found["seconds"] == pytest.approx(STEPS * 0.01 * (1 + 1e6 * 1e-3), rel=0.03)


def evaluations(run: Run, **_: Any) -> None:
    found = run("--evaluations", "4", budget=("--gradients", "8"))
    assert [point["gradients"] for point in found["evaluation"]] == [0, 2, 4, 6, 8]
    for point in found["evaluation"]:
        assert point["test_loss"] == close(plain_sgd.loss_after(steps=point["gradients"]))


def clip_displacement(run: Run, **_: Any) -> None:
    words = ["--algorithm", "easgd", "--set", "period=1"]
    assert run(*words, "--clip-displacement", "1e-3")["test_loss"] > run(*words)["test_loss"]


CASES: dict[str, Callable[..., None]] = {
    "algorithm": algorithm,
    "settings": settings,
    "data": dataset,
    "model": has_loss_of("--model", "mlp:hidden=5", model="mlp:hidden=5"),
    "model_settings": has_loss_of("--model", "mlp", "--model-set", "hidden=5", model="mlp:hidden=5"),
    "batch_size": has_loss_of("--batch-size", "8", batch_size=8),
    "lr": has_loss_of("--lr", "0.2", lr=0.2),
    "clip_displacement": clip_displacement,
    "momentum": has_loss_of("--momentum", "0.5", momentum=0.5),
    "weight_decay": has_loss_of("--weight-decay", "0.3", weight_decay=0.3),
    "average": has_loss_of("--average", "moving:0.3", average=0.3),
    "sampling": has_loss_of("--sampling", "sharded", sampling="sharded"),
    "seed": has_loss_of("--seed", "5", seed=5),
    "out": out,
    "epochs": epochs,
    "gradients": gradients,
    "seconds": seconds,
    "workers": workers,
    "workers_per_node": workers_per_node,
    "calibrate": calibrate,
    "step_seconds": step_seconds,
    "jitter": jitter,
    "latency": latency,
    "bandwidth": bandwidth,
    "straggler": straggler,
    "death": death,
    "join": join,
    "evaluations": evaluations,
    "network": network,
    "overhead": takes(*APART, "--overhead", "0.125", more=lambda n_bytes: 2 * 0.125),
    "gap": takes(*APART, "--gap", "0.125", more=lambda n_bytes: 0.125),
    "node_latency": takes("--node-latency", "0.125", more=lambda n_bytes: 0.125),
    "node_bandwidth": takes("--node-bandwidth", "1000", more=lambda n_bytes: n_bytes / 1000),
    "rack_nodes": takes(*APART, "--rack-nodes", "2", "--uplink", "1000", more=lambda n_bytes: 0),
    "uplink": takes(*APART, "--rack-nodes", "1", "--uplink", "1000", more=lambda n_bytes: n_bytes / 1000),
    "service": serving("--service", "0.25", seconds=lambda n_bytes: 3 * 0.25),
    "service_bandwidth": serving("--service-bandwidth", "1000", seconds=lambda n_bytes: 3 * n_bytes / 1000),
    "cores": takes("--cores", "1", "--time-slice", "1", more=lambda n_bytes: 0.01),
    "time_slice": time_slice,
    "wake_up": takes("--cores", "1", "--time-slice", "1", "--wake-up", "0.125", more=lambda n_bytes: 0.01 + 0.125),
    "sharing": sharing,
    "pauses": pauses,
}


@pytest.mark.parametrize("name", [*SHARED, *options_of(StudyConfig), *options_of(ClusterConfig)])
def test_an_option_has_its_effect(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    CASES[name](run, tmp_path=tmp_path, monkeypatch=monkeypatch)


def test_a_simulation_of_one_worker_is_sgd_with_the_defaults_of_a_run(run: Run) -> None:
    assert run()["test_loss"] == close(plain_sgd.loss_after())


def test_the_end_of_a_simulation_includes_updates_that_are_not_exchanged_yet(run: Run) -> None:
    """One Downpour worker that never pushes on the way: its last push makes the center its own parameters."""
    words = ("--algorithm", "downpour", "--set", "period=100", "--momentum", "0", "--lr", "0.05")
    start, *_, end = run(*words)["evaluation"]
    assert start["test_loss"] == close(plain_sgd.loss_after(steps=0))
    assert end["test_loss"] == close(plain_sgd.loss_after(momentum=0.0))
