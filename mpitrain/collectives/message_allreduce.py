"""All-reduce by messages: carries out the steps of ``topology.allreduce_steps``, between real or simulated ranks.

MPI_Allreduce negotiates large messages. Over TCP, Open MPI then uses one direction of a link at a time. Here every
message is short enough for the eager protocol, and both directions are in use.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpitrain.collectives.topology.allreduce_steps import ALGORITHMS
from mpitrain.collectives.world.background import wait_all
from mpitrain.collectives.world.transfers import pieces


@dataclass(frozen=True, slots=True)
class Exchange:
    """Two messages at the same time.

    Attributes:
        target: The rank that receives ``sent``; None if nothing is sent.
        sent: The elements to send.
        source: The rank from which ``received`` comes; None if nothing is received.
        received: The memory for the elements that arrive.
    """

    target: int | None
    sent: np.ndarray
    source: int | None
    received: np.ndarray


def exchanges(algorithm: str, rank: int, size: int, total: np.ndarray, incoming: np.ndarray) -> Iterator[Exchange]:
    """Yield the messages of a rank. Each must be complete before the next one is requested.

    Args:
        algorithm: One of ``ALGORITHMS``.
        rank: This rank.
        size: The number of ranks.
        total: (n,) this rank's summand. When the iterator ends, it is the sum over all ranks.
        incoming: (``buffer_size(algorithm, size, n)``,) a buffer for elements that are added.
    """
    for step in ALGORITHMS[algorithm](rank, size, total.size):
        coming = total[step.received]
        into = incoming[: coming.size] if step.adds else coming
        yield Exchange(step.target, total[step.sent], step.source, into)
        if step.adds:
            coming += into


def allreduce(comm: Any, algorithm: str, total: np.ndarray, incoming: np.ndarray) -> int:
    """Replace ``total`` (n,) by the sum over the ranks of ``comm``. Collective.

    Args:
        comm: The ranks. There must be no other messages between them.
        algorithm: One of ``ALGORITHMS``.
        total: (n,) this rank's summand.
        incoming: A buffer, as in ``exchanges``.

    Returns:
        The bytes that this rank has sent.
    """
    n_bytes = 0
    for exchange in exchanges(algorithm, comm.Get_rank(), comm.Get_size(), total, incoming):
        requests = []
        if exchange.source is not None:
            requests += [comm.Irecv(piece, exchange.source) for piece in pieces(exchange.received)]
        if exchange.target is not None:
            requests += [comm.Isend(piece, exchange.target) for piece in pieces(exchange.sent)]
            n_bytes += exchange.sent.nbytes
        wait_all(requests)
    return n_bytes
