"""Runs on text, label-skewed parts and data of the user: the numbers of plain torch loops."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from mpitrain import data, models
from mpitrain.cli.main import main
from mpitrain.errors import UsageError
from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.evaluation import Evaluator
from mpitrain.trainer.loop import train
from mpitrain.trainer.objective import Objective
from mpitrain.trainer.study import OneProcess

pytestmark = [pytest.mark.ranks(1), pytest.mark.time_limit(300)]

SIZES = {"layers": "1", "heads": "2", "width": "16", "context": "32"}
OPTIONS = {"algorithm": "allreduce", "model": "gpt", "model_settings": SIZES, "batch_size": 4, "quiet": True}
STEPS = 5


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Write a file of 2,000 bytes."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_bytes((b"abc, the cat sat on the mat. " * 70)[:2000])
    assert main(["data", "import", "text", str(folder / "a.txt"), str(folder / "a.h5")]) == 0
    return str(folder / "a.h5")


def plain_loop(text: str, *, precision: torch.dtype | None = None) -> tuple[torch.nn.Module, float, float]:
    """Return the model, the mean loss over all test tokens and the share of right ones after AdamW in plain torch."""
    dataset = data.load(text, world=OneProcess(), context=32)
    net = models.build("gpt", shape=(32,), n_classes=256, seed=0, settings=SIZES, on_tokens=True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.0)
    sampler = data.Sampler(dataset.n_train, 4)
    for _ in range(STEPS):
        x, y = dataset.batch(sampler.draw())
        optimizer.zero_grad()
        with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
            outputs = net(x)
        functional.cross_entropy(outputs.float().reshape(-1, 256), y.reshape(-1)).backward()
        optimizer.step()
    x, y = (torch.cat(parts) for parts in zip(*dataset.test_batches(1), strict=True))
    with torch.no_grad():
        outputs = net(x)
    loss = functional.cross_entropy(outputs.reshape(-1, 256), y.reshape(-1))
    return net, float(loss), float((outputs.argmax(-1) == y).float().mean())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_on_text_is_the_plain_loop_and_its_metric_is_the_perplexity(world, tmp_path, text, precision):
    out = str(tmp_path / "run")
    more = {"data": text, "steps": STEPS, "optimizer": "adamw", "lr": 0.01, "precision": precision, "out": out}
    found = train(TrainConfig(**OPTIONS, **more), world)
    net, loss, accuracy = plain_loop(text, precision=None if precision == "float32" else torch.bfloat16)
    tolerance = 1e-5 if precision == "float32" else 2e-3
    assert found["test_loss"] == pytest.approx(loss, rel=tolerance)
    assert found["test_accuracy"] == pytest.approx(accuracy, abs=tolerance)
    assert found["metric"] == "perplexity"
    assert found["test_metric"] == pytest.approx(math.exp(found["test_loss"]))
    saved = load_file(tmp_path / "run" / "model.safetensors")
    for name, value in net.state_dict().items():
        torch.testing.assert_close(saved[name], value, rtol=tolerance, atol=tolerance)


def test_accumulation_on_text_is_the_larger_batch(world, text):
    common = {**OPTIONS, "data": text, "steps": 3, "lr": 0.1}
    one = train(TrainConfig(**{**common, "batch_size": 8}), world)
    two = train(TrainConfig(**common, accumulate=2), world)
    assert two["test_loss"] == pytest.approx(one["test_loss"], rel=1e-5)


def test_a_large_vocabulary_is_evaluated_in_small_batches(text):
    config = TrainConfig(**OPTIONS, data=text)
    dataset = data.load(text, world=OneProcess(), context=32)
    net = models.build("gpt", shape=(32,), n_classes=256, seed=0, settings=SIZES, on_tokens=True)
    objective = Objective(config, dataset)
    sizes = []
    net.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    vector = np.zeros_like(Evaluator(net, dataset, "cpu", objective).empty_vector())
    scores = []
    from mpitrain.trainer import evaluation

    for most in (2**24, 2 * 32 * 256):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluation, "MOST_OUTPUTS", most)
            scores.append(Evaluator(net, dataset, "cpu", objective).evaluate(vector))
    assert sizes == [6, 2, 2, 2]
    assert scores[0].loss == pytest.approx(scores[1].loss)


@pytest.mark.parametrize("precise", ["top5", "accuracy"])
def test_other_metrics_count_tokens(text, precise):
    dataset = data.load(text, world=OneProcess(), context=32)
    objective = Objective(TrainConfig(**OPTIONS, data=text, metric=precise), dataset)
    targets = torch.tensor([[1, 2], [3, 4]])
    logits = functional.one_hot(torch.tensor([[1, 2], [3, 9]]), 256).float()
    logits[1, 1, 4] = 0.5
    assert objective.score([(logits, targets)]).metric == (1.0 if precise == "top5" else 0.75)


def test_a_simulated_run_on_text_learns(capsys, text):
    words = [
        "--data",
        text,
        "--model",
        "gpt",
        "--batch-size",
        "4",
        "--workers",
        "2",
        "--gradients",
        "30",
        "--lr",
        "0.3",
    ]
    sizes = [word for key, value in SIZES.items() for word in ("--model-set", f"{key}={value}")]
    assert main(["simulate", "--algorithm", "allreduce", *words, *sizes, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["test_loss"] < result["evaluation"][0]["test_loss"] - 0.5


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"metric": "mae"}, "needs real-valued targets"),
        ({"loss": "mse", "metric": "support.small_models:watched"}, "has classes: use --loss cross_entropy"),
        ({"target": "accuracy=0.5"}, "--target accuracy: this run has loss and perplexity"),
        ({"sampling": "dirichlet:1"}, "needs data with one class per sample"),
        ({"augment": True}, "--augment needs photographs"),
        ({"model": "mlp", "model_settings": {}}, "mlp cannot read text"),
        ({"model_settings": {"context": "5000"}}, "too few for a context of 5000"),
    ],
)
def test_options_that_do_not_fit_text_are_refused(world, text, more, told):
    with pytest.raises(UsageError, match=told):
        train(TrainConfig(**{**OPTIONS, "data": text, "steps": 1, **more}), world)


def test_a_target_of_the_perplexity_ends_a_run_on_text(world, text):
    found = train(TrainConfig(**OPTIONS, data=text, steps=50, target="perplexity=1e6", evaluate_every=2), world)
    assert (found["ended_by"], found["steps"] < 50) == ("target", True)


def test_a_target_of_another_metric_is_refused_once_the_data_are_known(world):
    with pytest.raises(UsageError, match="--target perplexity: this run has loss and accuracy"):
        train(TrainConfig(data="digits", target="perplexity=3", steps=1, quiet=True), world)


def test_skewed_parts_are_drawn_by_runs(world):
    """One rank: its part is everything, so it is the independent run in another order."""
    name = "synthetic:n=64,test=20,shape=6,classes=4"
    config = {"algorithm": "allreduce", "data": name, "model": "mlp:hidden=5", "batch_size": 8, "quiet": True}
    found = train(TrainConfig(**config, steps=6, sampling="dirichlet:0.5"), world)
    dataset = data.load(name, world=OneProcess())
    net = models.build("mlp:hidden=5", shape=(6,), n_classes=4, seed=0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    sampler = data.Sampler(64, 8, mode="dirichlet:0.5", labels=dataset.labels)
    for _ in range(6):
        x, y = dataset.batch(sampler.draw())
        optimizer.zero_grad()
        functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    ((x, y),) = dataset.test_batches(20)
    with torch.no_grad():
        assert found["test_loss"] == pytest.approx(float(functional.cross_entropy(net(x), y)), rel=1e-5)


@pytest.mark.time_limit(900)
def test_data_of_the_user_train_as_the_same_arrays_do_with_and_without_workers(world):
    common = {"algorithm": "allreduce", "model": "mlp:hidden=5", "batch_size": 8, "steps": 12, "quiet": True}
    expected = train(TrainConfig(**common, data="synthetic:n=64,test=20,shape=6,classes=4"), world)
    for workers in (0, 2):
        found = train(TrainConfig(**common, data="support.own_data:synthetic", workers=workers), world)
        assert (found["test_loss"], found["test_accuracy"]) == (expected["test_loss"], expected["test_accuracy"])


@pytest.mark.parametrize("name", ["digits", "python-text", "synthetic:n=64", "file.h5"])
def test_workers_are_refused_for_data_that_need_none(name):
    with pytest.raises(UsageError, match="--workers is for data of module:function"):
        TrainConfig(data=name, workers=2)


def test_a_negative_number_of_workers_is_refused():
    with pytest.raises(UsageError, match="--workers must be 0 or more"):
        TrainConfig(data="own:data", workers=-1)


def test_data_that_need_no_file_are_named_once():
    from mpitrain.data.hdf5_format import SUFFIXES
    from mpitrain.trainer import data_options

    assert (data_options.BUILT_IN, data_options.SUFFIXES) == (data.BUILT_IN, SUFFIXES)
    assert [data_options.is_imported(name) for name in ("own:data", "digits", "synthetic:n=3", "a:b.h5")] == [
        True,
        False,
        False,
        False,
    ]
