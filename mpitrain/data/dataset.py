"""Data sets, which return batches of tensors from any storage."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, Self

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpitrain.data.storage import Images, MemoryImages

Batch = tuple[Tensor, Tensor]
"""Inputs and answers on the CPU: (b, ...) float32 with (b,) int64 labels or (b, k) float32 targets; for text, (b, T)
int64 tokens with the (b, T) int64 tokens that follow them."""


class Rows(NamedTuple):
    """An array of a data set, from which `identity` reads all rows or a sample of them.

    Attributes:
        n: The number of rows.
        row_bytes: The size of a row.
        select: A function that returns the rows at the given indices.
        is_small: Whether the rows are single labels, which are read in larger numbers.
    """

    n: int
    row_bytes: int
    select: Callable[[NDArray[np.int64]], NDArray[Any]]
    is_small: bool = False


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
class Dataset(ABC):
    """Training and test samples, the same on every rank. `mpitrain.data.load` returns one.

    All methods are local.
    """

    name: str
    shape: tuple[int, ...]  # of one input: (C, H, W) or (d,); (T,) for text
    storage: str  # of the training set: "shared", "private" or "file"
    file: h5py.File | None = None
    file_digest: str | None = None  # of the data file, as its import stored it

    @property
    @abstractmethod
    def n_train(self) -> int:
        """The number of training samples."""

    @property
    @abstractmethod
    def n_test(self) -> int:
        """The number of test samples."""

    @property
    @abstractmethod
    def n_classes(self) -> int:
        """The number of classes, or of tokens of a text; 0 with real-valued targets."""

    @property
    def n_outputs(self) -> int:
        """The number of outputs of a model for an answer."""
        return self.n_classes

    @property
    def has_tokens(self) -> bool:
        """Whether inputs are whole numbers that stand for something, such as the tokens of a text."""
        return False

    @property
    def predicts_tokens(self) -> bool:
        """Whether the answer to a sample is a sequence of tokens instead of one class or a row of numbers."""
        return False

    @property
    def augmentable(self) -> bool:
        """Whether `augment` is suitable."""
        return False

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """The class of each training sample, (n_train,); None without one class per sample."""
        return None

    @abstractmethod
    def batch(self, indices: NDArray[np.int64]) -> Batch:
        """Return the training samples at the given indices, in that order. Local."""

    @abstractmethod
    def test_batch(self, indices: NDArray[np.int64]) -> Batch:
        """Return the test samples at the given indices, in that order. Local."""

    @abstractmethod
    def with_test_samples(self, indices: NDArray[np.int64]) -> Self:
        """Return the data set with these samples as the test set. Local."""

    @abstractmethod
    def description(self) -> object:
        """Return what describes a sample, for the identity of the data."""

    def arrays(self) -> Iterator[Rows]:
        """Yield the arrays whose contents belong to the identity of the data. Local."""
        yield from ()

    def stage(self, indices: NDArray[np.int64]) -> None:  # noqa: B027
        """Prepare for batches of the given indices. Local.

        With sampling by parts, call it with `sampler.shard(epoch)` before each epoch. If this rank reads its samples
        from a file into private memory, they are read here, all at once. Otherwise the call has no effect.
        """

    def test_batches(self, batch_size: int, *, rank: int = 0, size: int = 1) -> Iterator[Batch]:
        """Yield the test set in order; the last batch may be smaller. Local.

        If `size` ranks share the test set, rank `rank` gets every `size`-th batch.
        """
        for start in range(rank * batch_size, self.n_test, size * batch_size):
            yield self.test_batch(np.arange(start, min(start + batch_size, self.n_test)))

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


@dataclass(frozen=True, kw_only=True, eq=False)
class ArrayDataset(Dataset):
    """Images or vectors in arrays, with class labels, or with real-valued targets if there are no classes."""

    classes: tuple[str, ...]
    normalisation: Normalisation
    train_images: Images
    train_labels: NDArray[Any]  # (n_train,) int64, or (n_train, k) float32
    test_images: Images
    test_labels: NDArray[Any]  # (n_test,) or (n_test, k)
    photographs: bool = False  # whether a shifted or reflected image keeps its class

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

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """The class of each training sample, (n_train,); None with real-valued targets."""
        return self.train_labels if self.classes else None

    def batch(self, indices: NDArray[np.int64]) -> Batch:
        """Return the training samples at the given indices, in that order. Local."""
        return self.normalisation.apply(self.train_images.select(indices)), torch.from_numpy(self.train_labels[indices])

    def test_batch(self, indices: NDArray[np.int64]) -> Batch:
        """Return the test samples at the given indices, in that order. Local."""
        return self.normalisation.apply(self.test_images.select(indices)), torch.from_numpy(self.test_labels[indices])

    def with_test_samples(self, indices: NDArray[np.int64]) -> Self:
        """Return the data set with these samples as the test set. Local."""
        images = MemoryImages(self.test_images.select(indices))
        return replace(self, test_images=images, test_labels=self.test_labels[indices])

    def stage(self, indices: NDArray[np.int64]) -> None:
        """See `Dataset.stage`. Local."""
        self.train_images.stage(indices)

    def description(self) -> object:
        """Return the classes, the shape and the normalisation."""
        return self.classes, self.shape, asdict(self.normalisation)

    def arrays(self) -> Iterator[Rows]:
        """Yield images and labels. Local."""
        for images, labels in ((self.train_images, self.train_labels), (self.test_images, self.test_labels)):
            row_bytes = images.select(np.zeros(1, np.int64)).nbytes
            yield Rows(len(labels), row_bytes, images.select)
            yield Rows(len(labels), labels.itemsize, labels.__getitem__, is_small=True)
