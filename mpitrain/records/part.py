"""The part of a checkpoint that one rank writes: an HDF5 file that ends in a seal.

    HDF5 (``hdf5_tree``)  |  magic, length, step, rank, number of ranks, CRC-32

The HDF5 file is built in memory, because HDF5 may crash on errors of the disk. The seal is appended to the same file,
so that it cannot be lost separately; HDF5 ignores it. HDF5 may also crash or hang on a damaged file, so a file is
opened only if it has a seal and the seal is right.
"""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import h5py

from mpitrain.records import durable, hdf5_tree
from mpitrain.records.hdf5_guard import check_contents

_SEAL = struct.Struct("<16sQQIII")
_MAGIC = b"mpitrain part 1\n"
_BLOCK_BYTES = 2**22


class Seal(NamedTuple):
    """The last bytes of the file of a part, with which its completeness is checked.

    Attributes:
        magic: The name of the format.
        n_bytes: The length of the HDF5 file before the seal.
        step: The step of the checkpoint.
        rank: The rank that loads the part.
        n_ranks: The number of ranks of the run.
        checksum: CRC-32 of the HDF5 file and the other fields.
    """

    magic: bytes
    n_bytes: int
    step: int
    rank: int
    n_ranks: int
    checksum: int = 0

    def of(self, crc: int) -> Seal:
        """Return the seal of a file with the checksum ``crc``."""
        return self._replace(checksum=zlib.crc32(_SEAL.pack(*self._replace(checksum=0)), crc))


def file_name(rank: int) -> str:
    """Return the name of a rank's part."""
    return f"rank-{rank:05d}.h5"


def encode(state: Any) -> memoryview:
    """Copy a state to an HDF5 file in memory, and return the file.

    Raises:
        TypeError: The state contains an object of a type that cannot be saved.
    """
    image = BytesIO()
    with h5py.File(image, "w") as root:
        hdf5_tree.write_tree(root, state)
    return image.getbuffer()


def write(path: Path, image: memoryview, *, step: int, rank: int, n_ranks: int) -> None:
    """Write a part and its seal. The file appears only when it is complete.

    Raises:
        OSError: The part cannot be written. No file is left.
    """
    seal = Seal(_MAGIC, len(image), step, rank, n_ranks).of(zlib.crc32(image))
    durable.replace_file(path, [image, _SEAL.pack(*seal)])


def copy(source: Path, target: Path, rank: int) -> None:
    """Write a copy of a part for another rank.

    Raises:
        OSError: The copy cannot be written, or ``source`` is damaged.
    """
    with source.open("rb", buffering=0) as file:
        try:
            seal = _checked_seal(file)
        except ValueError as error:
            raise OSError(f"{source}: {error}") from error
        file.seek(0)
        image = memoryview(file.read(seal.n_bytes))
    write(target, image, step=seal.step, rank=rank, n_ranks=seal.n_ranks)


def read_seal(path: Path) -> Seal:
    """Return the seal of a part, without checking the rest of the file.

    Raises:
        OSError, ValueError: The file has no seal.
    """
    with path.open("rb", buffering=0) as file:
        return _seal(file)


def read(path: Path, rank: int) -> tuple[Seal, Any]:
    """Return the seal and the state of a part.

    Raises:
        Exception: The file is damaged. HDF5 raises errors of many types.
    """
    with path.open("rb", buffering=0) as file:
        seal = _checked_seal(file)
        if seal.rank != rank:
            raise ValueError(f"it is the part of rank {seal.rank}")
        with h5py.File(file, "r") as root:
            check_contents(root)
            return seal, hdf5_tree.read_tree(root)


def _seal(file: BinaryIO) -> Seal:
    length = file.seek(0, 2)
    file.seek(max(0, length - _SEAL.size))
    end = file.read(_SEAL.size)
    if len(end) < _SEAL.size or not end.startswith(_MAGIC):
        raise ValueError("it has no checksum at its end: it is incomplete, or of another version")
    seal = Seal(*_SEAL.unpack(end))
    if seal.n_bytes + _SEAL.size != length:
        raise ValueError(f"it has {length} bytes, not {seal.n_bytes + _SEAL.size}")
    return seal


def _checked_seal(file: BinaryIO) -> Seal:
    """Return the seal of a file whose checksum is right."""
    seal = _seal(file)
    file.seek(0)
    left, crc, block = seal.n_bytes, 0, memoryview(bytearray(_BLOCK_BYTES))
    while left and (n := file.readinto(block[: min(left, _BLOCK_BYTES)])):  # type: ignore[attr-defined]
        crc = zlib.crc32(block[:n], crc)
        left -= n
    if left or seal.of(crc) != seal:
        raise ValueError("its checksum is wrong")
    return seal
