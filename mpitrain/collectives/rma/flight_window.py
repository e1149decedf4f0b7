"""How many bytes of a visit should be under way: as many as the link holds, its bandwidth-delay product."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from mpitrain.collectives.world.progress import MOST_AWAITED

FEWEST_BYTES = 1 << 20
"""Fills links of a few milliseconds. More blocks under way than needed keep their locks longer."""

MOST_BYTES = 1 << 24
"""1 Gbit/s for 130 ms. It bounds the memory of the staging buffers, of which there are twice as many bytes."""

GAIN = 2.0
"""Times the bandwidth-delay product: the bandwidth of a visit is a lower bound of that of the link."""

QUEUED = 1.25
"""Times the shortest round trip: an answer that takes longer has waited for other data on a full link."""

TCP_WMEM = Path("/proc/sys/net/ipv4/tcp_wmem")
"""Linux's smallest, first and largest size of the send buffer of a TCP connection, in bytes."""


@functools.cache
def socket_buffer_bytes(path: Path = TCP_WMEM) -> int:
    """Return the largest size of the send buffer of a TCP connection; ``MOST_BYTES`` if it is unknown. Local."""
    try:
        return max(int(path.read_text().split()[2]), FEWEST_BYTES)
    except (OSError, ValueError, IndexError):
        return MOST_BYTES


class FlightWindow:
    """The number of bytes under way that fills a link, estimated from past visits.

    It is a multiple of the round-trip time times the bandwidth, as in BBR (Cardwell et al. 2016, doi
    10.1145/3012426.3022184). The round-trip time is the shortest that was measured. The bandwidth is the highest
    that a visit reached between its first and its last block.

    During a visit, the window grows with each answer by the size of the answered block, until answers have to queue.
    It thus doubles with each round trip, as in the slow start of TCP, and the first visit fills the link already.

    A server sends at most as many bytes at a time as the send buffer of its connection holds. More of them would slow
    it down: MPI waits at a full buffer, and Linux wakes it only when a third of the buffer is free.

    Attributes:
        n_bytes: The window, in bytes.
        bytes_of_server: The most bytes under way from one server.
    """

    def __init__(self) -> None:
        self.n_bytes, self.bytes_of_server = FEWEST_BYTES, socket_buffer_bytes()
        self._round_trip_seconds = float("inf")
        self._bytes_per_second = 0.0

    def admits(self, requested: Sequence[tuple[int, int]], server: int, n_bytes: int) -> bool:
        """Return whether a block of ``n_bytes`` may be requested from a server beside the blocks under way.

        Two at least may be under way, as one is worked on while another one comes.

        Args:
            requested: The server and the size in bytes of each block under way.
            server: The rank that serves the block.
            n_bytes: The size of the block.
        """
        if len(requested) < 2:
            return True
        there = [size for other, size in requested if other == server]
        return (
            sum(size for _, size in requested) + n_bytes <= self.n_bytes
            and len(there) < MOST_AWAITED
            and (not there or sum(there) + n_bytes <= self.bytes_of_server)
        )

    def record_answer(self, seconds: float, n_bytes: int) -> None:
        """Record the time from a request for a block of ``n_bytes`` to its answer, and open the window further.

        Call it only if nothing but the link has delayed the answer.
        """
        self._round_trip_seconds = min(self._round_trip_seconds, seconds)
        if seconds <= QUEUED * self._round_trip_seconds:
            self.n_bytes = min(self.n_bytes + n_bytes, MOST_BYTES)

    def record_visit(self, n_bytes: int, seconds: float) -> None:
        """Record a visit that fetched ``n_bytes`` in ``seconds``, and set the window for the next one."""
        if seconds <= 0 or self._round_trip_seconds == float("inf"):
            return
        # The first block takes a round trip to come. A shorter visit was never limited by the link.
        transfer_seconds = max(seconds - self._round_trip_seconds, min(seconds, self._round_trip_seconds))
        self._bytes_per_second = max(self._bytes_per_second, n_bytes / transfer_seconds)
        product = self._bytes_per_second * self._round_trip_seconds
        self.n_bytes = int(min(max(GAIN * product, FEWEST_BYTES), MOST_BYTES))
