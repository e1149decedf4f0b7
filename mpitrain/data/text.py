"""Text as a data set: a sample is a window of T tokens, and its answer the T tokens that follow each of them.

    tokens      t_0 t_1 ... t_T | t_(T+1) ...
    sample k    inputs t_(k*T) ... t_(k*T + T-1), answers t_(k*T + 1) ... t_(k*T + T)

Windows follow each other without a gap, so an epoch predicts every token once. The window is as long as the context of
the model (``--model-set context=T``).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import h5py
import numpy as np
import torch
from numpy.typing import NDArray

from mpitrain.data.dataset import Batch, Dataset, Rows
from mpitrain.data.hdf5_format import SPLITS, reading
from mpitrain.data.node_agreement import World, agree, all_ok
from mpitrain.data.option_parsing import between
from mpitrain.data.python_text import python_text
from mpitrain.data.storage import MAX_READ_BYTES, Limits, share_of
from mpitrain.data.text_format import N_BYTES, TOKENS, TextHeader, check_tokens
from mpitrain.errors import UsageError

TEST_FRACTION = 0.1
"""The share of a text that becomes the test set: its end."""

test_fraction = between(0, 1)


class Windows:
    """The samples of a text, as rows of T+1 tokens.

    Args:
        tokens: (N,) tokens, in memory or in a file.
        context: The number T of tokens of a sample.
        n_tokens: The size of the vocabulary, to check tokens that are read from a file.
        chosen: The windows that are samples; all by default.
    """

    def __init__(
        self,
        tokens: NDArray[Any] | h5py.Dataset,
        context: int,
        n_tokens: int,
        chosen: NDArray[np.int64] | None = None,
    ) -> None:
        self._tokens, self._context, self._n_tokens = tokens, context, n_tokens
        self._chosen = np.arange(max(0, (len(tokens) - 1) // context)) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def at(self, indices: NDArray[np.int64]) -> "Windows":
        """Return the windows at `indices` as samples of their own."""
        return Windows(self._tokens, self._context, self._n_tokens, self._chosen[indices])

    def select(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the windows at `indices`, (b, T+1), in that order. Local."""
        t, indices = self._context, self._chosen[indices]
        if isinstance(self._tokens, np.ndarray):
            return self._tokens[indices[:, None] * t + np.arange(t + 1)].astype(np.int64)
        path, split = self._tokens.file.filename, self._tokens.name.split("/")[1]
        rows = np.empty((len(indices), t + 1), np.int64)
        for row, index in zip(rows, indices.tolist(), strict=True):
            try:
                row[:] = self._tokens[index * t : index * t + t + 1]
            except OSError as error:
                raise UsageError(
                    f"{path}: tokens from {index * t} cannot be read ({error}): the file was changed or damaged; "
                    "restore it and resume"
                ) from error
            check_tokens(path, split, index * t, row, self._n_tokens)
        return rows


@dataclass(frozen=True, kw_only=True, eq=False)
class TextDataset(Dataset):
    """A training and a test text in windows of T tokens."""

    train: Windows
    test: Windows
    n_tokens: int  # of the vocabulary

    @property
    def n_train(self) -> int:
        """The number of windows of the training text."""
        return len(self.train)

    @property
    def n_test(self) -> int:
        """The number of windows of the test text."""
        return len(self.test)

    @property
    def n_classes(self) -> int:
        """The size of the vocabulary."""
        return self.n_tokens

    @property
    def has_tokens(self) -> bool:
        """True: the inputs are tokens."""
        return True

    @property
    def predicts_tokens(self) -> bool:
        """True: the answers are tokens."""
        return True

    def batch(self, indices: NDArray[np.int64]) -> Batch:
        """Return inputs and answers, (b, T) int64 each, of training windows. Local."""
        return _inputs_and_answers(self.train.select(indices))

    def test_batch(self, indices: NDArray[np.int64]) -> Batch:
        """Return inputs and answers, (b, T) int64 each, of test windows. Local."""
        return _inputs_and_answers(self.test.select(indices))

    def with_test_samples(self, indices: NDArray[np.int64]) -> Self:
        """Return the data set with these windows as the test set. Local."""
        return replace(self, test=self.test.at(indices))

    def description(self) -> object:
        """Return the size of the vocabulary and the length of a window."""
        return "text", self.n_tokens, self.shape

    def arrays(self) -> Iterator[Rows]:
        """Yield the windows of both texts. Local."""
        for windows in (self.train, self.test):
            yield Rows(len(windows), 8 * (self.shape[0] + 1), windows.select)


def _inputs_and_answers(rows: NDArray[np.int64]) -> Batch:
    windows = torch.from_numpy(rows)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def split_text(tokens: NDArray[Any], fraction: float) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the training text and, as the test text, the given fraction of the tokens at the end."""
    n_test = round(len(tokens) * fraction)
    return tokens[: len(tokens) - n_test], tokens[len(tokens) - n_test :]


def load_python_text(*, context: int) -> TextDataset:
    """Return the bytes of the documentation that comes with Python; its last tenth is the test text. Local."""
    tokens = np.frombuffer(python_text().encode(), np.uint8)
    train, test = split_text(tokens, TEST_FRACTION)
    return _dataset("python-text", {"train": train, "test": test}, N_BYTES, context, storage="private")


def load_text_file(
    file: h5py.File, header: TextHeader, *, context: int, world: World, limits: Limits, file_digest: str | None
) -> TextDataset:
    """Return the data set of a data file with text. Collective over the node.

    The tokens are stored once per node in shared memory, or stay in the file if they do not fit.
    """
    path = Path(file.filename)
    is_shared = agree(world, int(header.n_bytes <= limits.shared_bytes)) == 1
    tokens = {
        split: _read_shared(file[f"{split}/{TOKENS}"], header, world) if is_shared else file[f"{split}/{TOKENS}"]
        for split in SPLITS
    }
    if is_shared:
        file.close()
    storage = "shared" if is_shared else "file"
    more = {"file": None if is_shared else file, "file_digest": file_digest}
    return _dataset(path.stem, tokens, header.n_tokens, context, storage=storage, where=f"{path}: ", **more)


def _dataset(
    name: str, tokens: dict[str, Any], n_tokens: int, context: int, *, storage: str, where: str = "", **more: Any
) -> TextDataset:
    """Return the data set of a training and a test text.

    Raises:
        UsageError: A text is shorter than one window.
    """
    for split in SPLITS:
        if len(tokens[split]) <= context:
            raise UsageError(
                f"{where}the {split} text has {len(tokens[split])} tokens, too few for a context of {context}: use a "
                "smaller --model-set context=T, or a longer text"
            )
    train, test = (Windows(tokens[split], context, n_tokens) for split in SPLITS)
    return TextDataset(name=name, shape=(context,), storage=storage, train=train, test=test, n_tokens=n_tokens, **more)


def _read_shared(source: h5py.Dataset, header: TextHeader, world: World) -> NDArray[Any]:
    """Return all tokens in shared memory, of which each rank reads its part. Collective over the node."""
    array = world.shared_array(source.shape, source.dtype)
    path, split = source.file.filename, source.name.split("/")[1]
    start, stop = share_of(len(source), world.local_rank, world.local_size, source.chunks[0] if source.chunks else 1)
    slab = MAX_READ_BYTES // source.dtype.itemsize

    def read() -> None:
        for low in range(start, stop, slab):
            rows = slice(low, min(low + slab, stop))
            with reading(source.file):
                source.read_direct(array, rows, rows)
            check_tokens(path, split, low, array[rows], header.n_tokens)

    all_ok(world, read)
    return array
