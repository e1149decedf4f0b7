"""Every data source: each sample is in one of the two sets, with its own label."""

from collections import Counter
from typing import NamedTuple

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from mpitrain.data import Limits, load
from mpitrain.data.hdf5_format import create
from mpitrain.data.image_import import import_images
from mpitrain.trainer import evaluation
from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.objective import Objective

PLENTY, NO_SHARED, NOTHING = Limits(10**9, 10**9), Limits(0, 10**9), Limits(0, 0)
RNG = np.random.default_rng(0)


class Samples(NamedTuple):
    """Images as they are stored, and their labels."""

    images: np.ndarray
    labels: np.ndarray

    def counted(self):
        """Count the samples by their bytes and label."""
        return Counter(zip([image.tobytes() for image in self.images], self.labels.tolist()))


def train_set(data):
    images = data.train_images.select(np.arange(data.n_train))
    x, y = data.batch(np.arange(data.n_train))
    assert torch.equal(x, data.normalisation.apply(images.copy()))
    return Samples(images, y.numpy())


def set_of_test_batches(data):
    """The test set, in several batches of which the last may be smaller."""
    batch_size = 37
    images = data.test_images.select(np.arange(data.n_test))
    batches = list(data.test_batches(batch_size))
    assert [len(y) for _, y in batches] == [batch_size] * (data.n_test // batch_size) + [
        n for n in [data.n_test % batch_size] if n
    ]
    assert torch.equal(torch.cat([x for x, _ in batches]), data.normalisation.apply(images.copy()))
    return Samples(images, torch.cat([y for _, y in batches]).numpy())


def assert_disjoint(train, test):
    assert not {image.tobytes() for image in train.images} & {image.tobytes() for image in test.images}


@pytest.mark.parametrize("split_seed", [0, 1, 7])
def test_digits(lone, split_seed):
    from sklearn.datasets import load_digits

    source = load_digits()
    everything = Samples(source.data.astype(np.uint8).reshape(-1, 1, 8, 8), source.target)
    data = load("digits", world=lone, split_seed=split_seed)
    train, test = train_set(data), set_of_test_batches(data)
    assert_disjoint(train, test)
    assert train.counted() + test.counted() == everything.counted()


@pytest.mark.parametrize("kind", ["clusters", "teacher"])
@pytest.mark.parametrize("limits", [PLENTY, NO_SHARED])
@pytest.mark.parametrize("n_ranks", [1, 3])
def test_synthetic(on_node, kind, limits, n_ranks):
    seed, n_classes, d = 4, 5, 12
    name = f"synthetic:n=700,test=300,shape=3x2x2,classes={n_classes},kind={kind},separation=60"
    rng = np.random.default_rng([seed, 0])
    centers = rng.standard_normal((n_classes, d)) * 60 / np.sqrt(d)
    first, second = rng.standard_normal((d, 64)) / np.sqrt(d), rng.standard_normal((64, n_classes))

    def label_of(x):
        """The nearest center, or the teacher's largest output."""
        if kind == "clusters":
            return np.argmin(((x[:, None] - centers) ** 2).sum(-1), axis=1)
        return np.argmax(np.tanh(x @ first) @ second, axis=1)

    def check(world):
        data = load(name, world=world, seed=seed, limits=limits)
        train, test = train_set(data), set_of_test_batches(data)
        assert_disjoint(train, test)
        assert len({image.tobytes() for image in [*train.images, *test.images]}) == 1000  # no sample is drawn twice
        for part in (train, test):
            assert np.mean(label_of(part.images.reshape(-1, d).astype(np.float64)) == part.labels) > 0.99
            assert set(part.labels) == set(range(n_classes))
        return True

    assert on_node(n_ranks, check) == [True] * n_ranks


STORAGES = [(PLENTY, "independent", "shared"), (NO_SHARED, "sharded", "private"), (NOTHING, "independent", "file")]


