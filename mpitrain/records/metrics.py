"""Tables of numbers that grow during a run, in one HDF5 file that any process may read at the same time.

    metrics.h5:  /progress/seconds (rows,)  /progress/loss (rows,) ...  /staleness/histogram (rows, 33)    all float64

The format is HDF5's single writer, multiple readers (SWMR; The HDF Group, "HDF5 Single-writer/Multiple-reader User's
Guide"): all datasets are created before that mode is switched on, and only grow afterwards. The behaviour of HDF5 2.0
decides the rest:

- A file whose writer is alive, or was killed, opens for reading with `swmr=True` and in no other way. A writer killed
  at any moment leaves a readable file, but its columns may differ in length: a table is as long as its shortest column.
- A killed writer leaves the file marked as open for writing, and HDF5 then refuses to write to it (h5clear, which
  clears the mark, is not in the wheels). Continuing a file therefore means reading it and writing a new one, which
  replaces it in one rename. Rows are dropped and fields are added to a table in the same way.
- A new file is built under another name and renamed only once SWMR is on, so that `path` can always be read.
- A reader retries metadata that it finds incomplete, by default 100 times, with pauses that double from a nanosecond.
  On a damaged file, for example after a crash of the machine, this would never end. Readers here make 25 attempts,
  which take about 50 ms. h5py has no function for this setting. A truncated file reads as zeros beyond its end, so its
  length is compared with the length that is recorded in the file.
- No file locks are requested: a run has one writer (`trainer.runlock`), and HDF5 fails on network file systems without
  working locks. If one process opens a file twice, both must have the same setting, or HDF5 refuses the second. The
  environment variable HDF5_USE_FILE_LOCKING overrides this.
- A write that fails (a full disk) leaves HDF5 in a state in which it crashes, at the latest when the process ends. Room
  is therefore reserved in the file system before rows are passed to HDF5. Rows without room are dropped, with one
  warning, and training continues. After any other failure, the open file is replaced with memory without notice to
  HDF5, so that it can be closed, and the run records no more metrics.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np
from numpy.typing import ArrayLike, NDArray

from mpitrain.errors import UsageError, reason
from mpitrain.log import logger
from mpitrain.records.durable import reserve
from mpitrain.records.hdf5_guard import ERRORS, check_contents

Column = NDArray[np.float64]
Field = str | tuple[str, tuple[int, ...]]  # a name, or a name and the shape of its entry in a row
Tables = Mapping[str, Sequence[Field]]

LOCKING = False
LIBVER = "v110"  # the oldest format with SWMR, which the most tools can read
ROWS_PER_CHUNK = 256
HDF5_ATTEMPTS = 25  # to read a piece of metadata, see above
ATTEMPTS = 3  # to read the file: network file systems, unlike local ones, may reorder writes
PAUSE_SECONDS = 0.1
FAILURES = (OSError, RuntimeError, KeyError)
"""Errors of h5py when a file cannot be written: closing it raises RuntimeError, access to a part of it KeyError."""
BYTES_PER_FIELD = 8192  # more than a new chunk of a column and its index entry take
HOLES_BYTES = 2**20  # the end of a file, which may have holes where HDF5 has not written yet


class MetricsWriter:
    """The only writer of a metrics file. It appends rows to tables, and continues an existing file.

    Writing a row of 13 fields takes a millisecond. Rows are therefore buffered, and written together at intervals of at
    least `flush_seconds`. A killed writer loses its buffered rows.

    Example:
        >>> tables = {"progress": ["step", "loss"], "staleness": ["step", ("histogram", (33,))]}
        >>> with MetricsWriter(path, tables) as metrics:
        ...     metrics.append("progress", step=1, loss=2.3)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        tables: Tables,
        *,
        flush_seconds: float = 1.0,
        per_worker: Collection[str] = (),
    ) -> None:
        """Open or create a file with the given tables. Rows and further fields of an existing file are kept.

        Args:
            path: The HDF5 file; its folder must exist.
            tables: The fields of each table; a field with a shape, as in `("histogram", (33,))`, has an array in each
                row.
            flush_seconds: The shortest time between two writes; with 0 every row is written at once.
            per_worker: Tables whose entries have one element per worker. If existing rows have another number of
                workers, the larger number is used, and the shorter entries end in NaN.

        Raises:
            UsageError: The file cannot be read, or its fields have other shapes.
        """
        self._path = Path(path)
        self._has_warned = self._is_broken = False
        self._flush_seconds, self._per_worker = flush_seconds, per_worker
        self._shapes = {
            table: dict((field, ()) if isinstance(field, str) else field for field in fields)
            for table, fields in tables.items()
        }
        rows = read_metrics(path) if self._path.exists() else {}
        for table, columns in rows.items():
            shapes = self._shapes.setdefault(table, {})
            for field, column in columns.items():
                there, here = column.shape[1:], shapes.setdefault(field, column.shape[1:])
                if table in per_worker and here and there[1:] == here[1:]:
                    shapes[field] = (max(there[0], here[0]), *here[1:])
                elif there != here:
                    raise UsageError(
                        f"{self._path}: {table}/{field} has entries of shape {there}, not {here}: "
                        "it was written by another version; move it away to start a new one"
                    )
        self._start(rows)

    def _start(self, rows: Mapping[str, Mapping[str, Column]]) -> None:
        """Replace the file at `path` by a new one with these rows, and leave that open for appending."""
        building = self._path.with_name(f"{self._path.name}.building")
        building.unlink(missing_ok=True)  # left by a writer killed while it built the file
        n_fields = sum(map(len, self._shapes.values()))
        n_bytes = sum(column.nbytes for columns in rows.values() for column in columns.values())
        try:
            with building.open("wb") as file:
                reserve(file.fileno(), 0, 2 * n_bytes + BYTES_PER_FIELD * n_fields)
            self._file = h5py.File(building, "w", libver=LIBVER, locking=LOCKING)
            self._is_broken = True  # if one of the following calls raises
            self._columns: dict[tuple[str, str], Any] = {}
            self._create_tables(rows)
            self._file.swmr_mode = True
            os.replace(building, self._path)
            self._is_broken = False
        except FAILURES:
            with contextlib.suppress(OSError):
                building.unlink(missing_ok=True)
            if self._is_broken:
                self._close_broken()
            raise
        self._waiting: dict[str, list[dict[str, Column]]] = {table: [] for table in self._shapes}
        self._flushed_at = -math.inf

    def _create_tables(self, rows: Mapping[str, Mapping[str, Column]]) -> None:
        """Create all columns, with the rows that there are."""
        for table, shapes in self._shapes.items():
            old = rows.get(table, {})
            n = max((len(column) for column in old.values()), default=0)
            for field, shape in shapes.items():
                # Kept open: HDF5 may crash when it closes a column that it could not write.
                self._columns[table, field] = self._file.create_dataset(
                    f"{table}/{field}",
                    data=_widened(old.get(field, np.full((n, *shape), np.nan)), (-1, *shape)),
                    dtype=np.float64,
                    maxshape=(None, *shape),
                    chunks=(max(1, ROWS_PER_CHUNK // math.prod(shape)), *shape),
                    fillvalue=np.nan,
                )

    def append(self, table: str, **values: ArrayLike) -> None:
        """Append one row; fields without a value are NaN.

        Raises:
            ValueError: The table or a field is unknown, a value has the wrong shape, or the writer is closed.
        """
        shapes = self._shapes.get(table)
        if shapes is None:
            raise ValueError(f"no table is called {table!r}; there are {', '.join(self._shapes)}")
        if unknown := values.keys() - shapes.keys():
            raise ValueError(f"table {table} has no field {', '.join(sorted(unknown))}; it has {', '.join(shapes)}")
        if not self._file and not self._is_broken:
            raise ValueError(f"{self._path} is closed")
        row = {}
        for field, shape in shapes.items():
            row[field] = np.array(values.get(field, np.full(shape, np.nan)), dtype=np.float64)
            if table in self._per_worker:
                row[field] = _widened(row[field], shape)
            if row[field].shape != shape:
                raise ValueError(f"{table}/{field} takes values of shape {shape}, not {row[field].shape}")
        self._waiting[table].append(row)
        if time.monotonic() - self._flushed_at >= self._flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Write all buffered rows, so that readers see them. If the disk is full, the rows are lost."""
        self._flushed_at = time.monotonic()
        try:
            if not self._is_broken:
                self._write()
        except FAILURES as error:
            self._warn(error)
            if self._is_broken:
                self._close_broken()
        for rows in self._waiting.values():
            rows.clear()

    def _write(self) -> None:
        values = [column.nbytes for rows in self._waiting.values() for row in rows for column in row.values()]
        descriptor, length = self._file.id.get_vfd_handle(), self._file.id.get_filesize()
        offset = max(0, length - HOLES_BYTES)
        n_fields = sum(map(len, self._shapes.values()))
        reserve(descriptor, offset, length - offset + 2 * sum(values) + BYTES_PER_FIELD * n_fields)
        self._is_broken = True  # if one of the following calls raises
        for table, rows in self._waiting.items():
            if rows:
                for field in self._shapes[table]:
                    column = self._columns[table, field]
                    n = len(column)
                    column.resize(n + len(rows), axis=0)
                    column[n:] = np.stack([row[field] for row in rows])
        self._file.flush()  # of the file, not of each dataset: it notes the length by which readers detect truncation
        os.ftruncate(descriptor, self._file.id.get_filesize())
        self._is_broken = False

    def _close_broken(self) -> None:
        """Close the file after a write has failed: HDF5 writes the rest of it to memory, and does not crash."""
        memory = os.memfd_create("mpitrain-metrics")
        try:
            descriptor = self._file.id.get_vfd_handle()
            with contextlib.suppress(OSError):
                os.write(memory, os.pread(descriptor, os.fstat(descriptor).st_size, 0))
            os.dup2(memory, descriptor, inheritable=False)
            self._columns.clear()
            self._file.close()
        except FAILURES:
            pass
        finally:
            os.close(memory)

    def _warn(self, error: Exception) -> None:
        if not self._has_warned:
            logger.warning("rows of %s are lost because it cannot be written (%s)", self._path, reason(error))
        self._has_warned = True

    def truncate_after(self, table: str, column: str, value: float) -> None:
        """Remove the rows of `table` in which `column` is above `value` or NaN, such as those after a checkpoint.

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
        """Write the buffered rows and close the file; a second call does nothing."""
        if self._file:
            self.flush()
            if self._file:
                self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _widened(values: Column, shape: tuple[int, ...]) -> Column:
    """Return an array with NaN behind its elements, where ``shape`` is longer along one axis; -1 is any length."""
    missing = [(0, max(0, n - have)) for have, n in zip(values.shape, shape, strict=False)]
    if len(missing) != values.ndim or not any(n for _, n in missing):
        return values
    return np.pad(values, missing, constant_values=np.nan)


def read_metrics(path: str | os.PathLike[str]) -> dict[str, dict[str, Column]]:
    """Return all tables of a metrics file. Its writer may still be running.

    Returns:
        A dictionary from tables to fields to float64 arrays (rows,) or (rows, k). All fields of a table have the same
        number of rows.

    Raises:
        UsageError: The file is missing or cannot be read as metrics.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path} does not exist: give the folder of a run that has written metrics")
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with _open(path) as file:
                check_contents(file)
                return _read(file)
        except (*ERRORS, MemoryError) as error:
            if attempt == ATTEMPTS:
                raise UsageError(
                    f"{path} cannot be read as metrics ({reason(error)}): it is damaged or another kind of file; move "
                    "it away"
                ) from error
            time.sleep(PAUSE_SECONDS)
    raise AssertionError("unreachable")


def _open(path: Path) -> Any:
    """Open a file as `h5py.File(path, "r", swmr=True, locking=LOCKING)`, but fail on a damaged file within seconds."""
    with path.open("rb") as file:
        superblock = file.read(36)  # version at byte 8, in version 3 the end of the file at byte 28
        length = file.seek(0, os.SEEK_END)
    if superblock[8:9] == b"\3" and int.from_bytes(superblock[28:36], "little") > length:
        raise OSError(f"it was truncated to {length} bytes")
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_libver_bounds(h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_LATEST)
    access.set_file_locking(LOCKING, True)  # and ignore that they may be disabled
    with contextlib.suppress(OSError, AttributeError):  # HDF5 is linked in another way: it retries longer
        # The symbol is looked up through h5py's own module, to find the HDF5 that h5py uses.
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
