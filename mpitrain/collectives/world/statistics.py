"""What one worker has exchanged so far, and how long it waited for it."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

SHARES = ("compute", "exchange", "waiting")
"""Where a worker's time goes; what is left is evaluation, checkpoints, loading."""

STALENESS_BINS = 33
"""Bins 0..31 count exactly, the last one everything above."""

DISTANCE_BINS = 33
SMALLEST_DISTANCE_EXPONENT = -23
"""Bin k counts distances from 2^(k-24) to 2^(k-23): the first has everything below 2^-23, the last all above 2^8."""


@dataclass
class Statistics:
    """Counters of one worker; they only grow.

    Attributes:
        bytes_sent: The communication volume of the method: bytes of vectors pulled from and pushed to others,
            whether they crossed a wire or were read in place in the memory of the node. Evaluation is not in it.
        wire_bytes: Bytes that this worker moved between nodes, for whatever purpose.
        n_exchanges: Exchanges begun (an all-reduce, a visit to the center, a gossip message).
        n_nonfinite: Non-finite elements that were kept out of a shared vector; on a GPU a
            ``cuda.NonfiniteCount``, which ``int`` makes a number.
        wait_seconds: Time spent waiting for locks and for peers to arrive at a collective.
        lock_wait_seconds: The part of it that was for locks.
        staleness: (33,) counts, by how many updates of others lay between two visits to the center.
        staleness_distance: (33,) counts, by how far the center has moved between the two (Hermans,
            CERN-THESIS-2017-103, section 4.2), in powers of two.
    """

    bytes_sent: int = 0
    wire_bytes: int = 0
    n_exchanges: int = 0
    n_nonfinite: int = 0
    wait_seconds: float = 0.0
    lock_wait_seconds: float = 0.0
    staleness: np.ndarray = field(default_factory=lambda: np.zeros(STALENESS_BINS, np.int64))
    staleness_distance: np.ndarray = field(default_factory=lambda: np.zeros(DISTANCE_BINS, np.int64))

    def numbers(self) -> dict[str, Any]:
        """All counters by name, as they are now."""
        return copy.deepcopy({**vars(self), "n_nonfinite": int(self.n_nonfinite)})

    def record_staleness(self, n_updates: int, distance: float) -> None:
        """Count one visit that found ``n_updates`` updates of others, which moved the center by ``distance``."""
        self.staleness[min(n_updates, STALENESS_BINS - 1)] += 1
        self.staleness_distance[distance_bin(distance)] += 1


def distance_bin(distance: float) -> int:
    """Where a distance is counted."""
    if not distance > 0:
        return 0
    exponent = math.frexp(distance)[1]  # 2^(exponent - 1) <= distance < 2^exponent
    return min(max(exponent - SMALLEST_DISTANCE_EXPONENT, 0), DISTANCE_BINS - 1)
