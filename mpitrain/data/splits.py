"""A deterministic stratified split: the same share of every class is put aside."""

import numpy as np
from numpy.typing import NDArray


def stratified(labels: NDArray[np.int64], test_fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which samples belong to the test set.

    Args:
        labels: (n,) int64, the class of every sample.
        test_fraction: The share of each class that is put aside, rounded to whole samples; a class of two or more
            samples gives at least one and keeps at least one, a class of one sample stays in training.
        seed: Which split.

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
