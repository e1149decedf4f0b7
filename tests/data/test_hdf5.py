"""Invalid data files are refused with one line that names the remedy."""

import h5py
import numpy as np
import pytest

from mpitrain.data import Limits, load
from mpitrain.data.hdf5_format import create
from mpitrain.errors import UsageError


def replace(file, name, values):
    del file[name]
    file[name] = values


def remove(file, name):
    del file[name]


BREAKS = {
    "no train/images": (lambda f: remove(f, "train/images"), "no array 'train/images'.*test/labels"),
    "no test group": (lambda f: remove(f, "test"), "no array 'test/images'"),
    "no mean": (lambda f: f.attrs.pop("mean"), "no attribute 'mean'"),
    "no format": (lambda f: f.attrs.pop("format"), "no attribute 'format'"),
    "newer": (lambda f: f.attrs.modify("format_version", 2), "version 2"),
    "mean of text": (lambda f: f.attrs.create("mean", "a lot"), "mean must be 3 finite numbers"),
    "mean of one channel": (lambda f: f.attrs.create("mean", [0.5]), "mean must be 3 finite numbers"),
    "std of zero": (lambda f: f.attrs.create("std", [0.5, 0.0, 1.0]), "std above 0"),
    "too few labels": (lambda f: replace(f, "train/labels", np.zeros(699, np.int64)), r"train/labels is \(699,\)"),
    "labels of floats": (lambda f: replace(f, "train/labels", np.zeros(700)), r"store \(700,\) int64"),
    "other test shape": (
        lambda f: replace(f, "test/images", np.zeros((90, 3, 4, 4), np.uint8)),
        r"test/images is of \(3, 4, 4\)",
    ),
    "images of doubles": (lambda f: replace(f, "train/images", np.zeros((700, 3, 5, 4))), "uint8 or float32"),
    "images without channels": (
        lambda f: replace(f, "train/images", np.zeros((700, 5, 4), np.uint8)),
        r"store \(N, C, H, W\)",
    ),
    "no training image": (
        lambda f: [f[f"train/{name}"].resize(0, axis=0) for name in ("images", "labels")],
        "the train set is empty",
    ),
    "no test image": (
        lambda f: [f[f"test/{name}"].resize(0, axis=0) for name in ("images", "labels")],
        "the test set is empty",
    ),
    "label too large": (lambda f: f["train/labels"].__setitem__(123, 7), r"train/labels\[123\] is 7.*0 to 6"),
    "label below zero": (lambda f: f["test/labels"].__setitem__(5, -1), r"test/labels\[5\] is -1"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_an_invalid_file_is_refused(data_file, lone, name):
    damage, text = BREAKS[name]
    with h5py.File(data_file, "a") as file:
        damage(file)
    with pytest.raises(UsageError, match=text) as caught:
        load(str(data_file), world=lone)
    assert "\n" not in str(caught.value)
    assert "some.h5" in str(caught.value)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(data_file, lone, share):
    whole = data_file.read_bytes()
    data_file.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UsageError, match=r"some.h5 is truncated.*copy it again"):
        load(str(data_file), world=lone)


@pytest.mark.parametrize("content", [b"", b"label,pixel\n" * 100])
def test_another_kind_of_file_is_refused(data_file, lone, content):
    data_file.write_bytes(content)
    with pytest.raises(UsageError, match="is not an HDF5 file"):
        load(str(data_file), world=lone)


def test_a_file_of_a_few_bytes_is_refused(data_file, lone):
    data_file.write_bytes(data_file.read_bytes()[:20])
    with pytest.raises(UsageError, match=r"some\.h5 is"):
        load(str(data_file), world=lone)


def test_a_missing_file_and_a_folder_are_refused(tmp_path, lone):
    with pytest.raises(UsageError, match=r"no data file .*gone.h5: check the path"):
        load(str(tmp_path / "gone.h5"), world=lone)
    (tmp_path / "folder.h5").mkdir()
    with pytest.raises(UsageError, match="is a folder"):
        load(str(tmp_path / "folder.h5"), world=lone)


LIMITS = {"shared": None, "private": Limits(0, 2**30), "file": Limits(0, 0)}


@pytest.mark.parametrize("storage", LIMITS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_named_with_its_row(tmp_path, lone, value, storage):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        create(file, classes=["a", "b"], shape=(3,), n=(50, 5), dtype="float32")
        file.attrs["mean"], file.attrs["std"] = np.zeros(3), np.ones(3)
        for split in ("train", "test"):
            for array in file[split].values():
                array[:] = 0
        file["train/images"][37, 1] = value
    names_the_row = pytest.raises(
        UsageError, match=r"x.h5: train/images\[37\] (is -?(nan|inf) at 1|has NaN or infinity)"
    )
    if storage == "shared":  # read as a whole
        with names_the_row:
            load(str(tmp_path / "x.h5"), world=lone)
        return
    dataset = load(str(tmp_path / "x.h5"), world=lone, sampling="sharded", limits=LIMITS[storage])
    assert dataset.storage == storage
    assert len(dataset.batch(np.arange(37))[0]) == 37  # rows that are read without it
    with names_the_row:
        (dataset.stage if storage == "private" else dataset.batch)(np.arange(30, 50))
