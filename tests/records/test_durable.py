"""A file that cannot be written is as it was, and nothing else is left."""

import errno
import os

import pytest

from mpitrain import UsageError
from mpitrain.records import durable
from mpitrain.trainer.runfolder import write_json


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS], ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["posix_fallocate", "write", "fsync"])
def test_a_document_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, number, call):
    def fail(*arguments):
        raise OSError(number, os.strerror(number))

    path = tmp_path / "result.json"
    write_json(path, {"x": 1})
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(UsageError, match=rf"cannot write .*result.json \({os.strerror(number)}\)"):
            write_json(path, {"x": 2})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_a_file_has_the_mode_of_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        durable.replace_file(tmp_path / "file", [b"a", b"bc"])
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~mask
    assert (tmp_path / "file").read_bytes() == b"abc"
