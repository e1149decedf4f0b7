"""Tables of numbers that grow while a run goes on, in one HDF5 file that any process may read meanwhile.

    metrics.h5:  /progress/seconds (rows,)  /progress/loss (rows,) ...  /staleness/histogram (rows, 33)    all float64

The format is HDF5's single writer, multiple readers (SWMR; The HDF Group, "HDF5 Single-writer/Multiple-reader User's
Guide"): all datasets are made before the mode is switched on, after which they only grow. What follows from how that
behaves (HDF5 2.0):

- A file whose writer lives, or was killed, opens for reading with `swmr=True` and in no other way. Killed at any moment
  it stays readable, but its columns may have different lengths: a table is as long as its shortest column.
- A killed writer leaves the file marked as open for writing, and then it opens for writing no more (the tool that
  clears the mark, h5clear, is not in the wheels). Going on with a file therefore means to read it and to write a new
  one, which takes its place in one rename. That is also how rows are dropped, and how a table gets new fields.
- A file is built under another name and renamed only once SWMR is on, so `path` is never in a state that cannot be
  read.
- A reader repeats what it finds unfinished, 100 times with pauses that double from a nanosecond: on a damaged file, as
  a crashed machine leaves it, that is for ever. 25 times are over in some 50 ms. h5py has no call for that setting. And
  what lies behind the end of a file that was cut off reads as zeros, so the length is compared with the one noted.
- No file locks are asked for: a run has one writer (`trainer.runlock`), and on a network file system whose
  locks do not work HDF5 gives up over them. All openings in one process must ask alike, or HDF5 refuses the second.
  HDF5_USE_FILE_LOCKING in the environment overrules this.
- A write that fails (a full disk) leaves HDF5 in a state in which it crashes, at the latest when the process ends. So
  room is taken from the file system before rows are handed to HDF5; where there is none they are dropped, with one
  warning, and training goes on.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np
from numpy.typing import ArrayLike, NDArray

from mpitrain.errors import UsageError, reason

Column = NDArray[np.float64]
Field = str | tuple[str, tuple[int, ...]]  # a name, or a name and the shape of one row's entry
Tables = Mapping[str, Sequence[Field]]

LOCKING = False
LIBVER = "v110"  # the oldest format that has SWMR, so that the most tools can read it
ROWS_PER_CHUNK = 256
HDF5_ATTEMPTS = 25  # of reading one piece of metadata, see above
ATTEMPTS = 3  # of reading the file: local file systems keep the order of writes, network ones do not promise it
PAUSE_SECONDS = 0.1
FAILURES = (OSError, RuntimeError, KeyError)
"""What h5py raises when a file cannot be written: RuntimeError of closing it, KeyError of looking for a part of it."""
BYTES_PER_FIELD = 8192  # more than a column's new chunk and what points to it
HOLES_BYTES = 2**20  # at the end of a file, in which HDF5 may leave out what it has not written yet
CANNOT_RESERVE = (errno.EINVAL, errno.ENODEV, errno.ENOSYS, errno.EOPNOTSUPP)


class MetricsWriter:
    """Appends rows to the tables of one file; the only writer of it. Continues the file if there is one.

    Rows are kept in memory and written at most every `flush_seconds`, all tables together: writing a row of 13 fields
    takes a millisecond. A writer that is killed loses what it had not written.

    Example:
        >>> tables = {"progress": ["step", "loss"], "staleness": ["step", ("histogram", (33,))]}
        >>> with MetricsWriter(path, tables) as metrics:
        ...     metrics.append("progress", step=1, loss=2.3)
    """

    def __init__(self, path: str | os.PathLike[str], tables: Tables, *, flush_seconds: float = 1.0) -> None:
        """Opens `path` with the given tables, and with the rows (and any further fields) that it has already.

        Args:
            path: the HDF5 file; its folder must exist.
            tables: the fields of each table; a field with a shape, as in `("histogram", (33,))`, holds an array per
                row.
            flush_seconds: the least time between two writes; 0 writes every row at once.

        Raises:
            UsageError: if there is a file that cannot be read, or one whose fields have other shapes.
        """
        self._path = Path(path)
        self._has_warned = self._is_broken = False
        self._flush_seconds = flush_seconds
        self._shapes = {
            table: dict((field, ()) if isinstance(field, str) else field for field in fields)
            for table, fields in tables.items()
        }
        rows = read_metrics(path) if self._path.exists() else {}
        for table, columns in rows.items():
            shapes = self._shapes.setdefault(table, {})
            for field, column in columns.items():
                if shapes.setdefault(field, column.shape[1:]) != column.shape[1:]:
                    raise UsageError(
                        f"{self._path}: {table}/{field} has entries of shape {column.shape[1:]}, not {shapes[field]}: "
                        "it was written by another version; move it away to start a new one"
                    )
        self._start(rows)

    def _start(self, rows: Mapping[str, Mapping[str, Column]]) -> None:
        """Puts a new file with these rows in the place of `path` and leaves it open for appending."""
        building = self._path.with_name(f"{self._path.name}.building")
        building.unlink(missing_ok=True)  # of a writer that was killed at this point
        n_fields = sum(map(len, self._shapes.values()))
        with building.open("wb") as file:
            n_bytes = sum(column.nbytes for columns in rows.values() for column in columns.values())
            reserve(file.fileno(), 0, 2 * n_bytes + BYTES_PER_FIELD * n_fields)
        self._file = h5py.File(building, "w", libver=LIBVER, locking=LOCKING)
        for table, shapes in self._shapes.items():
            old = rows.get(table, {})
            n = max((len(column) for column in old.values()), default=0)
            for field, shape in shapes.items():
                self._file.create_dataset(
                    f"{table}/{field}",
                    data=old.get(field, np.full((n, *shape), np.nan)),
                    dtype=np.float64,
                    maxshape=(None, *shape),
                    chunks=(max(1, ROWS_PER_CHUNK // math.prod(shape)), *shape),
                    fillvalue=np.nan,
                )
        self._file.swmr_mode = True
        os.replace(building, self._path)
        self._waiting: dict[str, list[dict[str, Column]]] = {table: [] for table in self._shapes}
        self._flushed_at = -math.inf

    def append(self, table: str, **values: ArrayLike) -> None:
        """Adds one row; a field without a value gets NaN.

        Raises:
            ValueError: for an unknown table or field, a value of the wrong shape, or after `close`.
        """
        shapes = self._shapes.get(table)
        if shapes is None:
            raise ValueError(f"no table is called {table!r}; there are {', '.join(self._shapes)}")
        if unknown := values.keys() - shapes.keys():
            raise ValueError(f"table {table} has no field {', '.join(sorted(unknown))}; it has {', '.join(shapes)}")
        if not self._file:
            raise ValueError(f"{self._path} is closed")
        row = {}
        for field, shape in shapes.items():
            row[field] = np.array(values.get(field, np.full(shape, np.nan)), dtype=np.float64)
            if row[field].shape != shape:
                raise ValueError(f"{table}/{field} takes values of shape {shape}, not {row[field].shape}")
        self._waiting[table].append(row)
        if time.monotonic() - self._flushed_at >= self._flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Writes all rows that wait, so that readers see them; drops them if there is no room."""
        self._flushed_at = time.monotonic()
        try:
            if not self._is_broken:
                self._write()
        except FAILURES as error:
            self._warn(error)
        for rows in self._waiting.values():
            rows.clear()

    def _write(self) -> None:
        values = [column.nbytes for rows in self._waiting.values() for row in rows for column in row.values()]
        descriptor, length = self._file.id.get_vfd_handle(), self._file.id.get_filesize()
        offset = max(0, length - HOLES_BYTES)
        n_fields = sum(map(len, self._shapes.values()))
        reserve(descriptor, offset, length - offset + 2 * sum(values) + BYTES_PER_FIELD * n_fields)
        self._is_broken = True  # if what follows raises
        for table, rows in self._waiting.items():
            if rows:
                for field in self._shapes[table]:
                    column = self._file[f"{table}/{field}"]
                    n = len(column)
                    column.resize(n + len(rows), axis=0)
                    column[n:] = np.stack([row[field] for row in rows])
        self._file.flush()  # the file and not each dataset: this notes its length, so that readers know a cut file
        os.ftruncate(descriptor, self._file.id.get_filesize())
        self._is_broken = False

    def _warn(self, error: Exception) -> None:
        if not self._has_warned:
            text = " ".join(f"rows of {self._path} are lost, as it cannot be written ({reason(error)})".split())
            print(f"mpitrain: warning: {text}", file=sys.stderr, flush=True)
        self._has_warned = True

    def truncate_after(self, table: str, column: str, value: float) -> None:
        """Drops the rows of `table` whose `column` is above `value` or NaN: what came after a checkpoint.

        Example:
            >>> for table in ("progress", "evaluation"):
            ...     metrics.truncate_after(table, "step", 1000)
        """
        if column not in self._shapes.get(table, {}):
            raise ValueError(f"{self._path} has no column {table}/{column}")
        self.flush()
        rows = _read(self._file)
        within = rows[table][column] <= value
        rows[table] = {field: entries[within] for field, entries in rows[table].items()}
        self._file.close()
        self._start(rows)

    def close(self) -> None:
        """Writes what waits and closes the file; more than once does no harm."""
        if self._file:
            self.flush()
            if not self._is_broken:
                self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def reserve(descriptor: int, offset: int, n_bytes: int) -> None:
    """Takes room for a part of a file, which becomes as long.

    Raises:
        OSError: if there is none.
    """
    try:
        os.posix_fallocate(descriptor, offset, n_bytes)
    except OSError as error:
        if error.errno not in CANNOT_RESERVE:
            raise


