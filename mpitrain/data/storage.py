"""Where the images of a data set are kept, chosen by size.

  shared    Once per node, in memory that all its ranks see; every rank reads its 1/local_size of it. The first choice
            for either way of sampling: on one node it takes no more memory than private shards would, and any index is
            at hand.
  private   In this rank's own memory. For a file that does not fit into shared memory, with sharded sampling: the shard
            of the epoch, n/p samples, which `stage` reads in one sweep through the file at the start of each epoch
            (shards change with the epoch, see `sampler.py`). Built-in data that is tiny or does not fit into shared
            memory is private too, as a whole.
  file      Nowhere: every batch is read from the file, in the order of the file, neighbours in one read.

"Fits" means half of what is free. A rank asks for indices and gets images, whatever the storage, so that nodes may
choose differently.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
from numpy.typing import NDArray

from mpitrain.errors import UsageError

STORAGES = ("shared", "private", "file")
MAX_GAP_BYTES = 2**16  # rows nearer than this are read in one go: a read call costs about as much as 64 KiB of copying
MAX_READ_BYTES = 2**24  # what one read call brings in at most


@dataclass(frozen=True)
class Limits:
    """How much memory data may take on this node."""

    shared_bytes: int  # node-shared
    private_bytes: int  # of all ranks of the node together

    @classmethod
    def measure(cls) -> "Limits":
        """Half of what is free now; memory that this process's control group does not allow is not free."""
        memory_bytes = _free_memory_bytes()
        try:
            shm = os.statvfs("/dev/shm")
            shared_bytes = min(shm.f_bavail * shm.f_frsize, memory_bytes)
        except OSError:  # no such file system: shared memory is ordinary memory
            shared_bytes = memory_bytes
        return cls(shared_bytes // 2, memory_bytes // 2)


def choose(total_bytes: int, *, sampling: str, size: int, local_size: int, limits: Limits) -> str:
    """The storage of a file's training images: pure.

    Args:
        total_bytes: All images and labels of the file.
        sampling: "independent" or "sharded".
        size: Ranks of the world.
        local_size: Ranks of this node.
        limits: What fits.
    """
    if total_bytes <= limits.shared_bytes:
        return "shared"
    if sampling == "sharded" and -(-total_bytes // size) * local_size <= limits.private_bytes:
        return "private"
    return "file"


def share_of(n: int, index: int, count: int, align: int = 1) -> tuple[int, int]:
    """Rows [start, stop) of rank `index` of `count`; bounds are multiples of `align`, so no chunk is read twice."""
    n_blocks = -(-n // align)
    return min(n_blocks * index // count * align, n), min(n_blocks * (index + 1) // count * align, n)


def runs(indices: NDArray[np.int64], *, max_gap: int, max_length: int) -> Iterator[tuple[int, int]]:
    """Cuts sorted indices into stretches [i, j) whose rows are read at once.

    Neighbours within a stretch are at most `max_gap` rows apart, and a stretch spans at most `max_length` rows.
    """
    starts = np.concatenate([[0], np.flatnonzero(np.diff(indices) > max_gap) + 1, [len(indices)]])
    for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        while start < stop:
            cut = min(stop, int(np.searchsorted(indices, indices[start] + max_length)))
            yield start, cut
            start = cut


class Images(Protocol):
    """(n, C, H, W) or (n, d), uint8 or float32, somewhere."""

    def select(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """Local: a new array of the images at `indices`, in that order."""
        ...

    def stage(self, indices: NDArray[np.int64]) -> None:
        """Local: these are needed soon."""
        ...


class MemoryImages:
    """Images in one array."""

    def __init__(self, array: NDArray[Any]) -> None:
        self.array = array

    def select(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """Local: see `Images`."""
        images: NDArray[Any] = self.array[indices]
        return images

    def stage(self, indices: NDArray[np.int64]) -> None:
        """Local: nothing to do."""


class FileImages:
    """Images in a data set of an HDF5 file.

    Args:
        source: (n, ...) the HDF5 data set.
        staging: Whether `stage` keeps what it is told in private memory.
    """

    def __init__(self, source: h5py.Dataset, *, staging: bool = False) -> None:
        self.source = source
        self.staging = staging
        self._staged = np.empty(0, np.int64)  # sorted
        self._buffer: NDArray[Any] = np.empty((0, *source.shape[1:]), source.dtype)  # the images at _staged

    def select(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """Local: see `Images`; from private memory if all are staged, else from the file."""
        if len(self._staged):
            places = np.minimum(np.searchsorted(self._staged, indices), len(self._staged) - 1)
            if (self._staged[places] == indices).all():
                images: NDArray[Any] = self._buffer[places]
                return images
        images = np.empty((len(indices), *self.source.shape[1:]), self.source.dtype)
        self._read(indices, np.argsort(indices, kind="stable"), images)
        return images

    def stage(self, indices: NDArray[np.int64]) -> None:
        """Local: reads these into private memory, in place of what was there."""
        if not self.staging:
            return
        staged = np.unique(indices)
        if np.array_equal(staged, self._staged):
            return
        self._staged = np.empty(0, np.int64)  # a failed read must not leave a buffer that is half new
        if len(staged) != len(self._buffer):
            self._buffer = np.empty((len(staged), *self.source.shape[1:]), self.source.dtype)
        self._read(staged, np.arange(len(staged)), self._buffer)
        self._staged = staged

    def _read(self, indices: NDArray[np.int64], order: NDArray[np.int64], out: NDArray[Any]) -> None:
        """out[k] = image indices[k], read in `order`, which sorts the indices."""
        ascending = indices[order]
        row_bytes = math.prod(self.source.shape[1:]) * self.source.dtype.itemsize
        max_gap, max_length = max(1, MAX_GAP_BYTES // row_bytes), max(1, MAX_READ_BYTES // row_bytes)
        for i, j in runs(ascending, max_gap=max_gap, max_length=max_length):
            low, high = int(ascending[i]), int(ascending[j - 1]) + 1
            try:
                rows = self.source[low:high]
            except OSError as error:
                raise UsageError(
                    f"{self.source.file.filename}: images {low} to {high - 1} cannot be read ({error}): the file was "
                    "changed or damaged; restore it and resume"
                ) from error
            out[order[i:j]] = rows[ascending[i:j] - low]


def _free_memory_bytes() -> int:
    """Memory that this process may still take."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        free = _numbers(Path("/proc/meminfo"))["MemAvailable:"] * 2**10
        own = Path("/sys/fs/cgroup") / Path("/proc/self/cgroup").read_text().strip().rpartition(":")[2].lstrip("/")
    except (OSError, ValueError, KeyError):
        return free
    for group in (own, *own.parents):  # a job's limit may stand above the group of its task
        try:
            limit, used = int((group / "memory.max").read_text()), int((group / "memory.current").read_text())
            stat = _numbers(group / "memory.stat")
        except (OSError, ValueError):  # no group, or "max"
            continue
        cached = stat.get("active_file", 0) + stat.get("inactive_file", 0)  # counted as used, but given up when needed
        free = min(free, max(0, limit - used + cached))
    return free


def _numbers(path: Path) -> dict[str, int]:
    """A file of lines `name number ...`."""
    return {line.split()[0]: int(line.split()[1]) for line in path.read_text().splitlines() if line.strip()}
