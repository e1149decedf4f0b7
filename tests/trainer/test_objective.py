"""Losses and metrics by name: their values by hand, and what is refused."""

from __future__ import annotations

import math

import h5py
import numpy as np
import pytest
import torch
from torch.nn import functional

from mpitrain.data import hdf5_format, load
from mpitrain.errors import UsageError
from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.objective import Objective
from mpitrain.trainer.study import OneProcess

CLASSES = "synthetic:n=64,test=8,shape=6,classes=%d"


def dataset(n_classes=7):
    return load(CLASSES % n_classes, world=OneProcess())


def write_targets(path, *, n_targets=2, value=None, flat=False):
    """Write a data file whose targets are a linear function of the samples."""
    draw = np.random.default_rng(0)
    weights = draw.normal(size=(4, n_targets))
    with h5py.File(path, "w") as file:
        hdf5_format.create(file, shape=(4,), n=(96, 32), dtype="float32", n_targets=n_targets)
        for split in ("train", "test"):
            x = draw.normal(size=file[split]["images"].shape)
            file[split]["images"][...] = x
            if flat:
                del file[split]["targets"]
                file[split]["targets"] = (x @ weights)[:, 0]
            else:
                file[split]["targets"][...] = x @ weights
        if value is not None:
            file["test"]["targets"][5] = value
        file.attrs["mean"], file.attrs["std"] = np.zeros(4), np.ones(4)
    return path


@pytest.fixture
def targets(tmp_path):
    return load(str(write_targets(tmp_path / "targets.h5")), world=OneProcess())


def largest_error(outputs, targets):
    return (outputs - targets).abs().max()


largest_error.higher_is_better = False


def squared(outputs, targets):
    return (outputs.sum(1) - targets).square().mean()


def random_outputs(n, k):
    draw = torch.Generator().manual_seed(0)
    return torch.randn(n, k, generator=draw), torch.randint(k, (n,), generator=draw)


def score(objective, outputs, targets, size=3):
    """Score batches of which the last is smaller."""
    return objective.score(zip(outputs.split(size), targets.split(size), strict=True))


def test_the_default_is_cross_entropy_and_accuracy():
    outputs, labels = random_outputs(8, 7)
    objective = Objective(TrainConfig(), dataset())
    found = score(objective, outputs, labels)
    assert (objective.metric_name, objective.n_outputs, objective.higher_is_better) == ("accuracy", 7, True)
    assert found.loss == pytest.approx(functional.cross_entropy(outputs, labels).item(), rel=1e-6)
    assert found.accuracy == found.metric == (outputs.argmax(1) == labels).double().mean().item()


def test_top5_is_the_share_of_labels_among_the_five_largest():
    outputs, labels = random_outputs(40, 7)
    found = score(Objective(TrainConfig(metric="top5"), dataset()), outputs, labels)
    ranks = (outputs > outputs.gather(1, labels[:, None])).sum(1)
    assert found.metric == (ranks < 5).double().mean().item()
    assert found.accuracy == (ranks == 0).double().mean().item()


def test_perplexity_is_the_exponential_of_the_cross_entropy():
    objective = Objective(TrainConfig(metric="perplexity"), dataset())
    found = score(objective, torch.zeros(8, 7), torch.arange(8) % 7)
    assert found.metric == pytest.approx(7)  # of a uniform guess
    assert not objective.higher_is_better
    outputs = torch.zeros(8, 7)
    outputs[:, 1] = 1e6
    assert score(objective, outputs, torch.zeros(8, dtype=torch.long)).metric == math.inf


@pytest.mark.parametrize("shape", [(8,), (8, 1)], ids=str)
def test_binary_is_the_cross_entropy_of_one_logit(shape):
    outputs, labels = torch.linspace(-2, 2, 8), torch.tensor([0, 1] * 4)
    found = score(Objective(TrainConfig(loss="binary"), dataset(2)), outputs.reshape(shape), labels)
    p = 1 / (1 + np.exp(-outputs.double().numpy()))
    right = np.where(labels.numpy() == 1, p, 1 - p)
    assert found.loss == pytest.approx(-np.log(right).mean(), rel=1e-6)
    assert found.accuracy == np.mean((p > 0.5) == labels.numpy())
    assert Objective(TrainConfig(loss="binary"), dataset(2)).n_outputs == 1


def test_regression_has_mean_square_and_mean_absolute_errors(targets):
    outputs, wanted = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), torch.tensor([[0.0, 4.0], [3, 1], [5, 6]])
    mse = score(Objective(TrainConfig(loss="mse"), targets), outputs, wanted, size=2)
    assert mse[::2] == pytest.approx(((1 + 4 + 9) / 6, (1 + 2 + 3) / 6))
    assert math.isnan(mse.accuracy)
    assert score(Objective(TrainConfig(loss="l1"), targets), outputs, wanted, size=2).loss == pytest.approx(1.0)
    assert (Objective(TrainConfig(loss="mse"), targets).metric_name, targets.n_outputs) == ("mae", 2)


