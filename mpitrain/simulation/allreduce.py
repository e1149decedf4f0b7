"""All-reduce by messages between simulated ranks: the steps that real ranks carry out, on a simulated network."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mpitrain.collectives.message_allreduce import Exchange, exchanges
from mpitrain.collectives.topology.allreduce_steps import buffer_size
from mpitrain.simulation.network import Fabric


@dataclass(frozen=True)
class Traffic:
    """The cost of an all-reduce to each rank.

    Attributes:
        seconds: (ranks,) the virtual time at which the rank has the result.
        n_steps: (ranks,) the number of steps, one after the other.
        n_sent: (ranks,) the number of messages sent.
        bytes_sent: (ranks,) the bytes of these messages.
    """

    seconds: np.ndarray
    n_steps: np.ndarray
    n_sent: np.ndarray
    bytes_sent: np.ndarray


def allreduce(algorithm: str, totals: Sequence[np.ndarray], fabric: Fabric) -> Traffic:
    """Replace every rank's vector by the sum of all, and return what this has cost.

    The arithmetic takes no virtual time.

    Args:
        algorithm: One of ``ALGORITHMS``.
        totals: (ranks, n) the summands. Afterwards, each is the sum.
        fabric: The network.
    """
    size, n = len(totals), totals[0].size
    traffic = Traffic(np.zeros(size), *(np.zeros(size, np.int64) for _ in range(3)))
    n_incoming = buffer_size(algorithm, size, n)
    steps = [exchanges(algorithm, rank, size, x, np.zeros(n_incoming, x.dtype)) for rank, x in enumerate(totals)]
    under_way: dict[tuple[int, int], deque[tuple[np.ndarray, float]]] = {}
    sent_at = np.zeros(size)

    def advance(rank: int) -> Exchange | None:
        """Begin the next step of a rank: send its message."""
        exchange = next(steps[rank], None)
        if exchange is None:
            return None
        traffic.n_steps[rank] += 1
        sent_at[rank] = traffic.seconds[rank]
        if exchange.target is not None:
            traffic.n_sent[rank] += 1
            traffic.bytes_sent[rank] += exchange.sent.nbytes
            sent_at[rank], arrives = fabric.send(rank, exchange.target, exchange.sent.nbytes, traffic.seconds[rank])
            under_way.setdefault((rank, exchange.target), deque()).append((exchange.sent.copy(), arrives))
        return exchange

    present = [advance(rank) for rank in range(size)]
    waiting, n_stuck = deque(range(size)), 0
    while waiting:
        if n_stuck > len(waiting):
            raise RuntimeError(f"{algorithm}: {len(waiting)} ranks wait for messages that nobody sends")
        rank = waiting.popleft()
        if (exchange := present[rank]) is None:
            continue
        waiting.append(rank)
        traffic.seconds[rank] = max(traffic.seconds[rank], sent_at[rank])
        if exchange.source is not None:
            messages = under_way.get((exchange.source, rank), deque())
            if not messages:
                n_stuck += 1
                continue
            exchange.received[...], arrived = messages.popleft()
            traffic.seconds[rank] = max(traffic.seconds[rank], arrived)
        present[rank], n_stuck = advance(rank), 0
    return traffic
