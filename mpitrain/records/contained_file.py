"""A file that hides failures of the disk from HDF5, which writes to it.

HDF5 may crash after a write that has failed, at the latest when the process ends. This file therefore notes the first
failure, and ignores all writes from then on. HDF5 continues, and closes the file as usual. The caller then asks for the
failure with ``check``.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from mpitrain.records.durable import Buffer


class ContainedFile:
    """A new file for ``h5py.File(file, "w")`` that notes failures of the disk instead of raising them inside HDF5.

    Args:
        path: The file to create.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "x+b", buffering=0)  # noqa: SIM115
        self._failure: OSError | None = None

    def check(self) -> None:
        """Raise the error of the first failure, if there was one."""
        if self._failure is not None:
            raise self._failure

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position in the file, possibly beyond its end."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Return the position in the file."""
        return self._file.tell()

    def read(self, size: int = -1) -> bytes:
        """Return bytes from the file. h5py accepts only objects with this method as files."""
        return self._file.read(size) or b""

    def readinto(self, buffer: Buffer) -> int:
        """Read bytes into a buffer, and return their number."""
        return self._file.readinto(buffer) or 0

    def write(self, data: Buffer) -> int:
        """Write all of the data, or note the failure. Return the length of the data in both cases."""
        view = memoryview(data).cast("B")
        place, n = self._file.tell(), len(view)
        try:
            while len(view) and self._failure is None:
                view = view[self._file.write(view) or 0 :]
        except OSError as error:
            self._failure = error
        if self._failure is not None:
            self._file.seek(place + n)
        return n

    def truncate(self, size: int | None = None) -> int:
        """Set the length of the file, or note the failure."""
        size = self._file.tell() if size is None else size
        if self._failure is None:
            try:
                self._file.truncate(size)
            except OSError as error:
                self._failure = error
        return size

    def flush(self) -> None:
        """Do nothing, because nothing is buffered."""

    def sync(self) -> None:
        """Write the file to the disk.

        Raises:
            OSError: This call or an earlier one has failed.
        """
        self.check()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
