"""Every option of `mpitrain train` has its effect: a number of the run becomes what the option says it must become."""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import logging
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from support import plain_sgd, small_models, trace_format
from support.plain_sgd import DATA, MODEL, STEPS

from mpitrain import data
from mpitrain.cli import train as command
from mpitrain.cli.main import main
from mpitrain.collectives.world.watchdog import DEFAULT_TIMEOUT_SECONDS
from mpitrain.data import hdf5_format
from mpitrain.errors import UsageError
from mpitrain.log import logger
from mpitrain.records.checkpoint_writer import CheckpointWriter
from mpitrain.trainer import batches, loop
from mpitrain.trainer import budget as budget_module
from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.lion import Lion
from mpitrain.trainer.options import options_of

pytestmark = pytest.mark.ranks(1)

BASE = ["--algorithm", "allreduce", "--data", DATA, "--model", MODEL, "--batch-size", "16"]
MEASURED = ("step", "test_loss", "test_accuracy")
Run = Callable[..., dict[str, Any]]


@dataclass
class Bench:
    """A way to run the command in this process, and a folder."""

    folder: Path
    run: Run
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]


@pytest.fixture
def bench(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Bench:
    def run(*words: str, budget: tuple[str, ...] = ("--steps", str(STEPS)), quiet: bool = True) -> dict[str, Any]:
        capsys.readouterr()
        code = main(["train", *BASE, *budget, *["--quiet"][:quiet], "--json", *words])
        assert code == 0
        document: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return document

    return Bench(tmp_path, run, monkeypatch, capsys)


def close(loss: float) -> Any:
    return pytest.approx(loss, rel=1e-4)


def has_loss_of(*words: str, **expected: Any) -> Callable[[Bench], None]:
    """The result is that of SGD with these options, which differs from that of the defaults."""

    def check(bench: Bench) -> None:
        wanted = plain_sgd.loss_after(**expected)
        assert wanted != close(plain_sgd.loss_after())
        assert bench.run(*words)["test_loss"] == close(wanted)

    return check


def is_handed_over(name: str, text: str, value: Any) -> Callable[[Bench], None]:
    """The value reaches the optimizer, whose own tests check its effect on several ranks."""

    def check(bench: Bench) -> None:
        given: dict[str, Any] = {}

        class Stop(Exception):
            pass

        def note(*arguments: Any, **keywords: Any) -> None:
            given.update(keywords)
            raise Stop

        bench.monkeypatch.setattr(loop, "DistributedOptimizer", note)
        bench.monkeypatch.setattr(loop, "check_replica_size", lambda *_: None)
        bench.monkeypatch.setattr("mpitrain.optimizer.replica_group.check_replica_size", lambda *_: None)
        with pytest.raises(Stop):
            bench.run(f"--{name.replace('_', '-')}", text)
        assert given[name] == value

    return check


def is_given_to_mpi(*words: str, expected: tuple[str, str, float]) -> Callable[[Bench], None]:
    def check(bench: Bench) -> None:
        def init(*arguments: object) -> None:
            assert arguments == expected
            raise UsageError("seen")

        bench.monkeypatch.setattr("mpitrain.collectives.world.launch.init", init)
        assert main(["train", *words]) == 2
        assert "seen" in bench.capsys.readouterr().err

    return check


def algorithm(bench: Bench) -> None:
    assert bench.run("--algorithm", "gossip")["algorithm"] == "gossip"


def settings(bench: Bench) -> None:
    found = bench.run("--algorithm", "easgd", "--set", "period=3", "--set", "moving_rate=0.25")
    assert (found["settings"]["period"], found["settings"]["moving_rate"]) == (3, 0.25)
    assert found["test_loss"] != bench.run("--algorithm", "easgd", "--set", "period=1")["test_loss"]


def dataset(bench: Bench) -> None:
    other = "synthetic:n=96,shape=6,classes=3"
    found = bench.run("--data", other)
    assert found["data"] == other
    assert found["evaluation"][-1]["epoch"] == STEPS / (96 // 16)
    assert found["test_loss"] == close(plain_sgd.loss_after(name=other))


def model(bench: Bench) -> None:
    found = bench.run("--model", "mlp:hidden=5")
    assert found["parameters"] == 6 * 5 + 5 + 5 * 3 + 3
    assert found["test_loss"] == close(plain_sgd.loss_after(model="mlp:hidden=5"))


def epochs(bench: Bench) -> None:
    assert bench.run(budget=("--epochs", "2.5"))["steps"] == 10


def steps(bench: Bench) -> None:
    assert bench.run(budget=("--steps", "5"))["steps"] == 5


def gradients(bench: Bench) -> None:
    assert bench.run(budget=("--gradients", "6"))["gradients"] == 6


def minutes(bench: Bench) -> None:
    assert bench.run(budget=("--minutes", "0.002"))["seconds"] >= 0.12


def out(bench: Bench) -> None:
    found = bench.run("--out", str(bench.folder / "run"))
    assert json.loads((bench.folder / "run" / "result.json").read_text()) == found
    assert {"config.json", "metrics.h5", "checkpoints", "report.md"} <= {
        p.name for p in (bench.folder / "run").iterdir()
    }


def augment(bench: Bench) -> None:
    file = bench.folder / "images.h5"
    draw = np.random.default_rng(0)
    with h5py.File(file, "w") as content:
        hdf5_format.create(content, classes=["a", "b"], shape=(1, 28, 28), n=(32, 8))
        for split in ("train", "test"):
            content[split]["images"][...] = draw.integers(0, 255, content[split]["images"].shape)
            content[split]["labels"][...] = 0
        content.attrs["mean"], content.attrs["std"] = np.full(1, 0.5), np.full(1, 0.2)
    seen = []

    def half(x: Any, rng: Any) -> Any:
        seen.append(x)
        return x / 2

    bench.monkeypatch.setattr(batches.data, "augment", half)
    plain, half_as_bright = bench.run("--data", str(file)), bench.run("--data", str(file), "--augment")
    assert len(seen) == STEPS
    assert half_as_bright["test_loss"] != close(plain["test_loss"])


def evaluate_every(bench: Bench) -> None:
    found = bench.run("--evaluate-every", "3")
    assert [point["step"] for point in found["evaluation"]] == [0, 3, 6, 7]
    for point in found["evaluation"]:
        assert point["test_loss"] == close(plain_sgd.loss_after(steps=point["step"]))
    assert [point["step"] for point in bench.run()["evaluation"]] == [0, 4, 7]


def checkpoint_every(bench: Bench) -> None:
    written: list[tuple[int, int]] = []
    start = CheckpointWriter.start

    def note(writer: CheckpointWriter, number: int, state: dict[str, Any], *others: Any) -> None:
        written.append((number, state["step"]))
        start(writer, number, state, *others)

    bench.monkeypatch.setattr(CheckpointWriter, "start", note)
    bench.monkeypatch.setattr(command, "_write_report", lambda folder: None)  # drawing takes seconds
    for words, expected in ((["--checkpoint-every", "3"], [3, 6, 7]), (["--checkpoint-every", "0"], []), ([], [4, 7])):
        written.clear()
        bench.run("--out", str(bench.folder / "-".join(["run", *words])), *words)
        assert written == [(step, step) for step in expected]


def keep(bench: Bench) -> None:
    bench.monkeypatch.setattr(command, "_write_report", lambda folder: None)  # drawing takes seconds
    for words, expected in (([], 2), (["--keep", "1"], 1), (["--keep", "3"], 3)):
        folder = bench.folder / "-".join(["kept", *words])
        bench.run("--out", str(folder), "--checkpoint-every", "1", *words)
        assert len(list((folder / "checkpoints").iterdir())) == expected


def verify(bench: Bench) -> None:
    seen: list[bool] = []
    load = data.load

    def note(*names: Any, verify: bool, **options: Any) -> Any:
        seen.append(verify)
        return load(*names, verify=verify, **options)

    bench.monkeypatch.setattr(data, "load", note)
    bench.run()
    bench.run("--verify")
    assert seen == [False, True]


def straggler(bench: Bench) -> None:
    slept: list[float] = []
    ticks = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: float(next(ticks)), process_time=lambda: 0.0, sleep=slept.append)
    bench.monkeypatch.setattr(loop, "time", clock)  # a gradient takes a second
    bench.run("--straggler", "0:4")
    assert slept == [3.0] * STEPS


def log(bench: Bench) -> None:
    folder = bench.folder / "run"
    bench.monkeypatch.setattr(command, "_write_report", lambda folder: None)  # drawing takes seconds
    found = bench.run("--out", str(folder), "--log", "csv", "--log", "tensorboard", "--evaluate-every", "4")
    with (folder / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    tests = [(int(row["step"]), float(row["test/loss"])) for row in rows if row["test/loss"]]
    assert tests == [(point["step"], point["test_loss"]) for point in found["evaluation"]]
    last = next(row for row in reversed(rows) if row["train/loss"])
    assert float(last["train/loss"]) == found["train_loss"]
    assert (float(last["train/gradients"]), float(last["train/learning_rate"])) == (STEPS, 0.05)
    assert list((folder / "tensorboard").iterdir())
    assert not (folder / "mlruns").exists()


def timeline(bench: Bench) -> None:
    bench.monkeypatch.setattr(command, "_write_report", lambda folder: None)  # drawing takes seconds
    for words in ([], ["--timeline"]):
        folder = bench.folder / "-".join(["run", *words])
        bench.run("--out", str(folder), *words)
        assert (folder / "timeline.json").exists() is bool(words)
    tracks = {track for _, track in trace_format.load(folder / "timeline.json").spans}
    assert {"compute", "exchange", "evaluation", "checkpoint"} <= tracks


def quiet(bench: Bench) -> None:
    for is_quiet in (True, False):
        main(["train", *BASE, "--steps", "4", *["--quiet"][:is_quiet]])
        assert ("test accuracy" in bench.capsys.readouterr().err) is not is_quiet


def verbose(bench: Bench) -> None:
    """Every evaluation has a line, and so has every decision."""
    level = logger.level
    words = ["--evaluate-every", "1", "--steps", "9"]
    try:
        for is_verbose in (True, False):
            logger.setLevel(level)
            assert main(["train", *BASE, *words, *["--verbose"][:is_verbose]]) == 0
            lines = bench.capsys.readouterr().err.splitlines()
            assert sum(line.startswith("mlp:hidden=8: 83 parameters; allreduce on 1 rank, sgd") for line in lines) == 1
            assert any(line.startswith("optimizer: sgd (lr=0.05, momentum=0.9") for line in lines) is is_verbose
            epochs = [line for line in lines if line.startswith("epoch ")]
            assert epochs
            assert len(epochs) == 9 or not is_verbose
            assert all("train loss" in line and "test accuracy" in line and "lr 0.05" in line for line in epochs)
            assert all(("samples/s" in line) is is_verbose for line in epochs)
            assert logger.isEnabledFor(logging.DEBUG) is is_verbose
    finally:
        logger.setLevel(level)


def init_from(bench: Bench) -> None:
    """A run that does not move has the model of another: of its folder, and of the files that it has written."""
    bench.monkeypatch.setattr(command, "_write_report", lambda folder: None)  # drawing takes seconds
    folder = bench.folder / "run"
    first = bench.run("--out", str(folder))
    for source in (folder, folder / "model.safetensors", folder / "best-model.safetensors"):
        found = bench.run("--init-from", str(source), "--lr", "0", budget=("--steps", "1"))
        assert found["test_loss"] == close(first["test_loss"]), source


def evaluate_seconds(bench: Bench) -> None:
    assert timed(bench, evaluate_seconds=1e-9) == list(range(STEPS + 1))
    assert timed(bench, evaluate_seconds=1e9) == [0, STEPS]


def timed(bench: Bench, **changes: Any) -> list[int]:
    configuration = command.configuration

    def changed(args: argparse.Namespace) -> TrainConfig:
        return replace(configuration(args), **changes)

    bench.monkeypatch.setattr(command, "configuration", changed)
    found = [point["step"] for point in bench.run()["evaluation"]]
    bench.monkeypatch.setattr(command, "configuration", configuration)
    return found


def defer_evaluation(bench: Bench) -> None:
    """The vectors are those of their steps, though they are evaluated at the end."""
    configuration, during = command.configuration, []
    evaluate = loop.Evaluator.evaluate

    def note(self: Any, vector: np.ndarray) -> tuple[float, float]:
        during.append(vector.copy())
        return evaluate(self, vector)

    bench.monkeypatch.setattr(loop.Evaluator, "evaluate", note)
    plain = bench.run("--evaluate-every", "2")
    bench.monkeypatch.setattr(
        command, "configuration", lambda args: replace(configuration(args), defer_evaluation=True)
    )
    deferred = bench.run("--evaluate-every", "2")
    names = ("step", "test_loss", "test_accuracy")
    assert [[p[n] for n in names] for p in deferred["evaluation"]] == [
        [p[n] for n in names] for p in plain["evaluation"]
    ]
    assert len(during) == 2 * len(plain["evaluation"])


def on_nonfinite(bench: Bench) -> None:
    words = [*BASE, "--lr", "1e30", "--quiet", "--steps"]
    assert main(["train", *words, "30"]) == 5
    told = [line for line in bench.capsys.readouterr().err.splitlines() if line.startswith("mpitrain: error")]
    assert len(told) == 1
    assert "the loss has not been finite for 20 steps" in told[0]
    assert main(["train", *words, "30", "--on-nonfinite", "skip"]) == 0
    assert main(["train", *words, "10"]) == 0  # fewer losses than it takes


def clip_displacement(bench: Bench) -> None:
    """The center moves by no more than the bound in each exchange: by less than without it."""
    words = ["--algorithm", "easgd", "--set", "period=1"]
    free, bounded = bench.run(*words), bench.run(*words, "--clip-displacement", "1e-3")
    assert bounded["settings"]["clip_displacement"] == 1e-3
    assert (free["n_clipped"], bounded["n_clipped"] > 0) == (0, True)
    assert bounded["test_loss"] > free["test_loss"]


def inject(bench: Bench) -> None:
    assert bench.run()["n_nonfinite"] == 0
    assert bench.run("--inject", "nan:rank=0,step=3")["n_nonfinite"] > 0


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, momentum=0.9)


def runs_as(*words: str, loop: Callable[..., Any], **expected: Any) -> Callable[[Bench], None]:
    """The result is that of a torch optimizer in a plain loop, and that of the run in two parts, bit for bit."""

    def check(bench: Bench) -> None:
        found = bench.run(*words)
        assert found["test_loss"] == close(plain_sgd.loss_of_loop(loop, **expected))
        assert found["test_loss"] != close(plain_sgd.loss_after())
        bench.monkeypatch.setattr(command, "_write_report", lambda folder: None)  # drawing takes seconds
        folder = str(bench.folder / "run")
        whole = ["--steps", str(STEPS)]
        bench.monkeypatch.setattr(budget_module.Budget, "is_over", lambda budget, step: step >= STEPS - 3)
        bench.run(*words, "--out", folder)
        bench.monkeypatch.undo()
        main(["train", "--resume", folder, *whole, "--quiet", "--json"])
        resumed = json.loads(bench.capsys.readouterr().out.splitlines()[-1])
        assert (resumed["steps"], resumed["test_loss"]) == (STEPS, found["test_loss"])

    return check


def smoothed(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """A loss of the user's own."""
    return torch.nn.functional.cross_entropy(outputs, targets, label_smoothing=0.3)


def batch_sizes(bench: Bench) -> None:
    expected = plain_sgd.loss_after(batch_size=8)
    found = bench.run("--batch-size-of", "0=8")
    assert found["test_loss"] == close(expected)
    assert found["samples_per_second"] == pytest.approx(STEPS * 8 / found["seconds"])


def metric(bench: Bench) -> None:
    found = bench.run("--metric", "perplexity")
    assert found["metric"] == "perplexity"
    assert found["test_metric"] == pytest.approx(np.exp(found["test_loss"]))
    assert [point["test_metric"] for point in found["evaluation"]][-1] == found["test_metric"]
    plain = bench.run()
    assert (plain["metric"], plain["test_metric"]) == ("accuracy", plain["test_accuracy"])


def target(bench: Bench) -> None:
    every = [point["test_loss"] for point in bench.run("--evaluate-every", "1")["evaluation"]]
    assert every[0] > every[3] > every[-1]
    found = bench.run("--evaluate-every", "1", "--target", f"loss={every[3]}", budget=("--steps", "90"))
    assert (found["ended_by"], found["complete"], found["evaluation"][3]["test_loss"]) == ("target", True, every[3])
    assert 3 <= found["steps"] <= 13  # ranks in lockstep agree at least every ten steps
    assert bench.run("--target", "loss=0.0001")["ended_by"] == "budget"


def patience(bench: Bench) -> None:
    """Nothing changes at learning rate 0: the first evaluation is the best."""
    found = bench.run("--evaluate-every", "1", "--patience", "2", "--lr", "0", budget=("--steps", "90"))
    assert (found["ended_by"], found["complete"]) == ("patience", True)
    assert 2 <= found["steps"] <= 12  # ranks in lockstep agree at least every ten steps
    assert bench.run("--evaluate-every", "1", "--patience", "2")["ended_by"] == "budget"


def workers(bench: Bench) -> None:
    made: list[int] = []

    class Recorded(batches.WorkerProcesses):
        def __init__(self, dataset: Any, indices_of: Any, n_workers: int, *, seed: int) -> None:
            made.append(n_workers)
            self._dataset, self._indices_of = dataset, indices_of

        def batch(self, step: int) -> Any:
            return self._dataset.batch(self._indices_of(step))

        def close(self) -> None:
            """End nothing."""

    bench.monkeypatch.setattr(batches, "WorkerProcesses", Recorded)
    own = ["--data", "support.own_data:synthetic"]
    assert bench.run(*own, "--workers", "3")["test_loss"] == bench.run(*own)["test_loss"]
    assert made == [3]


CASES: dict[str, Callable[[Bench], None]] = {
    "algorithm": algorithm,
    "settings": settings,
    "data": dataset,
    "model": model,
    "epochs": epochs,
    "steps": steps,
    "gradients": gradients,
    "minutes": minutes,
    "batch_size": has_loss_of("--batch-size", "8", batch_size=8),
    "lr": has_loss_of("--lr", "0.2", lr=0.2),
    "momentum": has_loss_of("--momentum", "0.5", momentum=0.5),
    "weight_decay": has_loss_of("--weight-decay", "0.3", weight_decay=0.3),
    "clip_norm": has_loss_of("--clip-norm", "0.5", clip_norm=0.5),
    "clip_displacement": clip_displacement,
    "on_nonfinite": on_nonfinite,
    "inject": inject,
    "average": has_loss_of("--average", "moving:0.3", average=0.3),
    "optimizer": runs_as("--optimizer", "adamw", loop=lambda p: torch.optim.AdamW(p, weight_decay=0)),
    "optimizer_settings": runs_as(
        *("--optimizer", "lion", "--optimizer-set", "beta1=0.6", "--optimizer-set", "beta2=0.7"),
        *("--weight-decay", "0.1"),
        loop=lambda p: Lion(p, betas=(0.6, 0.7), weight_decay=0.1),
    ),
    "schedule": runs_as("--schedule", "linear", loop=sgd, rate=lambda t: 1 - t / STEPS),
    "schedule_settings": runs_as(
        "--schedule", "step", "--schedule-set", "step_size=2", loop=sgd, rate=lambda t: 0.1 ** (t // 2)
    ),
    "warmup": runs_as("--warmup", "5", loop=sgd, rate=lambda t: min((t + 1) / 5, 1)),
    "precision": runs_as("--precision", "bfloat16", loop=sgd, precision=torch.bfloat16),
    "accumulate": has_loss_of("--accumulate", "2", batch_size=32),
    "batch_sizes": batch_sizes,
    "loss": runs_as("--loss", "cli.test_train_options:smoothed", loop=sgd, loss=smoothed),
    "metric": metric,
    "target": target,
    "patience": patience,
    "seed": has_loss_of("--seed", "5", seed=5),
    "device": is_given_to_mpi("--device", "cuda", expected=("cuda", "auto", DEFAULT_TIMEOUT_SECONDS)),
    "transport": is_given_to_mpi("--transport", "staged", expected=("cpu", "staged", DEFAULT_TIMEOUT_SECONDS)),
    "timeout": is_given_to_mpi("--timeout", "7", expected=("cpu", "auto", 7.0)),
    "out": out,
    "model_settings": has_loss_of("--model", "mlp", "--model-set", "hidden=5", model="mlp:hidden=5"),
    "workers": workers,
    "sampling": has_loss_of("--sampling", "sharded", sampling="sharded"),
    "augment": augment,
    "evaluate_every": evaluate_every,
    "evaluate_seconds": evaluate_seconds,
    "defer_evaluation": defer_evaluation,
    "checkpoint_every": checkpoint_every,
    "keep": keep,
    "verify": verify,
    "straggler": straggler,
    "replica_size": is_handed_over("replica_size", "2", 2),
    "on_failure": is_handed_over("on_failure", "continue", "continue"),
    "wire": is_handed_over("wire", "int8", "int8"),
    "log": log,
    "timeline": timeline,
    "quiet": quiet,
    "init_from": init_from,
    "verbose": verbose,
}


@pytest.mark.parametrize("name", options_of(TrainConfig))
def test_an_option_has_its_effect(bench: Bench, name: str) -> None:
    CASES[name](bench)


def test_a_run_without_options_is_sgd_with_the_defaults(bench: Bench) -> None:
    assert bench.run()["test_loss"] == close(plain_sgd.loss_after())
    assert bench.run("--average", "polyak")["test_loss"] == close(plain_sgd.loss_after(averaged=True))


def test_the_last_batch_of_the_test_set_counts_by_its_size(bench: Bench) -> None:
    """Several batches, of which the last is smaller: the mean is over samples."""
    from mpitrain.trainer import evaluation

    whole = bench.run()
    bench.monkeypatch.setattr(evaluation, "BATCH", 5)
    found = bench.run()
    assert plain_sgd.load().n_test % 5
    assert found["test_loss"] == close(whole["test_loss"])
    assert found["test_accuracy"] == whole["test_accuracy"]


def test_a_run_that_usr1_stops_is_saved_and_exits_with_3(bench: Bench) -> None:
    """A run that is resumed to its end exits with 0."""
    run, words = str(bench.folder / "run"), ["--model", "support.small_models:watched", "--quiet", "--json"]
    bench.monkeypatch.setattr(command, "_write_report", lambda folder: None)
    bench.monkeypatch.setattr(
        small_models, "on_batch", lambda n: os.kill(os.getpid(), signal.SIGUSR1) if n == 5 else None
    )
    data = ["--data", "synthetic:n=64,shape=64,classes=10", "--batch-size", "8"]
    assert main(["train", *words, *data, "--minutes", "10", "--out", run]) == 3
    out, err = bench.capsys.readouterr()
    stopped = json.loads(out.splitlines()[-1])
    assert (stopped["complete"], stopped["steps"]) == (False, 5)
    assert f"stopped at step 5; continue on 1 rank with: mpitrain train --resume {run}" in err
    assert not (bench.folder / "run" / "result.json").exists()
    bench.monkeypatch.setattr(small_models, "on_batch", None)
    assert main(["train", "--resume", run, "--steps", "9", "--quiet", "--json"]) == 0
    resumed = json.loads(bench.capsys.readouterr().out.splitlines()[-1])
    assert (resumed["complete"], resumed["steps"]) == (True, 9)
