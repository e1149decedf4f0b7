"""A ring all-reduce between nodes whose messages are in a wire format (``native.wire``)::

    p - 1 times    send a partial sum to the next rank, receive another from the previous rank and add to it
    p - 1 times    send a complete part to the next rank, receive another from the previous rank

Each part is summed in one order, so that all ranks get the same bits in every run.

Every rank that a part passes sums it in float32. A complete part is encoded once, by the rank that completes it, and
this rank also continues with the decoded values. A part is rounded once per rank. There is no error feedback, which
would add a rounding error to the next exchange of the same vector: a sum is exchanged only once.

Source: Patarasuk, Yuan, Bandwidth optimal all-reduce algorithms for clusters of workstations, 2009.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mpitrain.collectives.topology.partition import split
from mpitrain.collectives.world.background import wait_all
from mpitrain.collectives.world.transfers import pieces
from mpitrain.kernels.native.wire import Format


def allreduce_encoded(comm: Any, total: np.ndarray, incoming: np.ndarray, wire: Format) -> None:
    """Replace ``total`` (n,) float32 by the sum over the ranks of ``comm``, using a wire format. Collective.

    Args:
        comm: The ranks. There must be no other messages between them.
        total: (n,) this rank's summand.
        incoming: A buffer with as many elements as the largest part of ``split(n, ranks)``. It holds two encoded
            parts, of 16 bits per element.
        wire: The wire format. All parts are sent in its 16-bit format ``wire.fetched``.
    """
    rank, size = comm.Get_rank(), comm.Get_size()
    parts = split(total.size, size)
    raw = incoming.view(np.uint8)
    going, coming = raw[: raw.size // 2], raw[raw.size // 2 :]
    for step in range(2 * (size - 1)):
        mine, theirs = (total[parts[(rank - step - k) % size]] for k in (0, 1))
        sent, received = going[: wire.fetched_bytes(mine.size)], coming[: wire.fetched_bytes(theirs.size)]
        if step < size:  # later parts are forwarded as received
            wire.encode(mine, sent)
        if step == size - 1:
            wire.decode(sent, mine)
        requests = [comm.Irecv(piece, (rank - 1) % size) for piece in pieces(received)]
        requests += [comm.Isend(piece, (rank + 1) % size) for piece in pieces(sent)]
        wait_all(requests)
        if step < size - 1:
            wire.add_fetched(received, theirs)
        else:
            wire.decode(received, theirs)
        going, coming = coming, going
