"""An all-reduce between nodes that fills both directions of every link.

MPI_Allreduce negotiates large messages, and over TCP both Open MPI and MPICH then use one direction at a time. Here
every message is short enough to be sent at once::

    p - 1 times    send a part of the sum to the next rank, add what comes from the one before to another part
    p - 1 times    send a complete part to the next rank, take another from the one before

Each part is summed in one order, at one rank, so that all ranks get the same bits at every run.

Parts can travel in a wire format (``native.wire``). They are then summed in float32 at every rank they pass, and a
complete part is encoded once, by the rank that has it; that rank, too, goes on with what the others decode. A part is
rounded once at each rank that it leaves, and what that loses is lost: unlike a center, a sum has no next time.

Source: Patarasuk, Yuan, Bandwidth optimal all-reduce algorithms for clusters of workstations, 2009.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mpitrain.collectives.topology.partition import split
from mpitrain.collectives.world.background import wait_all
from mpitrain.collectives.world.transfers import pieces
from mpitrain.kernels.native.wire import Format


def allreduce(comm: Any, total: np.ndarray, incoming: np.ndarray) -> None:
    """Replace ``total`` (n,) by the sum over the ranks of ``comm``. Collective.

    Args:
        comm: The ranks; no other messages between them are under way.
        total: (n,) this rank's summand.
        room: For what comes in: as many elements as the largest part of ``split(n, ranks)``.
    """
    rank, size = comm.Get_rank(), comm.Get_size()
    parts = split(total.size, size)
    for step in range(2 * (size - 1)):
        going, coming = (total[parts[(rank - step - k) % size]] for k in (0, 1))
        adds = step < size - 1
        into = incoming[: coming.size] if adds else coming
        requests = [comm.Irecv(piece, (rank - 1) % size) for piece in pieces(into)]
        requests += [comm.Isend(piece, (rank + 1) % size) for piece in pieces(going)]
        wait_all(requests)
        if adds:
            coming += into


def allreduce_encoded(comm: Any, total: np.ndarray, incoming: np.ndarray, wire: Format) -> None:
    """The same for float32 vectors that travel as ``wire`` fetches blocks. Collective.

    Args:
        comm: As above.
        total: As above.
        room: As above: there is place for two parts of 16-bit numbers.
        wire: The format.
    """
    rank, size = comm.Get_rank(), comm.Get_size()
    parts = split(total.size, size)
    raw = incoming.view(np.uint8)
    going, coming = raw[: raw.size // 2], raw[raw.size // 2 :]
    for step in range(2 * (size - 1)):
        mine, theirs = (total[parts[(rank - step - k) % size]] for k in (0, 1))
        sent, received = going[: wire.fetched_bytes(mine.size)], coming[: wire.fetched_bytes(theirs.size)]
        if step < size:  # later ones are sent on as they have come
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
