"""GPU A-SGD: DOWNPOUR between clients of one or several GPUs each, after a warm start by one of them.

    warm start:   client 0 alone makes warm_start_steps steps and commits them;  the others wait
    then each     x_i <- c, and every n_sync steps:   c <- c + d,  x_i <- c       d: what its local steps have changed

Many clients that start from random parameters slow down or destabilise the first part of a training: their commits,
each made far from the others', add up. The model of one client is a better common start. A client of several ranks
(``replica_size``) uses the mean of their gradients, exactly: it is one client with a proportionally larger mini-batch.

Source: Paine, Jin, Yang, Lin, Huang, GPU asynchronous stochastic gradient descent to speed up neural network training,
2013, https://arxiv.org/abs/1312.6186.

Deviations: the paper warm-starts from a checkpoint; here it is one run. There is no barrier at the end of the warm
start: at each of its steps a waiting client checks whether client 0 has finished, then pulls the center and starts.
Until then its parameters do not move and its gradients are discarded, although they count against the run's budget. It
does not wait inside a step, because it would not receive rank 0's orders to save or to stop there. Clients that start
at once have the same parameters to the last bit; a late client also has what the others have committed meanwhile. The
server adds displacements, so the local steps may be any optimizer's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from mpitrain.algorithms.base.replica import ParamGroupSlice, Replica
from mpitrain.algorithms.base.settings import integer
from mpitrain.algorithms.parameter_server.center import DOWNPOUR_RATE, CenterMethod, CenterWorker
from mpitrain.algorithms.parameter_server.commit import Displacement
from mpitrain.theory import downpour_warning


@dataclass(frozen=True)
class GPUASGD(CenterMethod):
    """A parameter server with a warm start: client 0 trains alone for some steps before the other clients join.

    Args:
        period: The number n_sync of mini-batches between two exchanges of a client (n_fetch = n_push in the paper).
        warm_start_steps: The number of steps that client 0 makes alone. With 0, all clients start at once (the paper's
            cold start).
    """

    period: int = integer(4, "n_sync, mini-batches between exchanges", low=1)
    warm_start_steps: int = integer(0, "steps that client 0 makes before the others begin", low=0)

    name: ClassVar[str] = "gpu-asgd"
    summary: ClassVar[str] = "DOWNPOUR between clients of several GPUs, after a warm start by one"
    source: ClassVar[str] = "Paine, Jin, Yang, Lin, Huang 2013, arXiv 1312.6186"
    communication: ClassVar[str] = "2/n_sync (commit and pull) of a client"
    needs_gradient: ClassVar[bool] = False
    learning_rate_factor: ClassVar[float] = DOWNPOUR_RATE
    short_run: ClassVar[Mapping[str, Any]] = MappingProxyType({"period": 1, "warm_start_steps": 20})

    def warnings(self, size: int, learning_rate: float) -> Iterator[str]:
        """Yield a line for a period n_sync outside DOWNPOUR's region of stability."""
        text = downpour_warning(size, self.period)
        if text is not None:
            yield text

    def worker(self, replica: Replica) -> GPUASGDWorker:
        """Make a worker. Collective."""
        return GPUASGDWorker(self, replica, Displacement(replica.x.local))


class GPUASGDWorker(CenterWorker):
    """A client that waits for the end of the warm start (unless it is client 0), then commits and pulls.

    Args:
        method: The hyper-parameters.
        replica: The vectors and the communicator to work with.
        displacement: The rule by which this client commits.
    """

    persistent: ClassVar[tuple[str, ...]] = ("_waits",)

    def __init__(self, method: GPUASGD, replica: Replica, displacement: Displacement) -> None:
        super().__init__(method, replica, displacement)
        self._pull = displacement.pull
        self._waits = method.warm_start_steps > 0 and self.comm.rank > 0
        self._made = self.comm.numbers(1)  # the steps of client 0
        self._seen = np.zeros(1)
        self._pull(slice(0, 0), self._empty)  # compiled now
        self.comm.barrier()

    def step(
        self,
        group_slices: Sequence[ParamGroupSlice],
        local_update: Callable[[], object] | None,
        loss: float | None = None,
        *,
        skips: bool = False,
        is_combined: bool = False,
    ) -> bool:
        """Make a step. A waiting client instead pulls the center, if client 0 has ended the warm start or died."""
        if self._waits:
            self.comm.read(self._made, 0, partial(np.copyto, self._seen))
            if self._seen[0] >= self._method.warm_start_steps or 0 in self.comm.dead:
                self._center.update(self._pull, pushes=False)
                self._waits = False  # the next gradient is taken at the model that it has now
            self.t += 1
            return False
        found_nonfinite = super().step(group_slices, local_update, loss, skips=skips, is_combined=is_combined)
        self._made.local[0] = self.t
        return found_nonfinite

    def is_due(self) -> bool:
        """Return whether a commit is due: after n_sync steps, or at the end of the warm start."""
        ends = self.comm.rank == 0 and self.t + 1 == self._method.warm_start_steps
        return ends or super().is_due()

    def after_load(self) -> None:
        """Publish this client's number of steps again; the others read that of client 0.

        If client 0 was dead when the checkpoint was saved, it has loaded the part of another client. It does not wait
        even if that client did.
        """
        self._made.local[0] = self.t
        self._waits = self._waits and self.comm.rank > 0
