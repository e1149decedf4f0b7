"""The newest events of one rank, in a file of a fixed size that survives the death of its process.

header (128 bytes)    magic, rank, room, number of events so far, clock offset at the beginning and at the end
room x 24 bytes       phase, began, ended: float64; the oldest events are overwritten
"""

from __future__ import annotations

import math
import os
import struct
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpitrain.collectives.world.clock_offset import ClockOffset
from mpitrain.records.durable import reserve

MAGIC = b"mpitrac1"
HEADER = struct.Struct("<8s3q6d")
HEADER_BYTES = 128
EVENT_BYTES = 24


class EventRing:
    """The writer of a ring. All methods are Local.

    Args:
        path: The file, which is created or replaced.
        rank: This rank.
        room: The number of events that the file holds.

    Raises:
        OSError: The file cannot be written, or there is no room for it on the disk.
    """

    def __init__(self, path: Path, rank: int, room: int) -> None:
        self._rank, self._room, self._n = rank, room, 0
        self._offsets: list[ClockOffset | None] = [None, None]
        path.unlink(missing_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        reserve(self._file, 0, HEADER_BYTES + room * EVENT_BYTES)
        self._write_header()

    def set_offset(self, which: int, offset: ClockOffset | None) -> None:
        """Store the clock offset at the beginning (0) or at the end (1)."""
        self._offsets[which] = offset
        self._write_header()

    def append(self, events: array[float]) -> None:
        """Append events: phase, began and ended of each."""
        content, at = memoryview(events.tobytes()), 0
        while at < len(content):
            slot = self._n % self._room
            piece = content[at : at + (self._room - slot) * EVENT_BYTES]
            os.pwrite(self._file, piece, HEADER_BYTES + slot * EVENT_BYTES)
            self._n += len(piece) // EVENT_BYTES
            at += len(piece)
        self._write_header()

    def _write_header(self) -> None:
        numbers = []
        for offset in self._offsets:
            known = offset or ClockOffset(math.nan, math.nan, math.nan)
            numbers += [known.at, known.seconds, known.error_seconds]
        os.pwrite(self._file, HEADER.pack(MAGIC, self._rank, self._room, self._n, *numbers), 0)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


@dataclass(frozen=True)
class Events:
    """The contents of a ring.

    Attributes:
        rank: The rank.
        phases: (n,) the phase of each event.
        began, ended: (n,) the times by the clock of the rank, in seconds.
        n_dropped: The number of older events that were overwritten.
        first, last: The clock offsets at the beginning and at the end; None if they were not measured.
    """

    rank: int
    phases: np.ndarray
    began: np.ndarray
    ended: np.ndarray
    n_dropped: int
    first: ClockOffset | None
    last: ClockOffset | None


def read(path: Path) -> Events:
    """Return the events of a file, the oldest first.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is not a ring.
    """
    content = path.read_bytes()
    if len(content) < HEADER_BYTES or content[:8] != MAGIC:
        raise ValueError(f"{path} holds no events")
    _, rank, room, n, *numbers = HEADER.unpack_from(content)
    held = min(n, room, (len(content) - HEADER_BYTES) // EVENT_BYTES)
    table = np.frombuffer(content, np.float64, held * 3, HEADER_BYTES).reshape(held, 3)
    if n > held:
        table = np.roll(table, -(n % held), axis=0)
    first, last = (None if math.isnan(one[0]) else ClockOffset(*one) for one in (numbers[:3], numbers[3:]))
    return Events(rank, table[:, 0].astype(np.int64), table[:, 1], table[:, 2], n - held, first, last)
