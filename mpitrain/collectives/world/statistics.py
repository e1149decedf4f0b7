"""Counters of one worker: bytes, exchanges, waiting times, staleness."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mpitrain.collectives.world.phases import recorder

SHARES = ("compute", "exchange", "waiting")
"""Shares of a worker's time; the rest is evaluation, checkpoints and loading."""

STALENESS_BINS = 33
"""Bins 0..31 count exactly, the last one everything above 31."""

DISTANCE_BINS = 33
SMALLEST_DISTANCE_EXPONENT = -23
"""Bin k counts distances from 2^(k-24) to 2^(k-23): the first has everything below 2^-23, the last all above 2^8."""


@dataclass
class Statistics:
    """The counters of one worker, which only grow.

    Attributes:
        bytes_sent: The communication volume of the method: the bytes of vectors that were pulled from or pushed to
            others. Exchanges within a node count, evaluations do not.
        wire_bytes: The bytes that this worker has moved between nodes for any purpose.
        n_exchanges: The number of exchanges, such as an all-reduce, a visit to the center (the vector that all
            workers share) or a gossip message.
        n_nonfinite: The number of non-finite elements that were kept out of shared vectors. On a GPU, it is a
            ``NonfiniteCount``, which ``int`` converts.
        n_clipped: The number of displacements that were scaled because they exceeded ``clip_displacement``.
        wait_seconds: The time spent waiting for locks and for peers in a collective.
        lock_wait_seconds: The part of ``wait_seconds`` spent waiting for locks.
        staleness: (33,) a histogram of visits to the center, by the number of updates by others since the last visit.
        staleness_distance: (33,) a histogram of visits to the center, by the distance that the center has moved since
            the last visit. The bins are powers of two (Hermans, CERN-THESIS-2017-103, section 4.2).
    """

    bytes_sent: int = 0
    wire_bytes: int = 0
    n_exchanges: int = 0
    n_nonfinite: int = 0
    n_clipped: int = 0
    wait_seconds: float = 0.0
    lock_wait_seconds: float = 0.0
    staleness: np.ndarray = field(default_factory=lambda: np.zeros(STALENESS_BINS, np.int64))
    staleness_distance: np.ndarray = field(default_factory=lambda: np.zeros(DISTANCE_BINS, np.int64))

    def numbers(self) -> dict[str, Any]:
        """Return a copy of all counters by name."""
        return copy.deepcopy({**vars(self), "n_nonfinite": int(self.n_nonfinite)})

    def add_wait(self, began: float) -> None:
        """Count the time since ``began``, by ``time.perf_counter``, as waiting."""
        ended = time.perf_counter()
        self.wait_seconds += ended - began
        if recorder.is_on:
            recorder.add_wait(began, ended)

    def add_lock_wait(self, seconds: float) -> None:
        """Count a wait for a lock that has just ended; 0 if the lock was free."""
        if seconds:
            self.wait_seconds += seconds
            self.lock_wait_seconds += seconds
            if recorder.is_on:
                ended = time.perf_counter()
                recorder.add_wait(ended - seconds, ended)

    def record_staleness(self, n_updates: int, distance: float) -> None:
        """Count a visit after ``n_updates`` updates by others that have moved the center by ``distance``."""
        self.staleness[n_updates if n_updates < STALENESS_BINS else -1] += 1
        self.staleness_distance[distance_bin(distance) if distance > 0 else 0] += 1


def distance_bin(distance: float) -> int:
    """Return the bin of a distance in the histogram ``staleness_distance``."""
    if not distance > 0:
        return 0
    exponent = math.frexp(distance)[1]  # 2^(exponent - 1) <= distance < 2^exponent
    return min(max(exponent - SMALLEST_DISTANCE_EXPONENT, 0), DISTANCE_BINS - 1)
