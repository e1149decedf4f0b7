"""Zealous DOWNPOUR: a worker exchanges as soon as the center is free, and after tau steps at the latest.

    after a local step, the s-th since the last exchange:
        the center is busy and s < tau      continue locally
        otherwise                           exchange as DOWNPOUR does

The center is busy while another worker visits it, from its first shard to its last. If the center is never busy this is
DOWNPOUR with period 1, if it always is, DOWNPOUR with period tau; in between the period adapts to the load.

Source: Hermans, On scalable deep learning and parallelizing gradient descent, 2017, CERN-THESIS-2017-103, zealous
DOWNPOUR.

Deviations: in the thesis a control message asks the server whether its queue is empty. There is no server here: each
worker raises a flag during its visits and reads those of the others, which takes p-1 reads of one number and no lock.
Two workers that read at the same moment may both start a visit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from mpitrain.algorithms.base.peers import alive_ranks
from mpitrain.algorithms.base.replica import Replica
from mpitrain.algorithms.base.settings import integer
from mpitrain.algorithms.parameter_server.center import DOWNPOUR_RATE, CenterMethod, CenterWorker
from mpitrain.algorithms.parameter_server.commit import Displacement
from mpitrain.theory import downpour_warning


@dataclass(frozen=True)
class ZealousDownpour(CenterMethod):
    """DOWNPOUR with an adaptive period: workers exchange after every step at which the center is not busy.

    Args:
        period: The largest number tau of local steps between two exchanges.
    """

    period: int = integer(10, "tau, the most local steps between exchanges", low=1)

    name: ClassVar[str] = "zealous"
    summary: ClassVar[str] = "DOWNPOUR that exchanges whenever nobody else is at the center"
    source: ClassVar[str] = "Hermans 2017, CERN-THESIS-2017-103"
    communication: ClassVar[str] = "2/tau to 2 (commit and pull), and p-1 numbers a step"
    needs_gradient: ClassVar[bool] = False
    learning_rate_factor: ClassVar[float] = DOWNPOUR_RATE
    short_run: ClassVar[Mapping[str, Any]] = MappingProxyType({"period": 4})

    def warnings(self, size: int, learning_rate: float) -> Iterator[str]:
        """Yield a line for a period outside DOWNPOUR's region of stability."""
        text = downpour_warning(size, self.period)
        if text is not None:
            yield text

    def worker(self, replica: Replica) -> ZealousWorker:
        """Make a worker. Collective."""
        return ZealousWorker(self, replica, Displacement(replica.x.local))


class ZealousWorker(CenterWorker):
    """A worker that raises a flag while it visits the center.

    Args:
        method: The hyper-parameters.
        replica: The vectors and the communicator to work with.
        displacement: The rule by which this worker commits.
    """

    def __init__(self, method: ZealousDownpour, replica: Replica, displacement: Displacement) -> None:
        super().__init__(method, replica, displacement)
        self._visiting = self.comm.numbers(1)
        self._seen = np.zeros(1)
        self.comm.barrier()

    def is_due(self) -> bool:
        """Return whether no other worker is at the center, or tau steps have been made."""
        return super().is_due() or not self.is_busy()

    def is_busy(self) -> bool:
        """Return whether another worker is visiting the center. Local."""
        return any(self._visits(rank) for rank in alive_ranks(self.comm) if rank != self.comm.rank)

    def commit(self) -> None:
        """Commit and pull with the flag raised. Local."""
        self._visiting.local[0] = 1
        try:
            super().commit()
        finally:
            self._visiting.local[0] = 0

    def _visits(self, rank: int) -> bool:
        def peek(flag: Any) -> None:
            self._seen[0] = flag[0]

        self.comm.read(self._visiting, rank, peek)
        return bool(self._seen[0])
