"""The digest of a data file: the end of the file, which HDF5 ignores.

    HDF5  |  magic, length, SHA-256 of the HDF5 file

An import adds it. ``mpitrain data verify`` and ``mpitrain train --verify`` read the file once and compare. HDF5, which
may crash on a damaged file, opens the file only afterwards. If another program changes the file, HDF5 removes the
digest.
"""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

from mpitrain.errors import UsageError, reason

_MAGIC = b"mpitrain digest\n"
_END = struct.Struct("<16sQ32s")
_BLOCK_BYTES = 2**22


def add(file: Any) -> None:
    """Append the digest to a complete data file, which is open for reading and writing."""
    length = file.seek(0, os.SEEK_END)
    digest = _digest(file, length)
    file.seek(length)
    file.write(_END.pack(_MAGIC, length, digest))


def stored(path: Path) -> str | None:
    """Return the digest that the import has stored in the file, in hexadecimal; None without one.

    The rest of the file is not read. If HDF5 changes the file later, it removes the digest.

    Raises:
        UsageError: The file cannot be read.
    """
    try:
        with path.open("rb") as file:
            end = _read_end(file)
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({reason(error)})") from error
    return None if end is None else end[1].hex()


def verify(path: Path) -> str:
    """Compare a data file with its stored digest, and return the digest in hexadecimal.

    Raises:
        UsageError: The file differs from its digest, has no digest, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            end = _read_end(file)
            if end is None:
                raise UsageError(
                    f"{path} has no digest: it was not made by 'mpitrain data import', or is damaged or changed since"
                )
            noted, digest = end
            if noted + _END.size != file.seek(0, os.SEEK_END) or _digest(file, noted) != digest:
                raise UsageError(f"{path} is damaged: its contents do not match its digest; copy or import it again")
            return digest.hex()
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({reason(error)})") from error


def _read_end(file: BinaryIO) -> tuple[int, bytes] | None:
    """Return the length of the HDF5 file and its digest; None if the file ends with something else."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - _END.size))
    end = file.read(_END.size)
    if len(end) < _END.size or not end.startswith(_MAGIC):
        return None
    _, length, digest = _END.unpack(end)
    return length, digest


def _digest(file: BinaryIO, length: int) -> bytes:
    """Return the SHA-256 of the first ``length`` bytes."""
    file.seek(0)
    left, value, block = length, hashlib.sha256(), memoryview(bytearray(_BLOCK_BYTES))
    while left and (n := file.readinto(block[: min(left, _BLOCK_BYTES)])):  # type: ignore[attr-defined]
        value.update(block[:n])
        left -= n
    return value.digest()
