"""Models built by name: shapes, seeds, sizes and error messages."""

import math

import pytest
import torch
from torch import nn

from mpitrain.errors import UsageError
from mpitrain.models import MODELS, build

OF_IMAGES = [name for name in MODELS if name != "gpt"]  # tests/models/test_gpt.py
IMAGE = (3, 32, 32)


def n_parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", OF_IMAGES)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 24, 33)])
def test_outputs_are_finite_logits_and_every_parameter_has_a_gradient(name, shape):
    model = build(name, shape=shape, n_classes=5, seed=0)
    logits = model(torch.randn(4, *shape, generator=torch.Generator().manual_seed(0)))
    assert logits.shape == (4, 5)
    assert logits.isfinite().all()
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", [*OF_IMAGES, "mlp:hidden=7x5"])
def test_weights_depend_on_the_seed_only(name):
    torch.manual_seed(123)
    state = torch.get_rng_state()
    first = build(name, shape=IMAGE, n_classes=5, seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    again, other = (build(name, shape=IMAGE, n_classes=5, seed=seed).state_dict() for seed in (1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_sizes_match_the_papers():
    # He et al. 2015: convolutions, BatchNorm and a linear layer; shortcuts of option A have no parameters
    stage = [9 * (n_in * n + 5 * n * n) for n_in, n in ((16, 16), (16, 32), (32, 64))]
    norms = 2 * (7 * 16 + 6 * 32 + 6 * 64)
    resnet = 9 * 3 * 16 + sum(stage) + norms + 64 * 10 + 10
    assert n_parameters(build("resnet20", shape=IMAGE, n_classes=10, seed=0)) == resnet == 269_722

    # Zhang et al. 2015: 28 > 24 > 12 > 8 > 4 > 2 pixels
    layers = ((3 * 25, 64), (64 * 25, 128), (128 * 9, 64), (64 * 2 * 2, 256), (256, 10))
    assert n_parameters(build("cnn7", shape=(3, 28, 28), n_classes=10, seed=0)) == sum((n + 1) * m for n, m in layers)

    layers = ((64, 128), (128, 128), (128, 10))
    assert n_parameters(build("mlp", shape=(1, 8, 8), n_classes=10, seed=0)) == sum((n + 1) * m for n, m in layers)


def test_a_resnet_block_with_a_zero_branch_is_its_shortcut():
    model = build("resnet20", shape=IMAGE, n_classes=10, seed=0).eval()
    x = torch.rand(2, 16, 8, 8)
    with torch.no_grad():
        for block in (model.blocks[0], model.blocks[3]):
            block.norm2.weight.zero_()
        assert torch.equal(model.blocks[0](x), x)
        y = model.blocks[3](x)  # from 16 to 32 channels, every second pixel
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert y[:, :8].abs().sum() == y[:, 24:].abs().sum() == 0


def test_mlp_takes_flat_inputs_and_widths():
    model = build("mlp:hidden=256x32x8", shape=(20,), n_classes=3, seed=0)
    widths = [layer.out_features for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert widths == [256, 32, 8, 3]
    assert model(torch.rand(2, 20)).shape == (2, 3)


def test_mlp_has_relu_between_its_linear_layers():
    model = build("mlp:hidden=9x4", shape=(2, 3), n_classes=5, seed=0)
    first, second, last = (layer for layer in model.modules() if isinstance(layer, nn.Linear))
    x = torch.randn(7, 2, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = last(second(first(x.reshape(7, 6)).clamp(min=0)).clamp(min=0))
        torch.testing.assert_close(model(x), expected)


def test_resnet_convolutions_are_initialised_for_the_backward_pass():
    # He et al. 2015, arXiv 1502.01852, eq. 14: variance 2 / (k^2 * output channels)
    model = build("resnet20", shape=IMAGE, n_classes=10, seed=0)
    for conv in (layer for layer in model.modules() if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 4000):
        assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * conv.out_channels)), rel=0.05)
        assert conv.bias is None


OWN = """
import torch
from torch import nn

def net(shape, n_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], n_classes))

def keywords(**given):
    assert set(given) == {"shape", "n_classes", "seed"}
    return net(given["shape"], given["n_classes"])

class Net(nn.Linear):
    def __init__(self, *, n_classes, scale=1):
        super().__init__(3, n_classes)

def no_model(shape):
    return [shape]

def demanding(shape, depth):
    return None

def positional(shape, /):
    return None

def failing(shape):
    raise RuntimeError("out of ideas")

number = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_models.py").write_text(OWN)
    (tmp_path / "own_broken.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in __import__("sys").path if entry])


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("name", ["net", "keywords", "Net"])
def test_models_of_the_working_directory_get_the_arguments_they_accept(name):
    first, again = (build(f"own_models:{name}", shape=(3, 2, 2), n_classes=4, seed=1) for _ in range(2))
    assert isinstance(first, nn.Module)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("vgg", "unknown model 'vgg': it must be one of mlp, cnn7, resnet20, gpt, or module:function"),
        ("cnn8:x", r"cnn8:x cannot be imported \(ModuleNotFoundError"),
        ("own_broken:net", r"own_broken:net cannot be imported \(ZeroDivisionError"),
        (":net", "cannot be imported"),
        ("own_models:nets", r"own_models.py\) has no function 'nets'"),
        ("own_models:number", "has no function 'number'"),
        ("own_models:no_model", "returned a list, not a torch.nn.Module"),
        ("own_models:demanding", "requires 'depth'"),
        ("own_models:positional", "requires 'shape'"),
        ("mlp:hidden=3x", "mlp:hidden=256x128"),
        ("mlp:width=3", "mlp:hidden=256x128"),
        ("resnet20:depth=3", "resnet20 takes no options"),
    ],
)
def test_mistakes_are_explained(name, text):
    with pytest.raises(UsageError, match=text) as caught:
        build(name, shape=IMAGE, n_classes=4, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("own")
def test_an_error_inside_the_users_function_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="out of ideas"):
        build("own_models:failing", shape=IMAGE, n_classes=4, seed=0)


@pytest.mark.parametrize("name", ["cnn7", "resnet20"])
def test_models_for_images_refuse_other_data(name):
    with pytest.raises(UsageError, match="use mlp"):
        build(name, shape=(math.prod(IMAGE),), n_classes=4, seed=0)


def test_cnn7_refuses_images_that_are_too_small():
    with pytest.raises(UsageError, match="24x24 pixels, the data is 1x8x8"):
        build("cnn7", shape=(1, 8, 8), n_classes=4, seed=0)


@pytest.mark.parametrize("seed", [1_795_000_000_123_456_789, 2**63 + 5, 2**70])
def test_any_seed_makes_a_model(seed):
    """A clock in nanoseconds, and numbers that torch itself refuses."""
    first, second = (build("mlp", shape=(4,), n_classes=2, seed=seed) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    other = build("mlp", shape=(4,), n_classes=2, seed=seed + 1)
    assert not torch.equal(next(first.parameters()), next(other.parameters()))
