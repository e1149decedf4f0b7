"""Weights & Biases and MLflow: the calls to their interfaces, and (with `--also trackers`) their real files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from mpitrain.loggers.mlflow_run import MLflowLogger
from mpitrain.loggers.wandb_run import WandbLogger

CONFIG = {"config": {"lr": 0.05, "inject": []}, "algorithm": "easgd"}
RESULT = {"complete": True, "test_loss": 0.25, "algorithm": "easgd", "steps": 9, "shares": {"compute": 1.0}}


class Calls:
    """An object whose every method records its name and its arguments in one list."""

    def __init__(self, calls: list[Any], answers: dict[str, Any], name: str = "") -> None:
        self._calls, self._answers, self._name = calls, answers, name

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            self._calls.append((self._name + name, arguments, keywords))
            return self._answers.get(name)

        return call


def use(logger: Any, *rows: tuple[int, dict[str, float]], result: Any = RESULT) -> None:
    logger.begin(CONFIG)
    for step, values in rows:
        logger.log(step, values)
    logger.end(result)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []
    run = Calls(calls, {}, "run.")
    run.id, run.summary = "ab12", Calls(calls, {}, "summary.")  # type: ignore[attr-defined]
    module = ModuleType("wandb")
    module.init = Calls(calls, {"init": run}).init  # type: ignore[attr-defined]
    module.Settings = lambda **keywords: keywords  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return calls


def test_wandb_receives_the_options_the_numbers_and_the_result(wandb: list[Any], tmp_path: Path) -> None:
    use(WandbLogger(tmp_path), (3, {"train/loss": 1.5}))
    names = [name for name, _, _ in wandb]
    assert names == ["init", "run.define_metric", "run.log", "summary.update", "run.finish"]
    init = wandb[0][2]
    assert (init["project"], init["name"], init["dir"]) == ("mpitrain", tmp_path.name, str(tmp_path))
    assert (init["id"], init["resume"]) == (None, "allow")
    assert init["config"] == {"config.lr": 0.05, "config.inject": [], "algorithm": "easgd"}
    assert wandb[2][1] == ({"step": 3, "train/loss": 1.5},)
    assert wandb[3][1] == (
        {"result/complete": True, "result/test_loss": 0.25, "result/algorithm": "easgd", "result/steps": 9},
    )
    assert wandb[4][2] == {"exit_code": 0}


def test_a_resumed_run_continues_the_same_run_of_wandb(wandb: list[Any], tmp_path: Path) -> None:
    use(WandbLogger(tmp_path), result=None)
    assert wandb[-1] == ("run.finish", (), {"exit_code": 1})
    use(WandbLogger(tmp_path))
    assert [call[2]["id"] for call in wandb if call[0] == "init"] == [None, "ab12"]
    assert json.loads((tmp_path / "loggers.json").read_text()) == {"wandb": "ab12"}


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []
    run = SimpleNamespace(info=SimpleNamespace(run_id="cd34"))
    client = Calls(calls, {"create_experiment": "7", "create_run": run})
    entities = ModuleType("mlflow.entities")
    entities.Param = lambda key, value: (key, value)  # type: ignore[attr-defined]
    entities.Metric = lambda name, value, when, step: (name, value, step)  # type: ignore[attr-defined]
    module = ModuleType("mlflow")
    module.entities = entities  # type: ignore[attr-defined]
    module.MlflowClient = lambda **keywords: (calls.append(("client", (), keywords)), client)[1]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_mlflow_receives_the_options_the_numbers_and_the_result(mlflow: list[Any], tmp_path: Path) -> None:
    use(MLflowLogger(tmp_path), (3, {"train/loss": 1.5}))
    batches = [keywords for name, _, keywords in mlflow if name == "log_batch"]
    assert batches[0]["params"] == [("config.lr", "0.05"), ("config.inject", "[]"), ("algorithm", "easgd")]
    assert batches[1]["metrics"] == [("train/loss", 1.5, 3)]
    assert batches[2]["metrics"] == [
        ("result/complete", 1.0, 9),
        ("result/test_loss", 0.25, 9),
        ("result/steps", 9.0, 9),
    ]
    assert mlflow[-1] == ("set_terminated", ("cd34",), {"status": "FINISHED"})


def test_a_resumed_run_continues_the_same_run_of_mlflow(mlflow: list[Any], tmp_path: Path) -> None:
    use(MLflowLogger(tmp_path), result=None)
    assert mlflow[-1] == ("set_terminated", ("cd34",), {"status": "FAILED"})
    use(MLflowLogger(tmp_path))
    assert [name for name, _, _ in mlflow].count("create_run") == 1
    assert ("update_run", ("cd34",), {"status": "RUNNING"}) in mlflow


def test_the_variables_of_the_servers_keep_their_meaning(
    wandb: list[Any], mlflow: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://example.org")
    use(WandbLogger(None))
    use(MLflowLogger(tmp_path))
    assert (wandb[0][2]["project"], wandb[0][2]["dir"]) == ("mine", None)
    assert mlflow[0] == ("client", (), {"tracking_uri": None})  # MLflow reads the variable
    assert mlflow[1] == ("get_experiment_by_name", ("mine",), {})


@pytest.mark.trackers
def test_wandb_writes_an_offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    use(WandbLogger(tmp_path), (3, {"train/loss": 1.5}), (4, {"train/loss": 0.5}))
    [file] = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    content = file.read_bytes()
    assert b"train/loss" in content
    assert b"config.lr" in content
    assert json.loads((tmp_path / "loggers.json").read_text())["wandb"] in file.name


@pytest.mark.trackers
def test_mlflow_stores_a_run_and_continues_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    use(MLflowLogger(tmp_path), (3, {"train/loss": 1.5}), result=None)
    use(MLflowLogger(tmp_path), (4, {"train/loss": 0.5}))
    client = mlflow.MlflowClient((tmp_path / "mlruns").as_uri())
    [run] = client.search_runs([client.get_experiment_by_name("mpitrain").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["config.lr"] == "0.05"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(3, 1.5), (4, 0.5)]
