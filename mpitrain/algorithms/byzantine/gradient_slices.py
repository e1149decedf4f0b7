"""Slices of all workers' gradients: robust aggregation without a master.

    1. collect   worker k copies slice k of all gradients from the memory of their owners
    2. total     what was found in the slices (distances, non-finite elements) is summed over them; the same bits on
                 every worker, so that all make the same decision
    3. share     worker k has put slice k of the aggregate in the place of its gradient; an all-reduce of vectors that
                 are 0 elsewhere distributes it without rounding

    g_0  |--- 0 ---|--- 1 ---|--- 2 ---|
    g_1  |--- 0 ---|--- 1 ---|--- 2 ---|      worker 1 works on column 1, and has memory for it only
    g_2  |--- 0 ---|--- 1 ---|--- 2 ---|

The aggregate of a slice is computed once and copied, so it cannot differ between workers. The owner of a slice is
trusted with it: this protects from bad gradients (by bad data, bad hardware, a diverged or hostile computation), not
from a rank that breaks the protocol.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from mpitrain import kernels
from mpitrain.algorithms.base.rescaling import Parts
from mpitrain.algorithms.base.state import State
from mpitrain.collectives.communicator import Communicator, Vector
from mpitrain.collectives.topology.partition import split
from mpitrain.kernels.robust import Rows

COMMUNICATION = "3(p-1)/p (slices of all gradients, then an all-reduce)"


class GradientSlices:
    """One worker's slice of all workers' gradients. Collective to create.

    Args:
        comm: The communicator of the workers.
        g: (n,) the gradient of each worker.
        extra: The number of additional rows, for vectors of the method that are compared with gradients.

    Attributes:
        part: The position of this worker's slice in the vector.
        mine: The slice of this worker's own gradient; the method overwrites it with the slice of the aggregate.
        rows: (size + extra, length) the slice of each worker's gradient, then the additional rows. Elements that are
            not finite are 0.
    """

    def __init__(self, comm: Communicator, g: Vector, extra: int = 0) -> None:
        self._comm, self._g = comm, g
        self.part = split(g.local.size, comm.size)[comm.rank]
        self.mine = g.local[self.part]
        self.rows = Rows(comm.size + extra, self.mine.size, g.local.dtype)
        kernels.receive(self.rows.values[0, :0], g.local[:0])  # compiled before the first step

    def exclude_own(self, excludes: bool) -> None:
        """Mark this worker's gradient as not finite if ``excludes`` is true. Local; call it before ``collect``."""
        if excludes and np.isfinite(self._g.local[:1]).any():
            self._g.local[:1] = math.nan
            self._comm.statistics.n_nonfinite -= 1  # ``collect`` counts this element

    def collect(self, whose: Iterable[int]) -> np.ndarray:
        """Copy this worker's slice from the gradients of the workers ``whose``. Collective.

        Gradients must not change until ``total`` returns.

        Returns:
            (size,) the number of non-finite elements of each worker, in this slice.
        """
        n_bad = np.zeros(self._comm.size)
        self._comm.barrier()  # all gradients are complete
        for peer in whose:
            self._comm.read(self._g, peer, lambda g, peer=peer: self._copy(peer, g, n_bad))  # type: ignore[misc]
        self._comm.statistics.n_nonfinite += int(n_bad.sum())
        return n_bad

    def total(self, values: np.ndarray) -> np.ndarray:
        """Return the sum of all workers' ``values``, with the same bits on every worker. Collective."""
        return np.add.reduce(self._comm.gather(values.tolist()), axis=0)

    def share(self) -> None:
        """Replace every worker's gradient by the aggregate, whose slices are in the workers' ``mine``. Collective."""
        self._g.local[: self.part.start] = 0
        self._g.local[self.part.stop :] = 0
        self._comm.allreduce(self._g)

    def _copy(self, peer: int, g: Any, n_bad: np.ndarray) -> None:
        n_bad[peer] = kernels.receive(self.rows.values[peer], g[self.part])
        if peer != self._comm.rank:
            self._comm.statistics.bytes_sent += self.mine.nbytes


class SliceState:
    """The checkpoint entry of a vector of which each worker holds a slice.

    Args:
        name: The name of the entry.
        part: The position of this worker's slice.
        values: (length,) the slice.
    """

    def __init__(self, name: str, part: slice, values: Any) -> None:
        self._name, self._part, self._values = name, part, values

    def state(self) -> Iterator[tuple[str, Any]]:
        """Yield the slice. Local."""
        yield self._name, self._values

    def load(self, state: State) -> None:
        """Restore the slice. Local."""
        kernels.assign(self._values, state[self._name])

    def merge(self, parts: Parts) -> Iterator[tuple[str, Any]]:
        """Yield the whole vector (n,), assembled from all workers' slices. Local."""
        yield self._name, np.concatenate([part[self._name] for part in parts])

    def restart(self, state: State) -> None:
        """Continue with this worker's slice of the whole vector. Local."""
        kernels.assign(self._values, state[self._name][self._part])
