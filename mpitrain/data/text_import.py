"""Import of text into a data file: bytes, or the tokens of a Hugging Face tokenizer."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from mpitrain.data.class_folders import files, is_hidden
from mpitrain.data.data_writer import check_target, replace_data
from mpitrain.data.python_text import NAME, SEPARATOR, python_text
from mpitrain.data.text import TEST_FRACTION, split_text
from mpitrain.data.text_format import N_BYTES, create_text, type_of
from mpitrain.errors import UsageError, reason
from mpitrain.records.contained_file import ContainedFile


@dataclass(frozen=True)
class ImportedText:
    """The outcome of an import of text."""

    target: Path
    n_train: int  # tokens
    n_test: int
    n_tokens: int  # of the vocabulary
    n_files: int

    def summary(self) -> str:
        """Return a line about the file."""
        source = f"{self.n_files} file{'s' * (self.n_files > 1)}"
        return (
            f"{self.target}: {self.n_train} training and {self.n_test} test tokens from {source}, a vocabulary of "
            f"{self.n_tokens}, stored as {type_of(self.n_tokens)}"
        )


class Tokenizer:
    """The translation of text into tokens.

    Args:
        path: A Hugging Face ``tokenizer.json``; None for the bytes of the text.

    Attributes:
        n_tokens: The size of the vocabulary.
        json: The contents of the file; None for bytes.

    Raises:
        UsageError: The file cannot be used, or the library ``tokenizers`` is missing.
    """

    def __init__(self, path: Path | None) -> None:
        self.n_tokens, self.json, self._tokenizer = N_BYTES, None, None
        if path is None:
            return
        try:
            self.json = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--tokenizer {path} cannot be read ({reason(error)}): check the path") from error
        try:
            self._tokenizer = importlib.import_module("tokenizers").Tokenizer.from_str(self.json)
        except ImportError as error:
            raise UsageError("--tokenizer needs a package: pip install 'mpitrain[text]'") from error
        except Exception as error:  # the library raises plain exceptions
            raise UsageError(f"--tokenizer {path} is no tokenizer.json ({reason(error)})") from error
        self.n_tokens = int(self._tokenizer.get_vocab_size())

    def encode(self, name: str, content: bytes) -> NDArray[Any]:
        """Return the tokens of a file.

        Args:
            name: The file, for messages.
            content: Its bytes.

        Raises:
            UsageError: The file is not text.
        """
        if b"\0" in content:
            raise UsageError(f"{name} is not a text, because it contains zero bytes: leave it out")
        if self._tokenizer is None:
            return np.frombuffer(content, np.uint8)
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"{name} is not UTF-8 ({error}): convert it, or leave it out") from error
        found = np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int64)
        if len(found) and found.max() >= self.n_tokens:  # ids with gaps between them
            raise UsageError(f"the tokenizer yields token {found.max()} of {self.n_tokens}: number its tokens from 0")
        return found.astype(type_of(self.n_tokens))


def import_text(
    source: Path, target: Path, *, tokenizer: Path | None = None, test_fraction: float = TEST_FRACTION
) -> ImportedText:
    """Write a data file from text. When it is complete, it replaces an older file.

    Files follow each other in the order of their paths, with an empty line between them. The test text is the end.

    Args:
        source: A text file, a folder or archive of text files, or ``python`` for the documentation of Python.
        target: The file to write.
        tokenizer: A Hugging Face ``tokenizer.json``; without it, tokens are bytes.
        test_fraction: The share of the tokens that become the test text.

    Raises:
        UsageError: The source or the tokenizer cannot be used, or the file cannot be written.
    """
    check_target(target)
    translate = Tokenizer(tokenizer)
    parts: list[NDArray[Any]] = []
    for name, content in _texts(source):
        parts += [translate.encode("the separator", SEPARATOR.encode())] if parts else []
        parts.append(translate.encode(name, content))
    n_files = (len(parts) + 1) // 2
    tokens = np.concatenate(parts) if parts else np.empty(0, np.uint8)
    train, test = split_text(tokens, test_fraction)
    if not (len(train) and len(test)):
        raise UsageError(
            f"{source} has {len(tokens)} tokens, of which {len(test)} are for testing: give more text, or another "
            "--test-fraction"
        )

    def fill(output: ContainedFile) -> None:
        with h5py.File(output, "w") as file:
            create_text(file, train, test, n_tokens=translate.n_tokens, tokenizer=translate.json)

    replace_data(target, fill)
    return ImportedText(target, len(train), len(test), translate.n_tokens, n_files)


def _texts(source: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each text."""
    if source == Path(NAME) and not source.exists():
        yield NAME, python_text().encode()
    elif source.is_file() and not source.name.endswith((".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz")):
        try:
            yield str(source), source.read_bytes()
        except OSError as error:
            raise UsageError(f"{source} cannot be read ({reason(error)}): check its permissions") from error
    elif source.exists():
        for name, stream in files(source, lambda name: not is_hidden(name)):
            yield name, stream.read()
    else:
        raise UsageError(f"no {source}: give a text file, a folder or archive of text files, or {NAME}")
