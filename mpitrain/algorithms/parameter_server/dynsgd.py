"""DynSGD: DOWNPOUR that divides each commit by its staleness + 1.

    the server's clock k counts commits; m_i is k at worker i's last pull

    commit of worker i    s = k - m_i;   c <- c + (x - o)/(s+1);   k <- k + 1
    pull                  x, o <- c;     m_i <- k

If the workers commit in turn, s is p-1 at every commit: the center moves by the workers' mean. For every p and tau, it
is then stable if SGD alone is (0 < eta*h < 1). A worker that returns at once commits with s = 0, in full.

Source: Hermans, On scalable deep learning and parallelizing gradient descent, 2017, CERN-THESIS-2017-103 (lambda there
is the period tau here; the text prints 1/s, algorithm and code divide by s+1); after Jiang, Cui, Zhang, Yu,
Heterogeneity-aware distributed parameter servers, 2017.

Deviations: each shard of the center is a server with its own clock, so that one commit can be scaled differently in two
shards. The staleness is read under the lock that the commit holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from mpitrain.algorithms.base.replica import Replica
from mpitrain.algorithms.base.settings import integer
from mpitrain.algorithms.parameter_server.center import CenterMethod, CenterWorker
from mpitrain.algorithms.parameter_server.commit import Displacement
from mpitrain.collectives.rma.shared_vector import SharedVector


@dataclass(frozen=True)
class DynSGD(CenterMethod):
    """A parameter server that divides a commit by its staleness.

    The staleness is the number of commits by other workers since the worker's last pull. Each shard of the center has
    its own count.

    Args:
        period: The number tau of local steps between two exchanges; 1 and 10 in the thesis.
    """

    period: int = integer(10, "tau, local steps between exchanges", low=1)

    name: ClassVar[str] = "dynsgd"
    summary: ClassVar[str] = "a parameter server that divides each commit by its staleness"
    source: ClassVar[str] = "Hermans 2017, CERN-THESIS-2017-103"
    needs_gradient: ClassVar[bool] = False
    short_run: ClassVar[Mapping[str, Any]] = MappingProxyType({"period": 2})

    def worker(self, replica: Replica) -> CenterWorker:
        """Make a worker. Collective."""
        return CenterWorker(self, replica, Displacement(replica.x.local, inverse_staleness))


def inverse_staleness(shared: SharedVector, steps: int) -> float:
    """Return 1/(s+1), where s is the staleness of the visited shard."""
    return 1 / (shared.staleness + 1)
