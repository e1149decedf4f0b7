"""The handwritten digits that scikit-learn includes."""

import functools
import importlib.util
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpitrain.data.dataset import ArrayDataset, Normalisation
from mpitrain.data.storage import MemoryImages
from mpitrain.data.stratified_split import stratified_split
from mpitrain.errors import UsageError

LARGEST_PIXEL = 16


def load_digits(*, split_seed: int) -> ArrayDataset:
    """Return 1,797 digits of 8x8 pixels in 0..16 (UCI). Local.

    Args:
        split_seed: The seed that selects a fifth of each class as the test set.
    """
    table = _table()
    images = table[:, :-1].astype(np.uint8).reshape(-1, 1, 8, 8)
    labels = table[:, -1].astype(np.int64)
    is_test = stratified_split(labels, 0.2, split_seed)
    train = images[~is_test]
    mean, std = float(train.mean() / LARGEST_PIXEL), float(train.std() / LARGEST_PIXEL)
    return ArrayDataset(
        name="digits",
        classes=tuple(str(digit) for digit in range(10)),
        shape=(1, 8, 8),
        normalisation=Normalisation(LARGEST_PIXEL, (mean,), (std,)),
        storage="private",
        train_images=MemoryImages(train),
        train_labels=labels[~is_test],
        test_images=MemoryImages(images[is_test]),
        test_labels=labels[is_test],
    )


@functools.cache
def _table() -> NDArray[np.float64]:
    """Return the table of `_read_table`, which takes longer to read than many a run of a test."""
    table = _read_table()
    table.setflags(write=False)
    return table


def _read_table() -> NDArray[np.float64]:
    """Return (1797, 65): the 64 pixels and the label of each digit.

    Importing scikit-learn takes a second, so its data file is read directly.
    """
    found = importlib.util.find_spec("sklearn")
    if found is None or found.origin is None:
        raise UsageError("digits come with scikit-learn: pip install scikit-learn, or use --data synthetic")
    file = Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if file.exists():
        return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits  # this version keeps the file elsewhere

    loaded = load_digits()
    return np.column_stack([loaded.data, loaded.target])
