"""Imports of text as bytes and as tokens."""

from __future__ import annotations

import importlib
import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest

from mpitrain.cli.main import main
from mpitrain.data.python_text import python_text

WORDS = ["[UNK]", *(f"w{k}" for k in range(300))]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """Write a tokenizer of 301 words."""
    tokenizers = importlib.import_module("tokenizers")
    found = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: k for k, w in enumerate(WORDS)}, unk_token="[UNK]"))
    found.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    found.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def tokens(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with h5py.File(path) as file:
        return file["train/tokens"][:], file["test/tokens"][:]


def test_bytes_of_a_file_are_split_at_its_end(tmp_path, capsys):
    text = bytes(range(1, 101))
    (tmp_path / "a.txt").write_bytes(text)
    assert main(["data", "import", "text", str(tmp_path / "a.txt"), str(tmp_path / "a.h5")]) == 0
    train, test = tokens(tmp_path / "a.h5")
    assert (train.tobytes(), test.tobytes(), train.dtype) == (text[:90], text[90:], np.uint8)
    assert "90 training and 10 test tokens from 1 file, a vocabulary of 256" in capsys.readouterr().out
    assert main(["data", "verify", str(tmp_path / "a.h5")]) == 0


@pytest.mark.parametrize("packing", ["folder", "zip"])
def test_files_of_a_folder_or_archive_follow_each_other_by_name(tmp_path, packing):
    source = tmp_path / "texts"
    (source / "b").mkdir(parents=True)
    for name, text in (("c.txt", "third"), ("a.txt", "first"), ("b/x.md", "second"), (".hidden", "no")):
        (source / name).write_text(text)
    if packing == "zip":
        with zipfile.ZipFile(tmp_path / "texts.zip", "w") as archive:
            for path in sorted(source.rglob("*")):
                archive.write(path, path.relative_to(source))
        source = tmp_path / "texts.zip"
    assert main(["data", "import", "text", str(source), str(tmp_path / "t.h5"), "--test-fraction", "0.5"]) == 0
    assert b"".join(part.tobytes() for part in tokens(tmp_path / "t.h5")) == b"first\n\nsecond\n\nthird"


def test_python_is_its_documentation(tmp_path):
    assert main(["data", "import", "text", "python", str(tmp_path / "p.h5")]) == 0
    assert b"".join(part.tobytes() for part in tokens(tmp_path / "p.h5")).decode() == python_text()


def test_a_tokenizer_decides_tokens_and_their_type(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("w0 w299 other w1\nw2 w3 w4 w5 w6 w7")
    command = ["data", "import", "text", str(tmp_path / "a.txt"), str(tmp_path / "a.h5")]
    assert main([*command, "--tokenizer", str(tokenizer), "--test-fraction", "0.2"]) == 0
    train, test = tokens(tmp_path / "a.h5")
    assert (train.tolist(), test.tolist(), train.dtype) == ([1, 300, 0, 2, 3, 4, 5, 6], [7, 8], np.uint16)
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["tokenizer"][()].decode() == tokenizer.read_text()
        assert file.attrs["n_tokens"] == len(WORDS)


def refusals(tmp_path: Path) -> dict[str, tuple[list[str], str]]:
    (tmp_path / "binary").write_bytes(b"a\0b" * 50)
    (tmp_path / "latin").write_bytes(b"\xe9" * 50)
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_text("some text")
    (tmp_path / "no.json").write_text("{}")
    (tmp_path / "bad.zip").write_bytes(b"PK\x03\x04 no archive")
    target = str(tmp_path / "x.h5")
    no_tokenizer = ["--tokenizer", str(tmp_path / "no.json")]
    return {
        "missing source": ([str(tmp_path / "none"), target], "give a text file, a folder"),
        "zero bytes": ([str(tmp_path / "binary"), target], "is not a text, because it contains zero bytes"),
        "empty": ([str(tmp_path / "empty"), target], "has 0 tokens"),
        "too short to split": ([str(tmp_path / "text"), target, "--test-fraction", "0.01"], "of which 0 are for test"),
        "fraction": ([str(tmp_path / "text"), target, "--test-fraction", "1"], "below 1 is needed"),
        "damaged archive": ([str(tmp_path / "bad.zip"), target], "it is damaged or incomplete"),
        "no tokenizer": ([str(tmp_path / "text"), target, *no_tokenizer], "is no tokenizer.json"),
        "missing tokenizer": ([str(tmp_path / "text"), target, "--tokenizer", "none"], "cannot be read"),
        "target": ([str(tmp_path / "text"), str(tmp_path / "x.txt")], "give the path of an .h5 file"),
    }


@pytest.mark.parametrize(
    "case",
    [
        "missing source",
        "zero bytes",
        "empty",
        "too short to split",
        "fraction",
        "damaged archive",
        "no tokenizer",
        "missing tokenizer",
        "target",
    ],
)
def test_a_wrong_import_is_refused_in_one_line_and_writes_nothing(tmp_path, capsys, case):
    words, told = refusals(tmp_path)[case]
    try:
        code = main(["data", "import", "text", *words])
    except SystemExit as error:
        code = int(error.code or 0)
    output = capsys.readouterr().err
    assert (code, told in output, output.count("\n")) == (2, True, 1), output
    assert not list(tmp_path.glob("*.h5"))


def test_a_tokenizer_needs_utf8(tmp_path, tokenizer, capsys):
    (tmp_path / "latin").write_bytes(b"\xe9" * 50)
    words = [str(tmp_path / "latin"), str(tmp_path / "x.h5"), "--tokenizer", str(tokenizer)]
    assert main(["data", "import", "text", *words]) == 2
    assert "is not UTF-8" in capsys.readouterr().err


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (tmp_path / "a").write_text("some text")
    (tmp_path / "t.json").write_text("{}")
    words = [str(tmp_path / "a"), str(tmp_path / "x.h5"), "--tokenizer", str(tmp_path / "t.json")]
    assert main(["data", "import", "text", *words]) == 2
    assert "pip install 'mpitrain[text]'" in capsys.readouterr().err
