"""The models of the benchmark on GPUs, on the host."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return importlib.import_module("benchmarks.gpu.models")


def test_a_gpt_does_not_see_what_comes(models: ModuleType) -> None:
    gpt = models.GPT(n_layers=2, width=16, n_heads=2, n_tokens=12).eval()
    tokens = torch.randint(models.VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % models.VOCABULARY
    with torch.no_grad():
        before, after = gpt(tokens), gpt(changed)
    assert before.shape == (3, models.VOCABULARY, 12)
    torch.testing.assert_close(before[..., :7], after[..., :7])
    assert ((before - after).abs().amax(dim=1)[:, 7:] > 1e-6).all()  # and all that follows sees it


def test_the_gpt_has_the_size_that_is_told(models: ModuleType) -> None:
    n = sum(p.numel() for p in models.gpt().model().parameters())
    width, layers = 384, 6
    block = 12 * width**2 + 13 * width  # attention 4, perceptron 8 matrices of width^2; their biases, two norms
    assert n == layers * block + (2 * 256 + 256) * width + 2 * width


@pytest.mark.parametrize("name", ["resnet20", "gpt"])
def test_tasks_have_the_same_weights_and_a_batch_that_fits(models: ModuleType, name: str) -> None:
    task = models.resnet20(2) if name == "resnet20" else models.gpt(2, 8, 1, 8, 2)
    one, other = task.model(), task.model()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    x, y = task.batch(torch.Generator().manual_seed(0))
    assert len(x) == task.n_samples
    loss = torch.nn.functional.cross_entropy(one(x), y)
    loss.backward()
    task.optimizer(one).step()
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
