"""Laws of batches, for every data source and storage."""

import h5py
import numpy as np
import pytest
import torch

from mpitrain.data import Limits, Normalisation, Sampler, load
from mpitrain.data.hdf5_format import create
from mpitrain.errors import UsageError

PLENTY, NO_SHARED, NOTHING = Limits(10**9, 10**9), Limits(0, 10**9), Limits(0, 0)
STORAGES = [(PLENTY, "independent", "shared"), (NO_SHARED, "sharded", "private"), (NOTHING, "independent", "file")]


def test_normalisation_is_the_formula():
    pixels = np.random.default_rng(0).integers(256, size=(6, 2, 3, 3), dtype=np.uint8)
    x = Normalisation(255.0, (0.3, 0.6), (0.2, 0.4)).apply(pixels)
    expected = (pixels / 255.0 - np.reshape([0.3, 0.6], (2, 1, 1))) / np.reshape([0.2, 0.4], (2, 1, 1))
    assert x.dtype == torch.float32
    np.testing.assert_allclose(x.numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("n_ranks", [1, 2, 3])
@pytest.mark.parametrize(("limits", "sampling", "storage"), STORAGES)
def test_every_rank_sees_the_whole_file_in_any_storage(on_node, data_file, n_ranks, limits, sampling, storage):
    with h5py.File(data_file) as file:
        pixels, labels = file["train/images"][:], file["train/labels"][:]
        test_pixels, test_labels = file["test/images"][:], file["test/labels"][:]

    def check(world):
        data = load(str(data_file), world=world, sampling=sampling, limits=limits)
        assert (data.storage, data.n_train, data.n_test, data.n_classes) == (storage, 700, 90, 7)
        assert data.shape == (3, 5, 4)
        assert data.classes[3] == "class 3"
        assert not data.augmentable
        sampler = Sampler(data.n_train, 16, rank=world.rank, size=world.size, mode="sharded")
        for epoch in range(2):
            data.stage(sampler.shard(epoch))
            indices = sampler.indices(epoch, 3)
            x, y = data.batch(indices)
            assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
            assert torch.equal(x, data.normalisation.apply(pixels[indices]))
            np.testing.assert_array_equal(y, labels[indices])
        x, y = (torch.cat(part) for part in zip(*data.test_batches(32)))
        assert torch.equal(x, data.normalisation.apply(test_pixels))
        np.testing.assert_array_equal(y, test_labels)
        data.close()
        return True

    assert on_node(n_ranks, check) == [True] * n_ranks


def test_ranks_with_different_limits_choose_the_same_storage(on_node, data_file):
    def storage(world):
        return load(str(data_file), world=world, limits=PLENTY if world.rank == 1 else NOTHING).storage

    assert on_node(3, storage) == ["file"] * 3


def test_all_ranks_report_the_same_invalid_file(on_node, data_file):
    with h5py.File(data_file, "a") as file:
        file["train/labels"][650] = 7
    outcomes = on_node(3, lambda world: load(str(data_file), world=world))
    assert all(isinstance(error, UsageError) and "labels[650] is 7" in str(error) for error in outcomes)


def test_float_vectors_are_loaded(tmp_path, lone):
    path = tmp_path / "table.hdf5"
    rows = np.random.default_rng(0).normal(3, 2, (50, 4)).astype(np.float32)
    with h5py.File(path, "w") as file:
        file.attrs.update({"format": "mpitrain-data", "format_version": 1, "classes": ["no", "yes"]})
        file.attrs.update({"mean": [3.0] * 4, "std": [2.0] * 4})
        for split in ("train", "test"):
            file[f"{split}/images"], file[f"{split}/labels"] = rows, np.arange(50) % 2
    data = load(str(path), world=lone)
    for _ in range(2):  # normalising a batch does not change the data
        x, _ = data.batch(np.arange(50))
        np.testing.assert_allclose(x, (rows - 3) / 2, atol=1e-6)


@pytest.mark.parametrize(("side", "expected"), [(27, False), (28, True)])
def test_only_large_photographs_are_augmentable(tmp_path, lone, side, expected):
    path = tmp_path / "photographs.h5"
    with h5py.File(path, "w") as file:
        create(file, classes=["a"], shape=(1, side, 28), n=(3, 1))
        for split in ("train", "test"):
            file[split]["images"][...], file[split]["labels"][...] = 1, 0
        file.attrs.update({"mean": [0.5], "std": [0.5]})
    assert load(str(path), world=lone).augmentable is expected
    assert not load("synthetic:n=10,shape=3x32x32", world=lone).augmentable


def test_callers_divide_the_test_batches(data_file, lone):
    data = load(str(data_file), world=lone)
    parts = [torch.cat([y for _, y in data.test_batches(8, rank=rank, size=3)]) for rank in range(3)]
    assert torch.equal(torch.cat(parts).sort().values, torch.from_numpy(data.test_labels).sort().values)


def test_training_batches_are_full_and_shuffled(lone):
    data = load("synthetic:n=2000,classes=4", world=lone)
    batches = list(data.train_batches(30, 200))
    assert [len(y) for _, y in batches] == [30] * 6
    assert all(len(y.unique()) == 4 for _, y in batches)
    assert torch.equal(torch.cat([x for x, _ in batches]), torch.cat([x for x, _ in data.train_batches(30, 200)]))
    assert len(list(data.train_batches(2000, 10**9))) == 1
    assert [len(y) for _, y in data.train_batches(30, 20)] == [20]


def test_digits_equal_those_of_scikit_learn(monkeypatch):
    from sklearn.datasets import load_digits

    from mpitrain.data import digits

    wanted = load_digits()
    read = digits._read_table()
    assert np.array_equal(read[:, :-1], wanted.data)
    assert np.array_equal(read[:, -1], wanted.target)
    monkeypatch.setattr(digits.Path, "exists", lambda self: False)  # where scikit-learn keeps the file elsewhere
    assert np.array_equal(digits._read_table(), read)


def test_digits_without_scikit_learn_are_refused(monkeypatch):
    from mpitrain.data import digits

    monkeypatch.setattr(digits.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install scikit-learn"):
        digits._read_table()


def test_digits_are_split_by_class(lone):
    data = load("digits", world=lone)
    assert (data.n_train + data.n_test, data.shape, data.n_classes, data.storage) == (1797, (1, 8, 8), 10, "private")
    counts, test_counts = np.bincount(data.train_labels), np.bincount(data.test_labels)
    assert (abs(test_counts - 0.2 * (counts + test_counts)) <= 0.5).all()
    x, _ = data.batch(np.arange(data.n_train))
    assert abs(float(x.mean())) < 1e-5
    assert abs(float(x.std()) - 1) < 1e-3
    again, other = load("digits", world=lone, seed=5), load("digits", world=lone, split_seed=5)
    np.testing.assert_array_equal(data.test_labels, again.test_labels)
    assert (data.test_labels != other.test_labels).any()


@pytest.mark.parametrize("kind", ["clusters", "teacher"])
def test_synthetic_data_does_not_depend_on_the_number_of_ranks(on_node, kind):
    name = f"synthetic:n=700,test=50,shape=3x4x4,classes=5,kind={kind}"

    def all_of(world):
        data = load(name, world=world, seed=2)
        assert (data.n_train, data.n_test, data.shape, data.n_classes) == (700, 50, (3, 4, 4), 5)
        return torch.cat([data.batch(np.arange(700))[0].flatten(), next(data.test_batches(50))[1]])

    one = on_node(1, all_of)[0]
    assert all(torch.equal(one, x) for x in on_node(3, all_of))


@pytest.mark.parametrize("kind", ["clusters", "teacher"])
def test_synthetic_data_can_be_learned(lone, kind):
    from sklearn.linear_model import LogisticRegression

    data = load(f"synthetic:n=3000,shape=10,classes=4,separation=4,kind={kind}", world=lone)
    (x, y), (test_x, test_y) = data.batch(np.arange(3000)), next(data.test_batches(600))
    assert LogisticRegression(max_iter=500).fit(x, y).score(test_x, test_y) > 0.6  # chance: 0.25


def test_synthetic_data_is_stored_where_it_fits(lone):
    assert load("synthetic:n=100", world=lone, limits=PLENTY).storage == "shared"
    assert load("synthetic:n=100", world=lone, limits=NO_SHARED).storage == "private"
    with pytest.raises(UsageError, match="use a smaller n"):
        load("synthetic:n=100", world=lone, limits=NOTHING)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("imagenet", "unknown data 'imagenet': it must be one of digits, python-text, synthetic, or the path"),
        ("digits:n=3", "unknown data 'digits:n=3': did you mean digits"),
        ("missing.h5", "no data file missing.h5"),
        ("synthetic:m=3", "no option 'm=3'.*n, test, shape"),
        ("synthetic:n=0", "above 0"),
        ("synthetic:n=3,n=4", "twice"),
        ("synthetic:shape=3x3", "use d or CxHxW"),
        ("synthetic:shape=3x", "joined by x"),
        ("synthetic:kind=rings", "clusters, teacher"),
        ("synthetic:separation=wide", "a number of at least 0"),
    ],
)
def test_unknown_data_is_explained(lone, name, text):
    with pytest.raises(UsageError, match=text):
        load(name, world=lone)


def test_unknown_sampling_is_explained(lone):
    with pytest.raises(UsageError, match="independent, sharded"):
        load("digits", world=lone, sampling="both")
