"""The format of data files with text: two long rows of tokens.

    train/tokens   (N,) uint8, uint16 or uint32, each below n_tokens
    test/tokens    (M,) of the same type
    tokenizer      the tokenizer.json of a Hugging Face tokenizer; absent if the tokens are bytes
    attributes of the file:
      format           "mpitrain-data"
      format_version   1
      n_tokens         the size of the vocabulary, 256 for bytes

The test text follows the training text, so no token belongs to both.
"""

from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from mpitrain.data.hdf5_format import FORMAT, FORMAT_VERSION, REMEDY, SPLITS, check_format
from mpitrain.errors import UsageError
from mpitrain.records.hdf5_guard import check_stored

N_BYTES = 256
TOKENS, TOKENIZER, N_TOKENS = "tokens", "tokenizer", "n_tokens"
CHUNK_TOKENS = 2**15
TYPES = (np.uint8, np.uint16, np.uint32)


@dataclass(frozen=True)
class TextHeader:
    """The validated description of a data file with text."""

    n_train: int  # tokens
    n_test: int
    n_tokens: int  # of the vocabulary
    dtype: np.dtype[Any]

    @property
    def n_bytes(self) -> int:
        """The size of all tokens in memory."""
        return (self.n_train + self.n_test) * self.dtype.itemsize


def type_of(n_tokens: int) -> np.dtype[Any]:
    """Return the smallest unsigned type that holds the tokens of a vocabulary of this size."""
    return np.dtype(next(kind for kind in TYPES if n_tokens <= np.iinfo(kind).max + 1))


def holds_text(file: h5py.File) -> bool:
    """Return whether a data file contains text."""
    return f"{SPLITS[0]}/{TOKENS}" in file


def create_text(
    file: h5py.File, train: NDArray[Any], test: NDArray[Any], *, n_tokens: int, tokenizer: str | None
) -> None:
    """Fill a data file with the tokens of a training and a test text.

    Args:
        file: The empty file.
        train, test: (N,) and (M,) tokens.
        n_tokens: The size of the vocabulary.
        tokenizer: The tokenizer.json; None if tokens are bytes.
    """
    file.attrs["format"], file.attrs["format_version"] = FORMAT, FORMAT_VERSION
    file.attrs[N_TOKENS] = n_tokens
    if tokenizer is not None:
        file[TOKENIZER] = tokenizer
    for split, tokens in zip(SPLITS, (train, test), strict=True):
        chunks = (max(1, min(CHUNK_TOKENS, len(tokens))),)
        file.create_dataset(f"{split}/{TOKENS}", data=tokens.astype(type_of(n_tokens), copy=False), chunks=chunks)


def read_text_header(file: h5py.File) -> TextHeader:
    """Return the validated description of a file. Tokens are not read."""
    check_format(file)
    path, found = file.filename, [file.get(f"{split}/{TOKENS}") for split in SPLITS]
    for split, tokens in zip(SPLITS, found, strict=True):
        if not isinstance(tokens, h5py.Dataset) or tokens.ndim != 1 or tokens.dtype not in TYPES:
            what = f"{tokens.shape} {tokens.dtype}" if isinstance(tokens, h5py.Dataset) else "not there"
            raise UsageError(f"{path}: {split}/tokens is {what}: store (N,) uint8, uint16 or uint32")
        check_stored(tokens)
    if found[0].dtype != found[1].dtype:
        raise UsageError(f"{path}: test/tokens is {found[1].dtype}, train/tokens {found[0].dtype}: make them alike")
    size = file.attrs.get(N_TOKENS)
    is_number = isinstance(size, np.integer | int)
    if size is None or not is_number or not 1 <= size <= 2**32:
        raise UsageError(f"{path}: attribute {N_TOKENS} must be the size of the vocabulary: {REMEDY}")
    return TextHeader(len(found[0]), len(found[1]), int(size), found[0].dtype)


def check_tokens(path: str, split: str, first: int, tokens: NDArray[Any], n_tokens: int) -> None:
    """Raise `UsageError` for the first token outside the vocabulary; the message names its place.

    Args:
        path: The file.
        split: ``train`` or ``test``.
        first: The place of the first of these tokens.
        tokens: (n,) consecutive tokens.
        n_tokens: The size of the vocabulary.
    """
    if len(tokens) and tokens.max() >= n_tokens:
        place = int(np.flatnonzero(tokens >= n_tokens)[0])
        raise UsageError(
            f"{path}: {split}/tokens[{first + place}] is {tokens[place]}, but there are {n_tokens} tokens (0 to "
            f"{n_tokens - 1}): import the text again"
        )
