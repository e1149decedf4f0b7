"""Data sets, which return batches of normalised tensors from any storage."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpitrain.data.storage import Images

Batch = tuple[Tensor, Tensor]  # (b, ...) float32, and (b,) int64 labels or (b, k) float32 targets, on the CPU


@dataclass(frozen=True)
class Normalisation:
    """The normalisation x = (pixel / scale - mean) / std of each channel."""

    scale: float  # 255 for uint8 images
    mean: tuple[float, ...]  # (C,) or (d,)
    std: tuple[float, ...]  # (C,) or (d,)

    def apply(self, images: NDArray[Any]) -> Tensor:
        """Return `images`, (b, C, H, W) or (b, d), as a normalised float32 tensor. Local.

        If `images` is a float32 array, it may be overwritten.
        """
        columns = (-1,) + (1,) * (images.ndim - 2)
        std = np.asarray(self.std).reshape(columns)
        factor = torch.from_numpy((1 / (self.scale * std)).astype(np.float32))
        offset = torch.from_numpy((-np.asarray(self.mean).reshape(columns) / std).astype(np.float32))
        return torch.from_numpy(images).to(torch.float32).mul_(factor).add_(offset)


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Training and test samples, the same on every rank. `mpitrain.data.load` returns one.

    Its labels are class numbers, or real-valued targets if there are no classes.

    All methods are local.
    """

    name: str
    classes: tuple[str, ...]
    shape: tuple[int, ...]  # of one image: (C, H, W) or (d,)
    normalisation: Normalisation
    storage: str  # of the training images: "shared", "private" or "file"
    train_images: Images
    train_labels: NDArray[Any]  # (n_train,) int64, or (n_train, k) float32
    test_images: Images
    test_labels: NDArray[Any]  # (n_test,) or (n_test, k)
    photographs: bool = False  # whether a shifted or reflected image keeps its class
    file: h5py.File | None = None
    file_digest: str | None = None  # of the data file, as its import stored it

    @property
    def n_train(self) -> int:
        """The number of training samples."""
        return len(self.train_labels)

    @property
    def n_test(self) -> int:
        """The number of test samples."""
        return len(self.test_labels)

    @property
    def n_classes(self) -> int:
        """The number of classes; 0 with real-valued targets."""
        return len(self.classes)

    @property
    def n_outputs(self) -> int:
        """The number of outputs of a model for a sample: the number of classes, or the number k of target values."""
        return self.n_classes or int(self.train_labels.shape[1])

    @property
    def augmentable(self) -> bool:
        """Whether `augment` is suitable: it needs photographs of at least 28x28 pixels."""
        return self.photographs and len(self.shape) == 3 and min(self.shape[1:]) >= 28

    def batch(self, indices: NDArray[np.int64]) -> Batch:
        """Return the training samples at the given indices, in that order. Local."""
        return self.normalisation.apply(self.train_images.select(indices)), torch.from_numpy(self.train_labels[indices])

    def stage(self, indices: NDArray[np.int64]) -> None:
        """Prepare for batches of the given indices. Local.

        With sharded sampling, call it with `sampler.shard(epoch)` before each epoch. If this rank reads its samples
        from a file into private memory, they are read here, all at once. Otherwise the call has no effect.
        """
        self.train_images.stage(indices)

    def test_batches(self, batch_size: int, *, rank: int = 0, size: int = 1) -> Iterator[Batch]:
        """Yield the test set in order; the last batch may be smaller. Local.

        If `size` ranks share the test set, rank `rank` gets every `size`-th batch.
        """
        for start in range(rank * batch_size, self.n_test, size * batch_size):
            indices = np.arange(start, min(start + batch_size, self.n_test))
            yield (
                self.normalisation.apply(self.test_images.select(indices)),
                torch.from_numpy(self.test_labels[indices]),
            )

    def train_batches(self, batch_size: int, limit: int) -> Iterator[Batch]:
        """Yield full batches of a fixed random subset of at most `limit` training samples, for BatchNorm. Local.

        The subset is the same on every rank and at every call. It is shuffled because files are often sorted by class.
        If there are fewer samples than a batch needs, they form a single batch.
        """
        limit = min(limit, self.n_train)
        batch_size = min(batch_size, limit)
        chosen = np.random.default_rng(0).permutation(self.n_train)[: limit - limit % batch_size]
        for indices in chosen.reshape(-1, batch_size):
            yield self.batch(indices)

    def close(self) -> None:
        """Close the file from which batches are read, if there is one. Local."""
        if self.file is not None:
            self.file.close()
