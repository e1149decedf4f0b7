"""GPU A-SGD: DOWNPOUR between clients that may be several GPUs each, from a model that one client has trained alone.

    warm start:   client 0 alone makes warm_start_steps steps and commits them;  the others wait
    then each     x_i <- c, and every n_sync steps:   c <- c + d,  x_i <- c       d: what its local steps have changed

Many clients that begin at random parameters slow down or upset the first part of a training: their commits, each made
far from the others', add up. One client's model is a better place to begin together. A client that is several ranks
(``replica_size``) takes the mean of their gradients, exactly: it is one client with as many times the mini-batch.

Source: Paine, Jin, Yang, Lin, Huang, GPU asynchronous stochastic gradient descent to speed up neural network training,
2013, https://arxiv.org/abs/1312.6186.

Deviations: the paper warm-starts from a checkpoint; here it is one run. There is no barrier at its end: a waiting
client looks, at each of its steps, whether client 0 is done, then takes the center and counts from there. Until then it
stands still and its gradients are thrown away, although they count against the run's budget: stopping it inside a step
would also keep from it what rank 0 orders, to save or to stop. Those that come at once begin with the same parameters
to the last bit, one that comes late with what the others have committed meanwhile. The server adds displacements, so
the local steps may be any optimizer's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from mpitrain import kernels
from mpitrain.algorithms.base.method import ParamGroupSlice, Replica, setting
from mpitrain.algorithms.parameter_server.center import DOWNPOUR_RATE, CenterMethod, DisplacementWorker
from mpitrain.theory import downpour_warning


@dataclass(frozen=True)
class GPUASGD(CenterMethod):
    """A parameter server whose clients join when one of them has found a good place to begin.

    Args:
        period: n_sync, mini-batches between two exchanges of a client; the paper's n_fetch = n_push.
        warm_start_steps: Steps that client 0 makes alone; 0 is the paper's cold start.
    """

    period: int = setting(4, "n_sync, mini-batches between exchanges", low=1)
    warm_start_steps: int = setting(0, "steps that client 0 makes before the others begin", low=0)

    name: ClassVar[str] = "gpu-asgd"
    summary: ClassVar[str] = "DOWNPOUR between clients of several GPUs, after a warm start by one"
    source: ClassVar[str] = "Paine, Jin, Yang, Lin, Huang 2013, arXiv 1312.6186"
    communication: ClassVar[str] = "2/n_sync (commit and pull) of a client"
    needs_gradient: ClassVar[bool] = False
    learning_rate_factor: ClassVar[float] = DOWNPOUR_RATE
    short_run: ClassVar[Mapping[str, Any]] = MappingProxyType({"warm_start_steps": 20})

    def warnings(self, size: int, learning_rate: float) -> Iterator[str]:
        """An n_sync outside DOWNPOUR's bound."""
        text = downpour_warning(size, self.period)
        if text is not None:
            yield text

    def worker(self, replica: Replica) -> GPUASGDWorker:
        """Collective."""
        return GPUASGDWorker(self, replica)


class GPUASGDWorker(DisplacementWorker):
    """Waits for the end of the warm start, unless it is client 0, then commits and pulls."""

    def __init__(self, method: GPUASGD, replica: Replica) -> None:
        super().__init__(method, replica)
        self._waits = method.warm_start_steps > 0 and self.comm.rank > 0
        self._made = self.comm.numbers(1)  # client 0 shows its steps
        self._seen = np.zeros(1)
        self._join(slice(0, 0), np.zeros_like(self.x.local, dtype=self._dtype, shape=(0,)))  # compiled now
        self.comm.barrier()

    def step(
        self,
        group_slices: Sequence[ParamGroupSlice],
        local_update: Callable[[], object] | None,
        loss: float | None = None,
    ) -> bool:
        """A step; while it waits, only a look at client 0, and the center when that is done, or has died."""
        if self._waits:
            self.comm.read(self._made, 0, partial(np.copyto, self._seen))
            if self._seen[0] >= self._method.warm_start_steps or 0 in self.comm.dead:
                self._center.update(self._join, pushes=False)
                self._waits = False  # the next gradient is one of the model that it has now
            self.t += 1
            return False
        found_nonfinite = super().step(group_slices, local_update, loss)
        self._made.local[0] = self.t
        return found_nonfinite

    def is_due(self) -> bool:
        """Every n_sync steps, and where the warm start ends: the others shall find all of it."""
        ends = self.comm.rank == 0 and self.t + 1 == self._method.warm_start_steps
        return ends or super().is_due()

    def _join(self, part: slice, c: Any) -> int:
        """x, o <- c"""
        return kernels.pull_only(self.x.local[part], self._origin[part], c)

    def state(self) -> Iterator[tuple[str, Any]]:
        """What all displacement workers have, and whether this one still waits."""
        yield from super().state()
        yield "waits", self._waits

    def load(self, state: dict[str, Any]) -> None:
        """Collective."""
        self._waits = bool(state["waits"])
        self._made.local[0] = int(state["t"])
        super().load(state)
