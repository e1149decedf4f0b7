"""The identity of a data set, which a resumed run compares instead of the name of a file.

A file may be moved or renamed between two parts of a run, and another file may take its name. Two data sets are the
same if they have the same number of samples, the same shape and classes, and the same SHA-256 of

    names of the classes, normalisation, labels and images of the training and the test set

For text, the tokens take the place of labels and images. Of data from a function of the user (``module:function``),
only the numbers and the shape are compared, because reading its samples may be slow or random.

If the images take more than 16 MiB, only up to 1,024 evenly spaced rows of them are used, so that no run has to read a
large file at its start. Changes of other rows are found only in a file of ``mpitrain data import``, which holds a
digest of all its bytes (``digest``): if both data sets have one, these must be equal too.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpitrain.data.dataset import Dataset

WHOLE_BYTES = 2**24
"""Arrays up to this size enter the digest as a whole, others by a sample of rows."""

MOST_ROWS = 1024
"""The most images of a sample: each may be a read of its own from a file on a network."""

MOST_LABELS = WHOLE_BYTES // 8


@dataclass(frozen=True)
class Identity:
    """A description of the content of a data set, independent of its name and place.

    Attributes:
        train, test: The numbers of training and test samples.
        shape: The shape of one image.
        classes: The number of classes.
        digest: The SHA-256 digest of the content, in hexadecimal. If the content is large, only a sample of it is used.
        file_digest: SHA-256 of the data file, as its import stored it; None if there is none.
    """

    train: int
    test: int
    shape: tuple[int, ...]
    classes: int
    digest: str
    file_digest: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON document."""
        return {**asdict(self), "shape": list(self.shape)}

    @classmethod
    def of_json(cls, document: Mapping[str, Any]) -> Identity:
        """Return the identity that ``to_json`` has stored."""
        return cls(**{**document, "shape": tuple(document["shape"])})

    def difference(self, other: Identity) -> str:
        """Return how another data set differs from this one, in words; an empty text if they are the same."""
        for name, unit in (("train", "training samples"), ("test", "test samples"), ("classes", "classes")):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                return f"{theirs} {unit} instead of {ours}"
        if self.shape != other.shape:
            return f"samples of shape {other.shape} instead of {self.shape}"
        whole_files = None not in (self.file_digest, other.file_digest)
        if self.digest != other.digest or (whole_files and self.file_digest != other.file_digest):
            return "other contents"
        return ""


def identity_of(dataset: Dataset) -> Identity:
    """Return the identity of a data set; it does not depend on where the images are stored. Local."""
    found = hashlib.sha256(repr(dataset.description()).encode())
    for rows in dataset.arrays():
        most = MOST_LABELS if rows.is_small else MOST_ROWS
        _add(found, rows.select(_sample(rows.n, rows.row_bytes, most)))
    return Identity(
        train=dataset.n_train,
        test=dataset.n_test,
        shape=tuple(dataset.shape),
        classes=dataset.n_classes,
        digest=found.hexdigest(),
        file_digest=dataset.file_digest,
    )


def _sample(n: int, row_bytes: int, most: int) -> NDArray[np.int64]:
    """Return the rows of ``n`` that enter the digest: all if they are small, else ``most`` evenly spaced ones."""
    if n * row_bytes <= WHOLE_BYTES:
        return np.arange(n)
    count = min(n, most, max(2, math.ceil(WHOLE_BYTES / row_bytes)))
    return np.linspace(0, n - 1, count).astype(np.int64)


def _add(found: Any, array: NDArray[Any]) -> None:
    found.update(repr((array.shape, array.dtype.str)).encode())
    found.update(np.ascontiguousarray(array).view(np.uint8).data)
