"""A parameter server, as its workers meet it: they commit what their local steps changed, and pull the center.

    o                what a worker pulled last (origin); it begins with x = o
    tau times        x <- x - eta*g(x)
    c <- c + a*d     the commit, d = x - o; a = 1 unless the method has another rule
    x, o <- c        the pull, which sees that commit

The displacement d is measured, so the local steps may be any torch optimizer's. The exchange follows the tau-th local
step, and the next gradient is taken at what was pulled.

There is no server process. The center lies in shards in the memory of all workers, each a parameter server of its own
with its own clock: a commit and its pull are atomic shard by shard, and one worker can be ahead of another in one shard
and behind it in the next.

What a worker has not committed when a run ends, fewer than tau steps, is a commit of its own then (``finalize``): the
center that is evaluated has every step. A checkpoint is of the moment before, and who continues it goes on in the
middle of the period.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mpitrain import kernels
from mpitrain.algorithms.base.method import Method, Replica, Worker
from mpitrain.algorithms.base.peers import saves_shared_state

DOWNPOUR_RATE = 0.25
"""The learning rate of methods whose center takes every commit in full, relative to that of SGD alone.

It should be about 1/p; this is for some four workers.
"""


@dataclass(frozen=True)
class CenterMethod(Method):
    """A method with a center that workers visit whenever they like."""

    communication: ClassVar[str] = "2/tau (commit and pull)"
    metrics: ClassVar[tuple[str, ...]] = ("staleness",)

    @property
    def is_synchronous(self) -> bool:
        """Nobody waits for anybody."""
        return False


class CenterWorker(Worker):
    """A worker of a parameter server, which it visits every ``period`` local steps.

    Args:
        method: With the setting ``period``, unless ``is_due`` needs none.
        replica: What it works on.
    """

    rows: ClassVar[tuple[str, ...]] = ("center",)
    """What the shared memory holds for each parameter, by the names of a checkpoint; the first is the center."""

    def __init__(self, method: Any, replica: Replica) -> None:
        super().__init__(replica)
        self._method = method
        self._steps = 0  # since the last commit
        x = self.x.local
        self._dtype = kernels.accumulator(x.dtype)
        self._center = self.comm.shared_vector(x.size, self._dtype, rows=len(self.rows))
        self._seed({name: self.start(name) for name in self.rows}, 0)
        empty = np.zeros_like(x, dtype=self._dtype, shape=(len(self.rows), 0) if len(self.rows) > 1 else (0,))
        self.visit(slice(0, 0), empty)  # compiled now

    def start(self, name: str) -> Any:
        """(n,) with what a row of the shared memory begins: what the model holds, as the center does."""
        return self.x.local

    @abstractmethod
    def visit(self, part: slice, c: Any) -> int:
        """Commit to a shard and pull it, in one pass, under its lock.

        Args:
            part: Where the shard lies.
            c: (length,) the center's, or (rows, length) with what lies beside it.

        Returns:
            The number of elements that were not finite and rejected.
        """

    def after_update(self) -> None:
        """Commit and pull when it is time."""
        self._steps += 1
        if self.is_due():
            self.commit()

    def is_due(self) -> bool:
        """Whether to visit the center after this step."""
        return self._steps >= int(self._method.period)

    def commit(self) -> None:
        """Commit and pull. Local."""
        self._center.update(self.visit)
        self._steps = 0

    def finalize(self) -> None:
        """Commit what has not been committed, before the end of a period. Local."""
        if self._steps:
            self.commit()

    def consensus(self, out: Any) -> None:
        """The center. Local."""
        self._center.read(out)

    def metrics(self) -> dict[str, float]:
        """How many commits of others the last visit found since the one before. Local."""
        return {"staleness": float(self._center.staleness)}

    def state(self) -> Iterator[tuple[str, Any]]:
        """The clock, how old the last pull is, and, with one worker, all of the shared memory."""
        yield from super().state()
        yield "steps", self._steps
        yield "lags", self._center.lags()
        if saves_shared_state(self.comm):
            for row, name in enumerate(self.rows):
                values = np.empty(self._center.n, self._dtype)
                self._center.read(values, row)
                yield name, values

    def load(self, state: dict[str, Any]) -> None:
        """Collective."""
        super().load(state)
        self._steps = int(state["steps"])
        self._seed(state, state["lags"])

    def _seed(self, values: Mapping[str, Any], lags: Any) -> None:
        """Exactly one worker seeds the shared memory; all have pulled it ``lags`` commits ago. Collective."""
        if self.comm.rank == 0:
            for row, name in enumerate(self.rows):
                self._center.write(values[name], row)
        self.comm.barrier()
        self._center.set_lags(lags)
        self.comm.barrier()  # before the first commit


class DisplacementWorker(CenterWorker):
    """Commits what its local steps have changed since its last pull, the origin."""

    def __init__(self, method: Any, replica: Replica) -> None:
        self._origin = replica.x.local.copy()
        super().__init__(method, replica)

    def visit(self, part: slice, c: Any) -> int:
        """c <- c + a*(x - o);  x, o <- c"""
        return kernels.commit_and_pull(self.x.local[part], self._origin[part], c, self.commit_rate())

    def commit_rate(self) -> float:
        """a, for the shard that is visited."""
        return 1.0

    def state(self) -> Iterator[tuple[str, Any]]:
        """The clock, the origin, how old it is, and, with worker 0, all of the shared memory."""
        yield from super().state()
        yield "origin", self._origin

    def load(self, state: dict[str, Any]) -> None:
        """Collective."""
        kernels.assign(self._origin, state["origin"])
        super().load(state)
