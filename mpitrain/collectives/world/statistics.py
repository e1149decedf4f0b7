"""Counters of one worker: bytes, exchanges, waiting times, staleness."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

SHARES = ("compute", "exchange", "waiting")
"""Shares of a worker's time; the rest is evaluation, checkpoints and loading."""

STALENESS_BINS = 33
"""Bins 0..31 count exactly, the last one everything above 31."""

DISTANCE_BINS = 33
SMALLEST_DISTANCE_EXPONENT = -23
"""Bin k counts distances from 2^(k-24) to 2^(k-23): the first has everything below 2^-23, the last all above 2^8."""


@dataclass
class Statistics:
    """Counters of one worker; they only grow.

    Attributes:
        bytes_sent: The communication volume of the method: bytes of vectors pulled from and pushed to others,
            whether they crossed a wire or were read in place in the memory of the node, without evaluation.
        wire_bytes: Bytes that this worker moved between nodes for any purpose.
        n_exchanges: Exchanges started (an all-reduce, a visit to the center, a gossip message).
        n_nonfinite: Non-finite elements kept out of shared vectors; on a GPU a ``cuda.NonfiniteCount``, which ``int``
            converts.
        n_clipped: Displacements that exceeded ``clip_displacement`` and were scaled.
        wait_seconds: Time spent waiting for locks and for peers to arrive at a collective.
        lock_wait_seconds: The part of ``wait_seconds`` spent waiting for locks.
        staleness: (33,) counts of visits to the center, by the number of updates by others since the last visit.
        staleness_distance: (33,) counts of visits, by the distance the center has moved since the last visit (Hermans,
            CERN-THESIS-2017-103, section 4.2), in powers of two.
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

    def record_staleness(self, n_updates: int, distance: float) -> None:
        """Count one visit that found ``n_updates`` updates by others, which moved the center by ``distance``."""
        self.staleness[min(n_updates, STALENESS_BINS - 1)] += 1
        self.staleness_distance[distance_bin(distance)] += 1


def distance_bin(distance: float) -> int:
    """Return the bin of a distance."""
    if not distance > 0:
        return 0
    exponent = math.frexp(distance)[1]  # 2^(exponent - 1) <= distance < 2^exponent
    return min(max(exponent - SMALLEST_DISTANCE_EXPONENT, 0), DISTANCE_BINS - 1)