def read_metrics(path: str | os.PathLike[str]) -> dict[str, dict[str, Column]]:
    """All tables of a metrics file, whether its writer is at work, has finished or was killed.

    Returns:
        table -> field -> float64 array of shape (rows,) or (rows, k), with the same number of rows for all fields of a
        table.

    Raises:
        UsageError: if the file is missing or cannot be read as metrics.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path} does not exist: give the folder of a run that has written metrics")
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with _open(path) as file:
                return _read(file)
        except (
            OSError,
            RuntimeError,
            KeyError,
            AttributeError,
            TypeError,
            ValueError,
        ) as error:
            if attempt == ATTEMPTS:
                raise UsageError(
                    f"{path} cannot be read as metrics ({error}): it is damaged or another kind of file; move it away"
                ) from error
            time.sleep(PAUSE_SECONDS)
    raise AssertionError("unreachable")


def _open(path: Path) -> Any:
    """`h5py.File(path, "r", swmr=True, locking=LOCKING)` that raises OSError, and soon, for a damaged file."""
    with path.open("rb") as file:
        superblock = file.read(36)  # version at byte 8, in version 3 the end of the file at byte 28
        length = file.seek(0, os.SEEK_END)
    if superblock[8:9] == b"\3" and int.from_bytes(superblock[28:36], "little") > length:
        raise OSError(f"it was cut off after {length} bytes")
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_libver_bounds(h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_LATEST)
    access.set_file_locking(LOCKING, True)  # and ignore that they may be disabled
    with contextlib.suppress(
        OSError, AttributeError
    ):  # no such symbol: HDF5 is linked in another way, and tries longer
        # Looked up through h5py's own module, so that it is the HDF5 which h5py uses.
        set_attempts = ctypes.PyDLL(h5py.h5p.__file__).H5Pset_metadata_read_attempts
        set_attempts.argtypes = [ctypes.c_int64, ctypes.c_uint]
        set_attempts(access.id, HDF5_ATTEMPTS)
    flags = h5py.h5f.ACC_RDONLY | h5py.h5f.ACC_SWMR_READ
    return h5py.File(h5py.h5f.open(os.fsencode(path), flags, fapl=access))


def _read(file: Any) -> dict[str, dict[str, Column]]:
    tables = {}
    for table, group in file.items():
        columns = {field: np.asarray(dataset[:], dtype=np.float64) for field, dataset in group.items()}
        n = min((len(column) for column in columns.values()), default=0)
        tables[table] = {field: column[:n] for field, column in columns.items()}
    return tables
