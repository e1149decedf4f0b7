"""Deterministic stratified splits: the test set has the same share of every class."""

import numpy as np
from numpy.typing import NDArray


def stratified_split(labels: NDArray[np.int64], test_fraction: float, seed: int) -> NDArray[np.bool_]:
    """Return which samples belong to the test set.

    Args:
        labels: (n,) int64, the class of every sample.
        test_fraction: The share of each class in the test set, rounded to whole samples. A class of two or more samples
            has at least one in each set; a class of one sample is in the training set.
        seed: The seed of the split.

    Returns:
        (n,) bool.
    """
    is_test = np.zeros(len(labels), np.bool_)
    rng = np.random.default_rng([seed])
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        n_test = int(np.clip(round(test_fraction * len(members)), 1, max(len(members) - 1, 1)))
        if len(members) > 1:
            is_test[members[:n_test]] = True
    return is_test
