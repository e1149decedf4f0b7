"""The example with a GPT: its jobs are valid and alike, and its plain model is ours."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from mpitrain import models
from mpitrain.trainer import config_file
from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.plan import RunPlan

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "gpt"
SIZES = {"layers": "2", "heads": "4", "width": "8"}


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", FOLDER / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_jobs_differ_in_the_method_only():
    plans = {path.stem: RunPlan.of(TrainConfig(**config_file.read(path))) for path in FOLDER.glob("*.toml")}
    assert {name: plan.method.name for name, plan in plans.items()} == {name: name for name in plans}
    assert set(plans) == {"allreduce", "easgd", "diloco"}
    alike = {
        str(dataclasses.replace(plan.config, algorithm="x", settings={}, out=None).to_json()) for plan in plans.values()
    }
    assert len(alike) == 1
    config = plans["easgd"].config
    assert (config.optimizer, config.schedule, config.precision, config.data) == (
        "adamw",
        "cosine",
        "bfloat16",
        "python-text",
    )
    assert config.warmup > 0
    assert config.clip_norm is not None


def test_the_plain_model_is_the_trained_one(example):
    model = models.build("gpt", shape=(12,), n_classes=256, seed=0, settings=SIZES, on_tokens=True)
    tokens = torch.randint(256, (12,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        torch.testing.assert_close(example.logits(model.state_dict(), tokens, 4), model(tokens[None])[0])


def test_it_continues_a_text(example, tmp_path, monkeypatch, capsys):
    model = models.build("gpt", shape=(12,), n_classes=256, seed=0, settings=SIZES, on_tokens=True)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    words = ["generate.py", str(tmp_path / "model.safetensors"), "--length", "20", "--prompt", "Hello"]
    monkeypatch.setattr("sys.argv", words)
    example.main()
    output = capsys.readouterr().out
    assert output.startswith("Hello")
    assert "20 bytes" in output
