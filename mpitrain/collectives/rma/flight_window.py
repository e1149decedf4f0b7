"""How many bytes of a visit should be under way: as many as the link holds, its bandwidth-delay product."""

from __future__ import annotations

FEWEST_BYTES = 1 << 20
"""Fills links of a few milliseconds. More blocks under way than needed keep their locks longer."""

MOST_BYTES = 1 << 24
"""1 Gbit/s for 130 ms. It bounds the memory of the staging buffers, of which there are twice as many bytes."""

GAIN = 2.0
"""Times the bandwidth-delay product: a window that is too small doubles with each visit, as in TCP's slow start."""


class FlightWindow:
    """The number of bytes under way that fills a link, estimated from past visits.

    It is a multiple of the round-trip time times the bandwidth, as in BBR (Cardwell et al. 2016, doi
    10.1145/3012426.3022184). The round-trip time is the shortest that was measured. The bandwidth is the highest
    that a whole visit reached. If the window limits a visit, the measured bandwidth is the window divided by the round
    trip. The window therefore grows until the link is full.

    Attributes:
        n_bytes: The window, in bytes.
    """

    def __init__(self) -> None:
        self.n_bytes = FEWEST_BYTES
        self._round_trip_seconds = float("inf")
        self._bytes_per_second = 0.0

    def record_round_trip(self, seconds: float) -> None:
        """Record the time from a request to its answer. Call it only if nothing but the link has delayed the answer."""
        self._round_trip_seconds = min(self._round_trip_seconds, seconds)

    def record_visit(self, n_bytes: int, seconds: float) -> None:
        """Record a visit that fetched ``n_bytes`` in ``seconds``, and set the window for the next one."""
        if seconds <= 0 or self._round_trip_seconds == float("inf"):
            return
        self._bytes_per_second = max(self._bytes_per_second, n_bytes / seconds)
        product = self._bytes_per_second * self._round_trip_seconds
        self.n_bytes = int(min(max(GAIN * product, FEWEST_BYTES), MOST_BYTES))
