"""A parameter server as seen by its workers, which commit the changes of their local steps and pull the center.

    o                the origin: what a worker pulled last; at the start x = o
    tau times        x <- x - eta*g(x)
    c <- c + a*d     the commit, d = x - o; a = 1 unless the method has another rule (``commit``)
    x, o <- c        the pull, which sees that commit

The displacement d is measured, so the local steps may be any torch optimizer's. The exchange follows the tau-th local
step, and the next gradient is taken at what was pulled.

There is no server process. The center lies in shards in the memory of all workers, each shard a parameter server with
its own clock: a commit and its pull are atomic shard by shard, and one worker can be ahead of another in one shard and
behind it in the next.

At the end of a run, ``finalize`` also commits the remaining local steps, which are fewer than tau: the center that is
evaluated contains every step. A checkpoint is taken before that, so that a continued run is in the middle of a period.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

from mpitrain.algorithms.base.clipping import Clip, clip_displacement
from mpitrain.algorithms.base.method import Method
from mpitrain.algorithms.base.replica import Replica
from mpitrain.algorithms.base.shared_rows import SharedRows
from mpitrain.algorithms.base.state import Common
from mpitrain.algorithms.base.worker import Worker
from mpitrain.algorithms.parameter_server.commit import CommitRule

DOWNPOUR_RATE = 0.25
"""The learning rate of methods whose center takes every commit in full, relative to that of SGD alone.

It should be about 1/p; this is for some four workers.
"""


@dataclass(frozen=True)
class CenterMethod(Method):
    """The base class of parameter servers without a server process: each worker visits a shared center.

    Args:
        clip_displacement: The largest Euclidean norm C by which a commit moves the center. A longer displacement is
            scaled (``base.clipping``).
    """

    _: KW_ONLY
    clip_displacement: float | None = clip_displacement()

    communication: ClassVar[str] = "2/tau (commit and pull)"
    starts_at: ClassVar[str | None] = "center"
    averages_optimizer: ClassVar[bool] = False
    goes_on: ClassVar[str] = "center"
    begins_anew: ClassVar[str] = "steps not committed; optimizer states"
    metrics: ClassVar[tuple[str, ...]] = ("staleness",)

    @property
    def is_synchronous(self) -> bool:
        """False: no worker waits for another."""
        return False


class CenterWorker(Worker):
    """A worker that visits the center every ``period`` local steps.

    Args:
        method: The method. It has the setting ``period``, unless a subclass overrides ``is_due``.
        replica: The vectors and the communicator to work with.
        rule: The rule of commits and pulls.
    """

    persistent: ClassVar[tuple[str, ...]] = ("_steps", "_rule", Common("_rows"))

    def __init__(self, method: Any, replica: Replica, rule: CommitRule) -> None:
        super().__init__(replica)
        self._method, self._rule = method, rule
        self._steps = 0  # since the last commit
        x = self.x.local
        start = {name: rule.start(name, x) for name in rule.rows}
        self._rows = SharedRows(self.comm, start, tags=rule.tags, counts_pulls=True)
        self._center = self._rows.vector
        self._clip = Clip.of(method, self.comm)
        self._empty = self._rows.empty_shard(x)
        self.visit(slice(0, 0), self._empty)  # compiled now

    def visit(self, part: slice, c: Any) -> int:
        """Commit to a locked shard and pull it, in one pass; return the number of non-finite elements."""
        self.limit(part)
        return self._rule(part, c, self._center, self._steps)

    def limit(self, part: slice) -> None:
        """Scale the commit to a shard if it exceeds the shard's share of ``clip_displacement``. Local."""
        if self._clip is not None and part.stop > part.start:
            self._rule.limit(part, self._clip, self._clip.share_of(range(part.start, part.stop), self._center.n))

    def after_update(self) -> None:
        """Commit and pull if a visit to the center is due."""
        self._steps += 1
        if self.is_due():
            self.commit()

    def is_due(self) -> bool:
        """Return whether this step ends with a visit to the center."""
        return self._steps >= int(self._method.period)

    def commit(self) -> None:
        """Commit and pull. Local."""
        self._center.update(self.visit)
        self._steps = 0

    def exchange_remaining(self) -> None:
        """Commit the local steps of an unfinished period. Local."""
        if self._steps:
            self.commit()

    def consensus(self, out: Any) -> None:
        """Write the center, or the shared vector that the commit rule declares by ``evaluated_row``. Local."""
        self._rows.read(out, self._rule.evaluated_row)

    def metrics(self) -> dict[str, float]:
        """Return the staleness: the number of commits by other workers between the last two visits. Local."""
        return {"staleness": float(self._center.staleness)}
