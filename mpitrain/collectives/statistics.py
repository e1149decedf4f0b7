"""What one worker has exchanged so far, and how long it waited for it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

STALENESS_BINS = 33
"""Bins 0..31 count exactly, the last one everything above."""


@dataclass
class Statistics:
    """Counters of one worker; they only grow.

    Attributes:
        bytes_sent: The communication volume of the method: bytes of vectors pulled from and pushed to others,
            whether they crossed a wire or were read in place in the memory of the node. Evaluation is not in it.
        wire_bytes: Bytes that this worker moved between nodes, for whatever purpose.
        n_exchanges: Exchanges begun (an all-reduce, a visit to the center, a gossip message).
        n_rejected: Non-finite elements that were kept out of a shared vector.
        wait_seconds: Time spent waiting for locks and for peers to arrive at a collective.
        staleness: (33,) counts, by how many updates of others lay between two visits to the center.
    """

    bytes_sent: int = 0
    wire_bytes: int = 0
    n_exchanges: int = 0
    n_rejected: int = 0
    wait_seconds: float = 0.0
    staleness: np.ndarray = field(default_factory=lambda: np.zeros(STALENESS_BINS, np.int64))

    def record_staleness(self, n_updates: int) -> None:
        """Count one visit that found ``n_updates`` updates of others."""
        self.staleness[min(n_updates, STALENESS_BINS - 1)] += 1
