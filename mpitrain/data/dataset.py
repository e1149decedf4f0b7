"""A data set: batches of normalised tensors, wherever the bytes are."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpitrain.data.storage import Images

Batch = tuple[Tensor, Tensor]  # (b, ...) float32, (b,) int64, on the CPU


@dataclass(frozen=True)
class Normalisation:
    """x = (pixel / scale - mean) / std, per channel."""

    scale: float  # 255 for uint8 images
    mean: tuple[float, ...]  # (C,) or (d,)
    std: tuple[float, ...]  # (C,) or (d,)

    def apply(self, images: NDArray[Any]) -> Tensor:
        """Local: a float32 tensor; `images`, (b, C, H, W) or (b, d), may be overwritten if it is float32."""
        columns = (-1,) + (1,) * (images.ndim - 2)
        std = np.asarray(self.std).reshape(columns)
        factor = torch.from_numpy((1 / (self.scale * std)).astype(np.float32))
        offset = torch.from_numpy((-np.asarray(self.mean).reshape(columns) / std).astype(np.float32))
        return torch.from_numpy(images).to(torch.float32).mul_(factor).add_(offset)


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Training and test samples; made by `mpitrain.data.load`, the same on every rank.

    What a rank asks for is Local: no other rank needs to ask for anything.
    """

    name: str
    classes: tuple[str, ...]
    shape: tuple[int, ...]  # of one image: (C, H, W) or (d,)
    normalisation: Normalisation
    storage: str  # "shared", "private" or "file": of the training images
    train_images: Images
    train_labels: NDArray[np.int64]  # (n_train,)
    test_images: Images
    test_labels: NDArray[np.int64]  # (n_test,)
    photographs: bool = False  # whether a shifted or mirrored image is still one of its class
    file: h5py.File | None = None

    @property
    def n_train(self) -> int:
        """Training samples."""
        return len(self.train_labels)

    @property
    def n_test(self) -> int:
        """Test samples."""
        return len(self.test_labels)

    @property
    def n_classes(self) -> int:
        """Classes."""
        return len(self.classes)

    @property
    def augmentable(self) -> bool:
        """Whether `augment` makes sense: photographs of at least 28x28 pixels."""
        return self.photographs and len(self.shape) == 3 and min(self.shape[1:]) >= 28

    def batch(self, indices: NDArray[np.int64]) -> Batch:
        """Local: the training samples at these indices, in that order."""
        return self.normalisation.apply(self.train_images.select(indices)), torch.from_numpy(self.train_labels[indices])

    def stage(self, indices: NDArray[np.int64]) -> None:
        """Local: announces what `batch` will ask for; call it with `sampler.shard(epoch)` when a sharded epoch begins.

        Only private storage of a file does something about it; without it, each batch is read from the file.
        """
        self.train_images.stage(indices)

    def test_batches(self, batch_size: int, *, rank: int = 0, size: int = 1) -> Iterator[Batch]:
        """Local: the test set in order, the last batch perhaps smaller; `size` callers share the batches."""
        for start in range(rank * batch_size, self.n_test, size * batch_size):
            indices = np.arange(start, min(start + batch_size, self.n_test))
            yield (
                self.normalisation.apply(self.test_images.select(indices)),
                torch.from_numpy(self.test_labels[indices]),
            )

    def train_batches(self, batch_size: int, limit: int) -> Iterator[Batch]:
        """Local: a fixed random subset of at most `limit` training samples, in full batches, for BatchNorm statistics.

        The same on every rank and at every call. It is shuffled because files are often sorted by class. Where
        there are fewer samples than a batch, they are one batch.
        """
        limit = min(limit, self.n_train)
        batch_size = min(batch_size, limit)
        chosen = np.random.default_rng(0).permutation(self.n_train)[: limit - limit % batch_size]
        for indices in chosen.reshape(-1, batch_size):
            yield self.batch(indices)

    def close(self) -> None:
        """Local: closes the file that batches are read from, if any."""
        if self.file is not None:
            self.file.close()
