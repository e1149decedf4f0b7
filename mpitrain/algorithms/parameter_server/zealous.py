"""Zealous DOWNPOUR: a worker exchanges as soon as nobody else is at the center, at the latest after tau steps.

    after a local step, the s-th since the last exchange:
        the center is busy and s < tau      go on locally
        otherwise                           exchange as DOWNPOUR does

The center is busy while another worker visits it, from its first shard to its last. With a center that is never busy
this is DOWNPOUR with period 1, with one that always is, DOWNPOUR with period tau; in between the period adapts to the
load.

Source: Hermans, On scalable deep learning and parallelizing gradient descent, 2017, CERN-THESIS-2017-103, zealous
DOWNPOUR.

Deviations: the thesis asks the server by a control message whether its queue is empty. There is no server here: each
worker has a flag that it raises while it visits, and reads those of the others: p-1 reads of one number, no lock. Two
workers that look at the same moment may both go.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from mpitrain.algorithms.base.method import Replica, setting
from mpitrain.algorithms.base.peers import alive_ranks
from mpitrain.algorithms.parameter_server.center import DOWNPOUR_RATE, CenterMethod, DisplacementWorker
from mpitrain.theory import downpour_warning


@dataclass(frozen=True)
class ZealousDownpour(CenterMethod):
    """DOWNPOUR whose period adapts: it exchanges at every step until the center is crowded.

    Args:
        period: tau, the most local steps between two exchanges.
    """

    period: int = setting(10, "tau, the most local steps between exchanges", low=1)

    name: ClassVar[str] = "zealous"
    summary: ClassVar[str] = "DOWNPOUR that exchanges whenever nobody else is at the center"
    source: ClassVar[str] = "Hermans 2017, CERN-THESIS-2017-103"
    communication: ClassVar[str] = "2/tau to 2 (commit and pull), and p-1 numbers a step"
    needs_gradient: ClassVar[bool] = False
    learning_rate_factor: ClassVar[float] = DOWNPOUR_RATE
    short_run: ClassVar[Mapping[str, Any]] = MappingProxyType({"period": 4})

    def warnings(self, size: int, learning_rate: float) -> Iterator[str]:
        """A longest period outside DOWNPOUR's bound."""
        text = downpour_warning(size, self.period)
        if text is not None:
            yield text

    def worker(self, replica: Replica) -> ZealousWorker:
        """Collective."""
        return ZealousWorker(self, replica)


class ZealousWorker(DisplacementWorker):
    """Raises a flag while it is at the center."""

    def __init__(self, method: ZealousDownpour, replica: Replica) -> None:
        super().__init__(method, replica)
        self._visiting = self.comm.numbers(1)
        self._seen = np.zeros(1)
        self.comm.barrier()

    def is_due(self) -> bool:
        """Whether nobody else is at the center, or tau steps have been made."""
        return super().is_due() or not self.is_busy()

    def is_busy(self) -> bool:
        """Whether another worker is visiting the center now. Local."""
        return any(self._visits(rank) for rank in alive_ranks(self.comm) if rank != self.comm.rank)

    def commit(self) -> None:
        """Commit and pull, for all to see. Local."""
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
