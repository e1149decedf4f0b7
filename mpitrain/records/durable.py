"""Files that appear complete or not at all, whatever the disk does.

A file is written under another name, after disk space for it has been reserved. Then it is synced and renamed. The
rename is atomic: a crash or an error at any moment leaves the file that was there before. After an error, no temporary
file is left.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable
from pathlib import Path

from mpitrain.errors import UsageError, reason

_CANNOT_RESERVE = (errno.EINVAL, errno.ENODEV, errno.ENOSYS, errno.EOPNOTSUPP)
_WRITE_BYTES = 2**26  # in one call: a signal or a failure is noticed between two

injected_errno = 0
"""Of the error with which every reservation of room fails, for tests; 0 for none."""

Buffer = bytes | bytearray | memoryview


def replace_file(path: Path, parts: Iterable[Buffer]) -> None:
    """Write a file atomically, replacing the file at ``path`` if there is one.

    Args:
        path: The file; its folder must exist.
        parts: The contents, in parts that are concatenated.

    Raises:
        OSError: The file cannot be written. ``path`` is unchanged, and no temporary file is left.
    """
    views = [memoryview(part).cast("B") for part in parts]
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    folder = os.open(path.parent, os.O_RDONLY)  # now: another rank may rename it as soon as the file is there
    try:
        partial.unlink(missing_ok=True)  # left by a killed process of the same number
        with open(partial, "xb", buffering=0) as file:
            reserve(file.fileno(), 0, sum(map(len, views)))
            for view in views:
                _write(file.fileno(), view)
            os.fsync(file.fileno())
        partial.rename(path)
        os.fsync(folder)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    finally:
        os.close(folder)


def replace_text(path: Path, text: str) -> None:
    """Write a text file for the user, replacing the file at ``path`` if there is one.

    Raises:
        UsageError: The file cannot be written. ``path`` is unchanged.
    """
    replace_for_user(path, text.encode(errors="backslashreplace"))


def replace_for_user(path: Path, content: Buffer) -> None:
    """Write a file for the user, replacing the file at ``path`` if there is one.

    Raises:
        UsageError: The file cannot be written. ``path`` is unchanged.
    """
    try:
        replace_file(path, [content])
    except OSError as error:
        raise UsageError(f"cannot write {path} ({reason(error)}): {remedy(error)}") from error


def remedy(error: OSError) -> str:
    """Return a remedy for a file that cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some room, or choose a folder on another disk"
    return "choose a folder that can be written"


def reserve(descriptor: int, offset: int, n_bytes: int) -> None:
    """Reserve disk space for a part of a file, and extend the file to the end of this part.

    Raises:
        OSError: The disk is full.
    """
    if not n_bytes:
        return
    if injected_errno:
        raise OSError(injected_errno, os.strerror(injected_errno))
    try:
        os.posix_fallocate(descriptor, offset, n_bytes)
    except OSError as error:
        if error.errno not in _CANNOT_RESERVE:
            raise


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(descriptor: int, view: memoryview) -> None:
    while len(view):
        view = view[os.write(descriptor, view[:_WRITE_BYTES]) :]