def test_outputs_have_the_shape_of_the_targets(targets):
    """(b,) minus (b, 1) would be b*b differences."""
    loss = Objective(TrainConfig(loss="mse"), targets).loss
    assert loss(torch.tensor([1.0, 2.0]), torch.tensor([[1.0], [4.0]])).item() == 2.0
    with pytest.raises(UsageError, match=r"the model returns \(2, 3\) for targets \(2, 2\)"):
        loss(torch.zeros(2, 3), torch.zeros(2, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["mse", "l1"])
def test_losses_are_computed_in_32_bits(targets, name, dtype):
    loss = Objective(TrainConfig(loss=name), targets).loss(torch.full((2, 2), 300.0, dtype=dtype), torch.zeros(2, 2))
    assert loss.dtype is torch.float32
    assert loss.item() == (90000.0 if name == "mse" else 300.0)  # float16 ends at 65504


def test_functions_of_the_users_are_means_of_a_batch():
    options = TrainConfig(loss="trainer.test_objective:squared", metric="trainer.test_objective:largest_error")
    outputs = torch.tensor([[1.0], [2.0], [5.0]])
    objective = Objective(TrainConfig(loss=options.loss), dataset(2))
    assert score(objective, outputs, torch.tensor([0, 1, 1]), size=2).loss == pytest.approx((1 + 1 + 16) / 3)
    objective = Objective(options, dataset(2))
    assert not objective.higher_is_better
    found = score(objective, outputs, outputs - torch.tensor([[1.0], [2.0], [4.0]]), size=2)
    assert found.metric == pytest.approx((2 + 2 + 4) / 3)  # batches of two samples and of one


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "cros_entropy"}, "unknown loss 'cros_entropy': did you mean cross_entropy"),
        ({"loss": "hinge"}, "it must be one of cross_entropy, binary, mse, l1, or module:function"),
        ({"metric": "accurate"}, "unknown metric 'accurate': did you mean accuracy"),
        ({"metric": "perplexity", "loss": "mse"}, "does not go with --loss mse"),
        ({"metric": "top5", "loss": "l1"}, "--metric top5 needs classes"),
        ({"metric": "mae"}, "--metric mae needs real-valued targets"),
        ({"target": "0.9"}, "--target takes METRIC=VALUE"),
        ({"target": "accuracy=nan"}, "--target takes METRIC=VALUE"),
        ({"target": "top5=0.9"}, "--target top5: this run has loss and accuracy"),
        ({"patience": 0}, "--patience must be 1 or more, not 0"),
        ({"patience": 2, "defer_evaluation": True}, "cannot be deferred"),
    ],
)
def test_names_that_do_not_fit_are_refused_with_the_options(options, message):
    with pytest.raises(UsageError, match=message):
        TrainConfig(**options)


@pytest.mark.parametrize(
    ("options", "n_classes", "message"),
    [
        ({}, 0, "targets has real-valued targets: use --loss mse or l1, not cross_entropy"),
        ({"loss": "mse"}, 3, "synthetic has classes: use --loss cross_entropy, not mse"),
        ({"loss": "binary"}, 3, "--loss binary is for 2 classes, and synthetic has 3"),
        ({"metric": "top5"}, 5, "--metric top5 needs more than 5 classes, and synthetic has 5"),
        ({"loss": "trainer.test_objective:squared", "metric": "mae"}, 3, "has classes: use --metric accuracy"),
        ({"loss": "trainer.test_objective:squared", "metric": "accuracy"}, 0, "use --metric mae, not accuracy"),
        ({"loss": "trainer.test_objective:cubed"}, 3, "has no function 'cubed'"),
        ({"metric": "trainer.nothing:f"}, 3, "metric trainer.nothing:f cannot be imported"),
    ],
)
def test_an_objective_that_does_not_fit_the_data_is_refused(targets, options, n_classes, message):
    with pytest.raises(UsageError, match=message):
        Objective(TrainConfig(**options), dataset(n_classes) if n_classes else targets)


@pytest.mark.parametrize("flat", [True, False], ids=["(N,)", "(N, 1)"])
def test_targets_of_one_number_have_two_dimensions(tmp_path, flat):
    data = load(str(write_targets(tmp_path / "t.h5", n_targets=1, flat=flat)), world=OneProcess())
    assert (data.train_labels.shape, data.train_labels.dtype, data.n_classes) == ((96, 1), np.float32, 0)


def test_a_target_that_is_no_number_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"test/targets\[5\] is nan"):
        load(str(write_targets(tmp_path / "t.h5", value=np.nan)), world=OneProcess())


def test_targets_of_another_shape_are_refused(tmp_path):
    path = write_targets(tmp_path / "t.h5")
    with h5py.File(path, "a") as file:
        del file["test/targets"]
        file["test/targets"] = np.zeros((32, 3), np.float32)
    with pytest.raises(UsageError, match=r"test/targets is \(32, 3\) float32: store \(32,\) or \(32, k\)"):
        load(str(path), world=OneProcess())
