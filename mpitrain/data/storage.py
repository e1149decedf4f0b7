"""Storage of the images of a data set, chosen by size.

  shared    Once per node, in memory that all its ranks see; each rank reads 1/local_size of the file. This is the first
            choice for both modes of sampling: on one node it takes no more memory than private shards would, and every
            sample is available.
  private   In the memory of this rank. This is used for a file that does not fit into shared memory, if sampling is
            sharded. The rank then stores its shard of n/p samples. `stage` reads it in one sweep through the file at
            the start of each epoch, because shards change with the epoch (see `sampler.py`). Built-in data that are
            tiny or do not fit into shared memory are also private. Each rank then stores all of them.
  file      Only in the file: every batch is read in the order of the file, adjacent rows in one read.

Data fits if it takes at most half of the free memory. Images are selected by index from any storage, so different nodes
may use different storages.
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
MAX_GAP_BYTES = 2**16  # rows closer than this are read at once: a read call costs as much as copying about 64 KiB
MAX_READ_BYTES = 2**24  # the most that one call reads


@dataclass(frozen=True)
class Limits:
    """The memory that data may occupy on this node."""

    shared_bytes: int  # node-shared
    private_bytes: int  # of all ranks of the node together

    @classmethod
    def measure(cls) -> "Limits":
        """Return half of the free memory, taking the limit of this process's control group into account."""
        memory_bytes = _free_memory_bytes()
        try:
            shm = os.statvfs("/dev/shm")
            shared_bytes = min(shm.f_bavail * shm.f_frsize, memory_bytes)
        except OSError:  # without this file system, shared memory is ordinary memory
            shared_bytes = memory_bytes
        return cls(shared_bytes // 2, memory_bytes // 2)


def choose(total_bytes: int, *, sampling: str, size: int, local_size: int, limits: Limits) -> str:
    """Choose where the training images of a file are stored. Pure.

    Args:
        total_bytes: The size of all images and labels.
        sampling: "independent", "sharded" or "dirichlet:ALPHA".
        size: The number of ranks.
        local_size: The number of ranks on this node.
        limits: The memory that the data may occupy.
    """
    if total_bytes <= limits.shared_bytes:
        return "shared"
    if sampling != "independent" and -(-total_bytes // size) * local_size <= limits.private_bytes:
        return "private"
    return "file"


def share_of(n: int, index: int, count: int, align: int = 1) -> tuple[int, int]:
    """Divide rows among `count` ranks, and return the rows [start, stop) of rank `index`.

    The bounds are multiples of `align`, so that no chunk of the file is read twice.
    """
    n_blocks = -(-n // align)
    return min(n_blocks * index // count * align, n), min(n_blocks * (index + 1) // count * align, n)


def runs(indices: NDArray[np.int64], *, max_gap: int, max_length: int) -> Iterator[tuple[int, int]]:
    """Divide sorted indices into runs [i, j); the rows of a run are read in one operation.

    Adjacent indices in a run differ by at most `max_gap`, and a run spans at most `max_length` rows.
    """
    starts = np.concatenate([[0], np.flatnonzero(np.diff(indices) > max_gap) + 1, [len(indices)]])
    for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        while start < stop:
            cut = min(stop, int(np.searchsorted(indices, indices[start] + max_length)))
            yield start, cut
            start = cut


class Images(Protocol):
    """Images (n, C, H, W) or (n, d), in uint8 or float32, wherever they are stored."""

    def select(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """Return a new array of the images at `indices`, in that order. Local."""
        ...

    def stage(self, indices: NDArray[np.int64]) -> None:
        """Prepare for the selection of these images. Local."""
        ...


class MemoryImages:
    """Images in one array."""

    def __init__(self, array: NDArray[Any]) -> None:
        self.array = array

    def select(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """See `Images.select`. Local."""
        images: NDArray[Any] = self.array[indices]
        return images

    def stage(self, indices: NDArray[np.int64]) -> None:
        """Do nothing. Local."""


class FileImages:
    """Images in a dataset of an HDF5 file.

    Args:
        source: (n, ...) the HDF5 dataset.
        staging: Whether `stage` reads images into private memory.
    """

    def __init__(self, source: h5py.Dataset, *, staging: bool = False) -> None:
        self.source = source
        self.staging = staging
        self._staged = np.empty(0, np.int64)  # sorted
        self._buffer: NDArray[Any] = np.empty((0, *source.shape[1:]), source.dtype)  # the images at _staged

    def select(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """Select images from private memory if all of them are there, else from the file. Local."""
        if len(self._staged):
            places = np.minimum(np.searchsorted(self._staged, indices), len(self._staged) - 1)
            if (self._staged[places] == indices).all():
                images: NDArray[Any] = self._buffer[places]
                return images
        images = np.empty((len(indices), *self.source.shape[1:]), self.source.dtype)
        self._read(indices, np.argsort(indices, kind="stable"), images)
        return images

    def stage(self, indices: NDArray[np.int64]) -> None:
        """Read images into private memory; they replace those of the previous call. Local."""
        if not self.staging:
            return
        staged = np.unique(indices)
        if np.array_equal(staged, self._staged):
            return
        self._staged = np.empty(0, np.int64)  # a failed read leaves a buffer that is partly new
        if len(staged) != len(self._buffer):
            self._buffer = np.empty((len(staged), *self.source.shape[1:]), self.source.dtype)
        self._read(staged, np.arange(len(staged)), self._buffer)
        self._staged = staged

    def _read(self, indices: NDArray[np.int64], order: NDArray[np.int64], out: NDArray[Any]) -> None:
        """Read image indices[k] into out[k], in the `order` that sorts the indices."""
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
            rows = rows[ascending[i:j] - low]
            if rows.dtype.kind == "f" and not np.isfinite(rows).all():
                bad = int(ascending[i:j][~np.isfinite(rows).reshape(len(rows), -1).all(axis=1)][0])
                raise UsageError(
                    f"{self.source.file.filename}: {self.source.name.lstrip('/')}[{bad}] has NaN or infinity: "
                    "remove the image, or replace the value"
                )
            out[order[i:j]] = rows


def _free_memory_bytes() -> int:
    """Return the memory that this process may still allocate."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        free = _numbers(Path("/proc/meminfo"))["MemAvailable:"] * 2**10
        own = Path("/sys/fs/cgroup") / Path("/proc/self/cgroup").read_text().strip().rpartition(":")[2].lstrip("/")
    except (OSError, ValueError, KeyError):
        return free
    for group in (own, *own.parents):  # the limit of a job may be set on a parent of its task's group
        try:
            limit, used = int((group / "memory.max").read_text()), int((group / "memory.current").read_text())
            stat = _numbers(group / "memory.stat")
        except (OSError, ValueError):  # no group, or "max"
            continue
        cached = stat.get("active_file", 0) + stat.get("inactive_file", 0)  # counted as used, but freed on demand
        free = min(free, max(0, limit - used + cached))
    return free


def _numbers(path: Path) -> dict[str, int]:
    """Parse a file of lines `name number ...`."""
    return {line.split()[0]: int(line.split()[1]) for line in path.read_text().splitlines() if line.strip()}
