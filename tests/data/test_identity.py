"""The identity of a data set follows the content, wherever that is stored and whatever the file is called."""

from __future__ import annotations

import dataclasses
import shutil

import h5py
import numpy as np
import pytest

from mpitrain.data import Identity, Limits, digest, identity, identity_of, load

PLENTY = Limits(2**40, 2**40)
TOO_SMALL_FOR_ANY = Limits(0, 0)


def change_pixel(file):
    file["train/images"][699, 2, 4, 3] ^= 1


def change_test_pixel(file):
    file["test/images"][0, 0, 0, 0] ^= 1


def change_label(file):
    file["train/labels"][350] = (file["train/labels"][350] + 1) % 7


def rename_class(file):
    file.attrs["classes"] = [f"kind {k}" for k in range(7)]


def normalise_otherwise(file):
    file.attrs["mean"] = [0.5, 0.4, 0.31]


def drop_the_last(file):
    for name in ("images", "labels"):
        file[f"train/{name}"].resize(699, axis=0)


CHANGES = [change_pixel, change_test_pixel, change_label, rename_class, normalise_otherwise, drop_the_last]


def found(path, world, limits=PLENTY):
    dataset = load(str(path), world=world, limits=limits)
    try:
        return identity_of(dataset)
    finally:
        dataset.close()


def test_a_copy_under_another_name_is_the_same(data_file, lone, tmp_path):
    copy = tmp_path / "elsewhere.h5"
    shutil.copy(data_file, copy)
    assert found(data_file, lone).difference(found(copy, lone)) == ""


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_file_of_the_same_name_is_another(data_file, lone, change):
    before = found(data_file, lone)
    with h5py.File(data_file, "a") as file:
        change(file)
    assert before.difference(found(data_file, lone))


def test_it_does_not_depend_on_where_images_are_stored(data_file, lone):
    assert found(data_file, lone, PLENTY) == found(data_file, lone, TOO_SMALL_FOR_ANY)


@pytest.mark.parametrize(
    ("one", "other", "difference"),
    [
        ("digits", "digits", ""),
        ("synthetic", "synthetic:n=10000", ""),
        ("synthetic:n=100", "synthetic:n=101,test=20", "101 training samples instead of 100"),
        ("synthetic:n=100", "synthetic:n=100,test=21", "21 test samples instead of 20"),
        ("synthetic:n=100", "synthetic:n=100,classes=9", "9 classes instead of 10"),
        ("synthetic:n=100", "synthetic:n=100,shape=21", "samples of shape (21,) instead of (20,)"),
        ("synthetic:n=100", "synthetic:n=100,separation=2.5", "other contents"),
        ("synthetic:n=100,kind=teacher", "synthetic:n=100", "other contents"),
    ],
)
def test_built_in_data_are_compared_by_content_too(lone, one, other, difference):
    assert found(one, lone).difference(found(other, lone)) == difference


def test_another_split_of_the_digits_is_another_data_set(lone):
    one, other = (identity_of(load("digits", world=lone, split_seed=seed)) for seed in (0, 1))
    assert one.difference(other) == "other contents"


def test_large_images_enter_by_a_sample_of_rows_that_has_both_ends(data_file, lone, monkeypatch):
    monkeypatch.setattr(identity, "WHOLE_BYTES", 6000)  # of 42,000: every seventh image
    before = found(data_file, lone)
    for row, is_noticed in ((0, True), (699, True), (3, False)):
        with h5py.File(data_file, "a") as file:
            file["train/images"][row, 0, 0, 0] ^= 1
        assert (before.difference(found(data_file, lone)) != "") == is_noticed
        with h5py.File(data_file, "a") as file:
            file["train/images"][row, 0, 0, 0] ^= 1
    assert before == found(data_file, lone)


def test_the_digest_of_an_import_notices_what_a_sample_does_not(data_file, lone, monkeypatch):
    monkeypatch.setattr(identity, "WHOLE_BYTES", 6000)
    without = found(data_file, lone)
    with data_file.open("r+b") as file:
        digest.add(file)
    before = found(data_file, lone)
    assert before.file_digest == digest.stored(data_file) == digest.verify(data_file)
    assert before.difference(without) == without.difference(before) == ""  # compared by the sample
    with h5py.File(data_file, "a") as file:
        file["train/images"][3, 0, 0, 0] ^= 1
    assert digest.stored(data_file) is None
    with data_file.open("r+b") as file:
        digest.add(file)
    assert before.difference(found(data_file, lone)) == "other contents"


def test_no_more_than_the_stated_number_of_rows_is_read():
    for n, row_bytes in ((10**9, 8), (10**6, 150_000), (3, 2**30), (1, 2**30)):
        rows = identity._sample(n, row_bytes, identity.MOST_ROWS)
        assert (rows[0], rows[-1]) == (0, n - 1)
        assert len(rows) <= min(n, identity.MOST_ROWS)
        assert (np.diff(rows) > 0).all()


def test_it_is_stored_as_json_and_read_again(lone):
    one = found("synthetic:n=100", lone)
    assert Identity.of_json(one.to_json()) == one
    assert Identity.of_json(dataclasses.replace(one, file_digest="ab").to_json()).file_digest == "ab"
