"""Every worker's gradient in view, a slice of it at each worker: robust aggregation without a master.

    1. collect   worker k copies slice k of all gradients from the windows of their owners
    2. total     what was found in the slices (distances, elements that are no numbers) is summed over them; the same
                 bits on every worker, so that all come to the same decision
    3. share     worker k has put slice k of the aggregate where its gradient was; all-reduce of vectors that are 0
                 elsewhere carries it to all, without a rounding

    g_0  |--- 0 ---|--- 1 ---|--- 2 ---|
    g_1  |--- 0 ---|--- 1 ---|--- 2 ---|      worker 1 works on column 1, and has memory for it only
    g_2  |--- 0 ---|--- 1 ---|--- 2 ---|

The aggregate of a slice is computed once and copied, so it cannot differ between workers. Whoever owns a slice is
trusted with it: this is protection from bad gradients (of bad data, bad hardware, a diverged or hostile computation),
not from a rank that breaks the protocol.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from mpitrain import kernels
from mpitrain.collectives.communicator import Communicator, Vector
from mpitrain.collectives.topology.partition import split
from mpitrain.kernels.robust import Rows

COMMUNICATION = "3(p-1)/p (slices of all gradients, then an all-reduce)"


class GradientSlices:
    """One worker's slice of everybody's gradients. Collective.

    Args:
        comm: The workers.
        g: (n,) the gradient of each.
        extra: Further rows, for vectors of the method's own that are compared with gradients.

    Attributes:
        part: Where the slice lies.
        mine: This worker's gradient there, which becomes the aggregate.
        rows: (size + extra, length) a row for each worker; 0 where a gradient is not finite.
    """

    def __init__(self, comm: Communicator, g: Vector, extra: int = 0) -> None:
        self._comm, self._g = comm, g
        self.part = split(g.local.size, comm.size)[comm.rank]
        self.mine = g.local[self.part]
        self.rows = Rows(comm.size + extra, self.mine.size, g.local.dtype)
        kernels.receive(self.rows.values[0, :0], g.local[:0])  # compiled before the first step

    def collect(self, whose: Iterable[int]) -> np.ndarray:
        """Copy the slices of these workers. Collective; their owners must wait for ``total`` before they write.

        Returns:
            (size,) how many elements of each are not finite, in this slice.
        """
        n_bad = np.zeros(self._comm.size)
        self._comm.barrier()  # all gradients are there
        for peer in whose:
            self._comm.read(self._g, peer, lambda g, peer=peer: self._copy(peer, g, n_bad))  # type: ignore[misc]
        self._comm.statistics.n_nonfinite += int(n_bad.sum())
        return n_bad

    def total(self, values: np.ndarray) -> np.ndarray:
        """The sum of numbers found in each slice, the same bits on every worker. Collective."""
        return np.add.reduce(self._comm.gather(values.tolist()), axis=0)

    def share(self) -> None:
        """Everybody's gradient becomes the aggregate, of which each has put its slice in ``mine``. Collective."""
        self._g.local[: self.part.start] = 0
        self._g.local[self.part.stop :] = 0
        self._comm.allreduce(self._g)

    def _copy(self, peer: int, g: Any, n_bad: np.ndarray) -> None:
        n_bad[peer] = kernels.receive(self.rows.values[peer], g[self.part])
        if peer != self._comm.rank:
            self._comm.statistics.bytes_sent += self.mine.nbytes
