"""DynSGD: DOWNPOUR that divides what a worker commits by its staleness + 1.

    the server's clock k counts commits; m_i is k at worker i's last pull

    commit of worker i    s = k - m_i;   c <- c + (x - o)/(s+1);   k <- k + 1
    pull                  x, o <- c;     m_i <- k

Served in turn, s is p-1 at every commit: the center moves by the workers' mean and is stable for every p and tau where
SGD alone is (0 < eta*h < 1). A worker that comes back at once commits with s = 0, in full.

Source: Hermans, On scalable deep learning and parallelizing gradient descent, 2017, CERN-THESIS-2017-103 (lambda there
is the period tau here; the text prints 1/s, algorithm and code divide by s+1); after Jiang, Cui, Zhang, Yu,
Heterogeneity-aware distributed parameter servers, 2017.

Deviations: each shard of the center is a server of its own with its own clock, so one commit can be scaled differently
in two shards. The staleness is read under the lock under which the commit is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from mpitrain.algorithms.base.method import Replica, setting
from mpitrain.algorithms.parameter_server.center import CenterMethod, DisplacementWorker


@dataclass(frozen=True)
class DynSGD(CenterMethod):
    """A parameter server that trusts a commit the less, the more others have committed since its worker's last pull.

    Each shard of the center is a server of its own, with its own clock.

    Args:
        period: tau, local steps between two exchanges; 1 and 10 in the thesis.
    """

    period: int = setting(10, "tau, local steps between exchanges", low=1)

    name: ClassVar[str] = "dynsgd"
    summary: ClassVar[str] = "a parameter server that divides each commit by its staleness"
    source: ClassVar[str] = "Hermans 2017, CERN-THESIS-2017-103"
    needs_gradient: ClassVar[bool] = False
    short_run: ClassVar[Mapping[str, Any]] = MappingProxyType({"period": 5})

    def worker(self, replica: Replica) -> DynSGDWorker:
        """Collective."""
        return DynSGDWorker(self, replica)


class DynSGDWorker(DisplacementWorker):
    """Divides by the staleness of the shard that it visits."""

    def commit_rate(self) -> float:
        """1/(s+1)"""
        return 1 / (self._center.staleness + 1)
