"""Text: windows of tokens, files of tokens, and what is refused."""

from __future__ import annotations

import h5py
import numpy as np
import pytest

from mpitrain.data import Limits, identity_of, load
from mpitrain.data.python_text import python_text
from mpitrain.data.text_format import create_text, type_of
from mpitrain.errors import UsageError

PLENTY = Limits(2**40, 2**40)
NO_MEMORY = Limits(0, 0)


def write(path, *, n=103, n_test=31, n_tokens=300, change=lambda file: None):
    """Write a file with the tokens 0, 1, 2, ... and return its training tokens."""
    tokens = np.arange(n + n_test) % n_tokens
    with h5py.File(path, "w") as file:
        create_text(file, tokens[:n], tokens[n:], n_tokens=n_tokens, tokenizer=None)
        change(file)
    return tokens[:n]


@pytest.mark.parametrize("limits", [PLENTY, NO_MEMORY], ids=["shared", "file"])
def test_windows_predict_every_token_of_a_file_once_in_order(tmp_path, lone, limits):
    tokens, t = write(tmp_path / "t.h5"), 10
    data = load(str(tmp_path / "t.h5"), world=lone, context=t, limits=limits)
    assert (data.storage, data.shape, data.n_classes) == ("shared" if limits is PLENTY else "file", (t,), 300)
    assert (data.n_train, data.n_test) == (10, 3)  # (103 - 1) // 10, (31 - 1) // 10
    x, y = data.batch(np.arange(data.n_train))
    assert not x.is_floating_point()
    np.testing.assert_array_equal(x.numpy().ravel(), tokens[:100])
    np.testing.assert_array_equal(y.numpy().ravel(), tokens[1:101])
    x, y = data.batch(np.array([7, 2]))
    np.testing.assert_array_equal(x.numpy(), [tokens[70:80], tokens[20:30]])
    (test,) = data.test_batches(500)
    np.testing.assert_array_equal(test[0].numpy().ravel(), np.arange(103, 133) % 300)
    data.close()


def test_a_file_has_the_same_identity_in_memory_and_on_disk_and_another_one_after_a_change(tmp_path, lone):
    write(tmp_path / "t.h5")
    found = {identity_of(load(str(tmp_path / "t.h5"), world=lone, context=10, limits=x)) for x in (PLENTY, NO_MEMORY)}
    write(tmp_path / "t.h5", change=lambda file: file["test/tokens"].__setitem__(3, 0))
    other = identity_of(load(str(tmp_path / "t.h5"), world=lone, context=10, limits=PLENTY))
    assert len(found) == 1
    assert found.pop().difference(other) == "other contents"


def test_ranks_of_a_node_read_a_part_each(tmp_path, on_node):
    tokens = write(tmp_path / "t.h5", n=100_001, n_test=301)
    for data in on_node(3, lambda world: load(str(tmp_path / "t.h5"), world=world, context=100, limits=PLENTY)):
        x, _ = data.batch(np.arange(data.n_train))
        np.testing.assert_array_equal(x.numpy().ravel(), tokens[:100_000])


def test_python_text_is_split_without_overlap(lone):
    data = load("python-text", world=lone, context=64)
    text = python_text().encode()
    train, test = (windows.select(np.arange(len(windows))) for windows in (data.train, data.test))
    n_test = round(len(text) / 10)
    assert train[:, :-1].astype(np.uint8).tobytes() == text[: 64 * len(train)]
    assert test[:, :-1].astype(np.uint8).tobytes() == text[len(text) - n_test :][: 64 * len(test)]
    assert 64 * len(train) + 1 <= len(text) - n_test
    assert 'The "with" statement' in text.decode()


def test_a_smaller_test_set_has_the_chosen_windows(lone):
    data = load("python-text", world=lone, context=8)
    few = data.with_test_samples(np.array([3, 11]))
    (x, y), (expected, _) = next(few.test_batches(10)), data.test_batch(np.array([3, 11]))
    assert few.n_test == 2
    np.testing.assert_array_equal(x, expected)
    np.testing.assert_array_equal(x[:, 1:], y[:, :-1])


@pytest.mark.parametrize(("n_tokens", "bits"), [(2, 8), (256, 8), (257, 16), (65536, 16), (65537, 32), (2**32, 32)])
def test_tokens_have_the_smallest_type_that_holds_them(n_tokens, bits):
    assert type_of(n_tokens) == np.dtype(f"uint{bits}")


def too_large(file):
    file["train/tokens"][77] = 301


def other_type(file):
    del file["test/tokens"]
    file["test/tokens"] = np.zeros(30, np.uint8)


def signed(file):
    del file["train/tokens"]
    file["train/tokens"] = np.zeros(30, np.int64)


def no_vocabulary(file):
    file.attrs["n_tokens"] = "many"


def no_test(file):
    del file["test"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (too_large, r"train/tokens\[77\] is 301, but there are 300 tokens"),
        (other_type, "test/tokens is uint8, train/tokens uint16"),
        (signed, r"train/tokens is \(30,\) int64: store"),
        (no_vocabulary, "attribute n_tokens must be"),
        (no_test, "test/tokens is not there"),
    ],
)
@pytest.mark.parametrize("limits", [PLENTY, NO_MEMORY], ids=["shared", "file"])
def test_a_wrong_file_is_refused_in_one_line(tmp_path, lone, change, told, limits):
    write(tmp_path / "t.h5", change=change)

    def read():
        data = load(str(tmp_path / "t.h5"), world=lone, context=10, limits=limits)
        data.batch(np.arange(data.n_train))

    with pytest.raises(UsageError, match=told) as caught:
        read()
    assert "\n" not in str(caught.value)


def test_a_text_shorter_than_a_window_is_refused(tmp_path, lone):
    write(tmp_path / "t.h5")
    with pytest.raises(UsageError, match="the test text has 31 tokens, too few for a context of 31"):
        load(str(tmp_path / "t.h5"), world=lone, context=31)