@pytest.mark.parametrize(("limits", "sampling", "storage"), STORAGES)
@pytest.mark.parametrize("n_ranks", [1, 2, 3])
def test_hdf5(on_node, tmp_path, limits, sampling, storage, n_ranks):
    """The first pixel of an image is its set, the second its label, the others its row."""
    counts = {"train": 700, "test": 290}
    with h5py.File(tmp_path / "data.h5", "w") as file:
        create(file, classes=list("abcdefg"), shape=(1, 2, 2), n=counts.values())
        for k, (split, n) in enumerate(counts.items()):
            rows, labels = np.arange(n), RNG.integers(7, size=n)
            pixels = np.stack([np.full(n, k), labels, rows // 256, rows % 256], axis=1)
            file[split]["images"][:], file[split]["labels"][:] = pixels.reshape(n, 1, 2, 2), labels
        file.attrs["mean"], file.attrs["std"] = [0.25], [0.5]

    def check(world):
        data = load(str(tmp_path / "data.h5"), world=world, sampling=sampling, limits=limits)
        assert data.storage == storage
        for k, (samples, n) in enumerate(
            zip((train_set(data), set_of_test_batches(data)), counts.values(), strict=True)
        ):
            pixels = samples.images.reshape(n, 4)
            assert pixels[:, 0].tolist() == [k] * n
            assert pixels[:, 1].tolist() == samples.labels.tolist()
            assert (pixels[:, 2].astype(int) * 256 + pixels[:, 3]).tolist() == list(range(n))
        data.close()
        return True

    assert on_node(n_ranks, check) == [True] * n_ranks


@pytest.mark.parametrize("split", [None, "test", "val", "validation"])
def test_imported_images(tmp_path, lone, split):
    """600 images: the first pixel is the label, the second the set, the others the number of the image."""
    classes, n_test = ["ant", "bee", "cow"], 0
    for k in range(600):
        is_test = split is not None and k % 4 == 0
        n_test += is_test
        folder = tmp_path / "in" / ("" if split is None else split if is_test else "train") / classes[k % 3]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.array([[k % 3, is_test], [k // 256, k % 256]], np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
    import_images(tmp_path / "in", tmp_path / "out.h5", test_fraction=0.3, progress=False)
    data = load(str(tmp_path / "out.h5"), world=lone)
    assert data.classes == tuple(classes)
    train, test = train_set(data), set_of_test_batches(data)
    assert_disjoint(train, test)
    assert len(test.images) == (180 if split is None else n_test)
    seen = []
    for k, part in enumerate((train, test)):
        pixels = part.images.reshape(-1, 4).astype(int)
        assert pixels[:, 0].tolist() == part.labels.tolist()
        assert split is None or pixels[:, 1].tolist() == [k] * len(pixels)
        seen += (pixels[:, 2] * 256 + pixels[:, 3]).tolist()
    assert sorted(seen) == list(range(600))
    if split is None:
        assert np.bincount(test.labels).tolist() == [60] * 3


@pytest.mark.parametrize("n", [1, 499, 500, 501, 1700])
def test_an_evaluation_is_the_mean_over_all_batches(lone, n):
    assert evaluation.BATCH == 500
    data = load(f"synthetic:n=64,test={n},shape=6,classes=4,separation=2", world=lone)
    weight = np.random.default_rng(2).normal(size=(4, 6)).astype(np.float32)
    evaluator = evaluation.Evaluator(torch.nn.Linear(6, 4, bias=False), data, "cpu", Objective(TrainConfig(), data))
    vector = evaluator.empty_vector()
    vector[...], vector[:24] = 0, weight.ravel()
    loss, accuracy, _ = evaluator.evaluate(vector)
    logits = data.test_images.select(np.arange(n)).astype(np.float64) @ weight.T
    log_likelihoods = logits[np.arange(n), data.test_labels] - np.log(np.exp(logits).sum(axis=1))
    assert loss == pytest.approx(-log_likelihoods.mean(), rel=1e-5)
    assert accuracy == np.mean(logits.argmax(axis=1) == data.test_labels)
