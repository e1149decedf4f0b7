"""DOWNPOUR: workers push what their local steps changed to a parameter server and continue from what it holds.

    every n_push steps    c <- c + d,  d <- 0       d: what the local steps changed since the last push
    every n_fetch steps   x <- c                    after a push of the same step
    every step            x <- x - eta*g(x),  d <- d - eta*g(x)

With one period tau for both this is the algorithm of Zhang's comparisons. p workers that push in turn are stable on a
quadratic of curvature h if and only if 1 - (1-eta*h)^tau < 2 sin(pi/(2(2p-1))). With more workers or a longer period
the center overshoots, because it takes every push in full. The learning rate should be about p times smaller than that
of SGD alone.

Source: Dean, Corrado, Monga et al., Large scale distributed deep networks, 2012, section 4.1 (n_push, n_fetch); as run
by Zhang, Choromanska, LeCun, Deep learning with Elastic Averaging SGD, 2015, https://arxiv.org/abs/1412.6651.

Deviations: the server adds displacements; the per-parameter rates (Adagrad) of Dean et al. are left out, as in Zhang's
runs. A fetch without a push keeps the displacement that was not pushed yet for the next push; until then x does not
contain it. With one worker and n_push dividing n_fetch every number is that of SGD, up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from mpitrain.algorithms.base.method import Interval
from mpitrain.algorithms.base.replica import Replica
from mpitrain.algorithms.base.settings import integer
from mpitrain.algorithms.parameter_server.center import DOWNPOUR_RATE, CenterMethod, CenterWorker
from mpitrain.algorithms.parameter_server.commit import Displacement
from mpitrain.theory import downpour_warning


@dataclass(frozen=True)
class Downpour(CenterMethod):
    """Asynchronous SGD with a parameter server, in its simplest form.

    With many workers, it becomes unstable earlier than its variants.

    Args:
        period: The number tau of local steps between two exchanges. In the papers, 1 is best, and 16 or more is
            unstable.
        push_period: The number n_push of local steps between two pushes; by default the period.
        fetch_period: The number n_fetch of local steps between two pulls; by default the period.
    """

    period: int = integer(1, "tau, local steps between exchanges", low=1)
    push_period: int | None = integer(
        None, "n_push, local steps between pushes; the period when not given", low=1, optional=True
    )
    fetch_period: int | None = integer(
        None, "n_fetch, local steps between pulls; the period when not given", low=1, optional=True
    )

    name: ClassVar[str] = "downpour"
    summary: ClassVar[str] = "a parameter server that adds up what the workers' local steps change"
    source: ClassVar[str] = "Dean et al. 2012, as run by Zhang, Choromanska, LeCun 2015, arXiv 1412.6651"
    communication: ClassVar[str] = "1/n_push pushed and 1/n_fetch pulled; 2/tau with one period"
    needs_gradient: ClassVar[bool] = False
    learning_rate_factor: ClassVar[float] = DOWNPOUR_RATE

    @property
    def n_push(self) -> int:
        """The number of local steps between two pushes."""
        return self.period if self.push_period is None else self.push_period

    @property
    def n_fetch(self) -> int:
        """The number of local steps between two pulls."""
        return self.period if self.fetch_period is None else self.fetch_period

    def interval(self, size: int) -> Interval:
        """Return the larger of n_push and n_fetch."""
        name = (
            "period"
            if self.period >= max(self.n_push, self.n_fetch)
            else ("push_period" if self.n_push >= self.n_fetch else "fetch_period")
        )
        return Interval(max(self.n_push, self.n_fetch), name)

    def warnings(self, size: int, learning_rate: float) -> Iterator[str]:
        """Yield a warning if the settings are outside the stability bound of workers that push in turn."""
        text = downpour_warning(size, self.n_push)
        if text is not None:
            yield text

    def worker(self, replica: Replica) -> DownpourWorker:
        """Make a worker. Collective."""
        return DownpourWorker(self, replica, Displacement(replica.x.local))


class DownpourWorker(CenterWorker):
    """A worker that pushes and pulls, each with its own period.

    Args:
        method: The hyper-parameters.
        replica: The vectors and the communicator to work with.
        displacement: The rule by which this worker commits.
    """

    def __init__(self, method: Downpour, replica: Replica, displacement: Displacement) -> None:
        super().__init__(method, replica, displacement)
        self._push, self._pull = displacement.push, displacement.pull
        for compiled in (self._push, self._pull):
            compiled(slice(0, 0), self._empty)

    def after_update(self) -> None:
        """Push and pull when due. If both are due, one visit does both, and the pull includes the push."""
        self._steps += 1
        pushes = (self.t + 1) % self._method.n_push == 0
        pulls = (self.t + 1) % self._method.n_fetch == 0
        if pushes and pulls:
            self.commit()
        elif pushes:
            self._center.update(self._push_limited, pulls=False)
            self._steps = 0
        elif pulls:
            self._center.update(self._pull, pushes=False)

    def _push_limited(self, part: slice, c: Any) -> int:
        """Push to a shard without pulling it."""
        self.limit(part)
        return self._push(part, c)
