"""The GPT: its equations, its initial weights, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from mpitrain import models
from mpitrain.errors import UsageError
from mpitrain.models.gpt import GPT

T, V = 12, 11


def build(text="gpt:layers=2,heads=2,width=8,context=12", **more):
    arguments = {"shape": (T,), "n_classes": V, "seed": 0, "on_tokens": True, **more}
    return models.build(text, **arguments)


def by_hand(model: GPT, x: torch.Tensor) -> torch.Tensor:
    """Evaluate the equations with explicit heads and masks, from the tensors of the state_dict."""
    p = {name: value.double() for name, value in model.state_dict().items()}

    def norm(h, name):
        centred = h - h.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(h, name):
        return h @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    h = p["tokens.weight"][x] + p["positions.weight"][: x.shape[1]]
    width, n = h.shape[-1], x.shape[1]
    for k in range(len(model.blocks)):
        block, heads = f"blocks.{k}", model.blocks[k].attention.heads
        qkv = linear(norm(h, f"{block}.norm1"), f"{block}.attention.qkv")
        outputs = []
        for head in range(heads):
            d = width // heads
            q, key, v = (qkv[..., part * width + head * d : part * width + (head + 1) * d] for part in range(3))
            scores = q @ key.transpose(1, 2) / math.sqrt(d)
            scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf)
            outputs.append(scores.softmax(-1) @ v)
        h = h + linear(torch.cat(outputs, -1), f"{block}.attention.project")
        u = linear(norm(h, f"{block}.norm2"), f"{block}.expand")
        gelu = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        h = h + linear(gelu, f"{block}.project")
    return norm(h, "norm") @ p["tokens.weight"].T


def test_it_is_the_equations():
    model, x = build(), torch.randint(V, (3, T), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
        torch.testing.assert_close(model(x).double(), by_hand(model, x), rtol=1e-4, atol=1e-4)


def test_a_token_sees_only_those_before_it():
    model, x = build(), torch.zeros(1, T, dtype=torch.long)
    changed = x.clone()
    changed[0, 7] = 3
    with torch.no_grad():
        different = (model(x) != model(changed)).any(-1)[0]
    assert different.tolist() == [False] * 7 + [True] * (T - 7)


def test_initial_weights_are_those_of_gpt2():
    model = models.build("gpt:layers=8,width=128", shape=(T,), n_classes=500, seed=0, on_tokens=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert parameter.abs().max() == 0
        elif "norm" in name:
            assert parameter.eq(1).all()
        else:
            expected = 0.02 / math.sqrt(16) if name.endswith("project.weight") else 0.02
            n = parameter.numel()
            assert float(parameter.detach().std()) == pytest.approx(expected, rel=6 / math.sqrt(2 * n)), name
    x, y = torch.randint(500, (2, 4, T), generator=torch.Generator().manual_seed(0))
    loss = functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
    assert float(loss.detach()) == pytest.approx(math.log(500), rel=0.05)


def test_the_output_layer_is_the_embedding_and_sizes_are_those_of_the_options():
    model = build()
    width, block = 8, 2 * 2 * 8 + (8 * 24 + 24) + (8 * 8 + 8) + (8 * 32 + 32) + (32 * 8 + 8)
    assert sum(p.numel() for p in model.parameters()) == V * width + T * width + 2 * block + 2 * width
    assert len({id(p) for p in model.parameters()}) == len(model.state_dict())
    sizes = {"layers": "3", "width": "16"}
    larger = build("gpt", settings=sizes)
    assert (len(larger.blocks), larger.tokens.weight.shape) == (3, (V, 16))


def test_dropout_acts_in_training_only():
    model, x = build("gpt:layers=1,heads=2,width=8,dropout=0.5"), torch.zeros(1, T, dtype=torch.long)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_the_most_likely_continuation_is_generated_at_a_low_temperature():
    model, x = build().eval(), torch.tensor([[1, 2, 3]])
    continued = model.generate(x, 15, temperature=1e-4)
    assert continued.shape == (1, 18)
    for n in range(3, 18):
        with torch.no_grad():
            assert int(continued[0, n]) == int(model(continued[:, max(0, n - T) : n])[0, -1].argmax())


@pytest.mark.parametrize(
    ("name", "more", "told"),
    [
        ("gpt:heads=3,width=8", {}, "3 heads do not divide a width of 8"),
        ("gpt:layers=0", {}, "gpt cannot use layers=0"),
        ("gpt:depth=2", {}, "gpt has no option 'depth=2'"),
        ("gpt:layers=2", {"settings": {"layers": "3"}}, "was given 'layers' twice"),
        ("gpt:dropout=1", {}, "below 1 is needed"),
        ("gpt", {"on_tokens": False}, "gpt reads text"),
        ("mlp", {}, "mlp cannot read text"),
        ("resnet20", {}, "resnet20 cannot read text"),
        ("cnn7", {"on_tokens": False, "settings": {"width": "3"}}, "cnn7 takes no options"),
        ("mlp", {"on_tokens": False, "settings": {"hidden": "0"}}, "mlp cannot parse 'hidden=0'"),
        ("support.small_models:watched", {"settings": {"depth": "3"}}, "has no setting 'depth'"),
    ],
)
def test_wrong_options_are_refused(name, more, told):
    with pytest.raises(UsageError, match=told):
        build(name, **more)


def test_the_settings_of_a_model_are_its_options():
    model = models.build("mlp", shape=(5,), n_classes=3, seed=0, settings={"hidden": "7x6"})
    assert [layer.out_features for layer in model.layers if hasattr(layer, "out_features")] == [7, 6, 3]


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("gpt", {}, 128),
        ("gpt:context=32", {}, 32),
        ("gpt", {"context": "16"}, 16),
        ("own:model", {"context": "24"}, 24),
        ("mlp", {}, 128),
    ],
)
def test_the_context_of_a_model_is_the_length_of_a_sample(name, settings, expected):
    assert models.context_of(name, settings) == expected


def test_a_wrong_context_is_refused():
    with pytest.raises(UsageError, match="--model-set context=0"):
        models.context_of("own:model", {"context": "0"})
