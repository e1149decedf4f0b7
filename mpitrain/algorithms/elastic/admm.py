"""ADMM: consensus by multipliers, the method that EASGD is compared with.

    lam_i <- lam_i - (x_i - c)
    x_i   <- (x_i - eta*g_i(x_i) + eta*rho*(lam_i + c)) / (1 + eta*rho)
    c     <- (1/p) sum_j (x_j - lam_j)              the latest contribution x_j - lam_j of every worker

in this order, with the multipliers lam_i scaled by rho and the minimisation over x_i linearised. EASGD's springs let
the workers differ; here a worker's multiplier grows until the worker equals the center. At rest x_i = c,
sum_i lam_i = 0 and sum_i g_i(c) = 0: all workers agree on the minimum of the sum of their functions, however different
these are.

    sync          all workers make their turn from the same center, which then becomes the mean of all contributions
    round_robin   one after the other, in the order of their ranks; each turn sees the one before
    async         in any order. The center is recomputed after every K contributions (``arrivals``). With ``max_delay``
                  a worker waits before its turn while another worker's contribution is more than T_max turns older
                  than its own.

Only a worker's own turn changes its parameters. So in ``round_robin`` all workers compute their gradients at once and
wait for their predecessor only afterwards: a step of every worker is a sweep, and no gradient is wasted.

The center is updated as c <- c + (new contribution - old one)/p, shard by shard under the shard's lock. The center
takes the memory of one model, and a turn transfers the bytes of two, whatever p is. Each worker keeps the contribution
that it has added. The additions leave a rounding error e: after N turns c is at most N half-units in the last place
from the mean, typically sqrt(N). Nothing damps e. It acts like a multiplier, so that the gradients at rest sum to
p*rho*e instead of 0. In float32, e is about 3e-5 of c after a million turns. Models in 16 bits have their multipliers,
contributions and center in float32. ``sync`` computes the sum anew at every step.

In ``round_robin``, three or more workers are unstable where eta times the curvature is small, unless eta*rho is large
enough (from 0.009 for 3 workers to 0.027 for very many). Each turn alone is stable nevertheless: figure 1 of the paper.

Source: Zhang, Choromanska, LeCun, Deep learning with Elastic Averaging SGD, 2015, https://arxiv.org/abs/1412.6651,
section 4 (round robin). Boyd, Parikh, Chu, Peleato, Eckstein, Distributed optimization and statistical learning via
the alternating direction method of multipliers, 2011, section 7.1 (sync). Zhang, Kwok, Asynchronous distributed ADMM
for consensus optimization, 2014 (partial barrier, bounded delay).

Deviations: the exact form of the round-robin equations is our reading. There is no server, so K and T_max are settings
of the workers, and T_max counts a worker's own turns. Each shard of the center counts its own arrivals. The last
contribution of a worker that dies stays in the mean: at rest it acts on the others as a spring to that place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mpitrain import kernels, theory
from mpitrain.algorithms.base.method import Method
from mpitrain.algorithms.base.precision import wide_copy
from mpitrain.algorithms.base.replica import ParamGroupSlice, Replica
from mpitrain.algorithms.base.settings import choice, integer, number
from mpitrain.algorithms.base.shared_rows import SharedRows
from mpitrain.algorithms.base.state import Common, Located
from mpitrain.algorithms.base.worker import Worker
from mpitrain.errors import UsageError

ARRIVALS = 0
"""The tag of a shard that counts the contributions since the center was recomputed."""

ROUNDING = 1e-3
"""The largest distance of a center from the mean of the contributions that rounding explains, after many millions of
turns, relative to the largest element."""

MOST_MODELLED = 32
"""The largest number of workers in the matrix behind a warning: with more its spectral radius hardly changes."""


@dataclass(frozen=True)
class ADMM(Method):
    """Consensus ADMM: multipliers add up each worker's distance from the center, until all workers agree exactly.

    If the workers have different data, ADMM has no bias, in contrast to EASGD. It has more noise and is less stable.

    Args:
        mode: The order of the workers' turns: ``async`` for any order, ``round_robin`` for one after the other,
            ``sync`` for all at once.
        rho: The penalty on the distance between a worker and the center.
        arrivals: With ``async``, the number K of contributions after which the center is recomputed.
        max_delay: With ``async``, the number T_max of turns by which a worker may be ahead of any other before it
            waits. The default is unbounded.
    """

    mode: str = choice("async", "who makes its turn when", ("async", "round_robin", "sync"))
    rho: float = number(1.0, "penalty on the distance from the center", above=0)
    arrivals: int = integer(1, "K, contributions between two centers (async)", low=1)
    max_delay: int | None = integer(
        None, "T_max, turns by which a worker may be ahead (async); any if none", low=1, optional=True
    )

    name: ClassVar[str] = "admm"
    summary: ClassVar[str] = "consensus by multipliers: exact agreement, also of workers with different data"
    source: ClassVar[str] = "Zhang, Choromanska, LeCun 2015, arXiv 1412.6651, section 4"
    communication: ClassVar[str] = "2 (center pulled, contribution pushed), 4 if K > 1; sync 2(p-1)/p"
    starts_at: ClassVar[str | None] = "center"
    can_lose_workers: ClassVar[bool] = False
    averages_optimizer: ClassVar[bool] = False
    goes_on: ClassVar[str] = "center"
    begins_anew: ClassVar[str] = "the workers' distances from the center; multipliers, which start at 0"
    owns_update: ClassVar[bool] = True
    learning_rate_factor: ClassVar[float] = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode != "async" and (self.arrivals, self.max_delay) != (1, None):
            raise UsageError(f"{self.name}: arrivals and max_delay are for mode async, not for {self.mode}")

    @property
    def is_synchronous(self) -> bool:
        """Whether workers wait for each other. Only asynchronous workers without a bound on the delay do not wait."""
        return self.mode != "async" or self.max_delay is not None

    def elastic_coefficient(self, size: int, learning_rate: float) -> float:
        """Return rho."""
        return self.rho

    def warnings(self, size: int, learning_rate: float) -> Iterator[str]:
        """Yield a warning if the penalty lets round-robin workers drift apart in flat directions of the loss."""
        p = min(size, MOST_MODELLED)
        if self.mode == "sync" or _is_stable_in_turn(p, learning_rate * self.rho):
            return
        least = 1e-3
        while not _is_stable_in_turn(p, least):
            least *= 1.05
        inside = 1.05 * least / learning_rate  # inside when rounded to two digits, too
        yield (
            f"rho {self.rho:g} at learning rate {learning_rate:g} lets {size} workers in turn oscillate with growing "
            f"amplitude where the loss is flat (arXiv 1412.6651, figure 1): rho {inside:.2g} is inside"
        )

    def worker(self, replica: Replica) -> ADMMWorker:
        """Make a worker. Collective."""
        return SynchronousADMMWorker(self, replica) if self.mode == "sync" else TurnADMMWorker(self, replica)


def _is_stable_in_turn(p: int, eta_rho: float) -> bool:
    """Whether a round-robin sweep of p workers enlarges nothing in a direction without curvature."""
    return theory.spectral_radius(theory.round_robin_admm_matrix(1.0, eta_rho, p, h=0.0)) < 1 + 1e-9


class ADMMWorker(Worker):
    """A worker with its multiplier; the model holds x_i."""

    persistent: ClassVar[tuple[str, ...]] = ("_multiplier",)

    def __init__(self, method: ADMM, replica: Replica) -> None:
        super().__init__(replica)
        self._method = method
        self._dtype = kernels.accumulator(self.x.local.dtype)
        self._multiplier = np.zeros_like(self.x.local, dtype=self._dtype)  # lam_i
        self.velocities = (self._multiplier,)


class SynchronousADMMWorker(ADMMWorker):
    """A worker with a copy of the center. At each step, an all-reduce computes the center.

    The center is the mean of the workers' contributions. The elements of the old center replace non-finite elements of
    a contribution.
    """

    persistent: ClassVar[tuple[str, ...]] = (Common("_center"),)

    def __init__(self, method: ADMM, replica: Replica) -> None:
        super().__init__(method, replica)
        self._center = self.comm.vector(self.x.local.size, self._dtype)
        self._center.local[...] = self.x.local
        self.comm.broadcast(self._center.local)
        self.update(ParamGroupSlice(slice(0, 0), 0.0))  # compiled before the first step

    def update(self, group_slice: ParamGroupSlice) -> None:
        """Update lam_i and x_i, and overwrite the copy of the center with the contribution to the next one."""
        part, eta, decay = group_slice.part, group_slice.learning_rate, group_slice.weight_decay
        x, lam, c, g = self.x.local[part], self._multiplier[part], self._center.local[part], self.g.local[part]
        self.comm.statistics.n_nonfinite += kernels.admm_local(x, lam, c, g, eta, self._method.rho, decay)

    def after_update(self) -> None:
        """Compute c <- (1/p) sum_j (x_j - lam_j). Collective."""
        self.comm.allreduce(self._center, mean=True)

    def consensus(self, out: Any) -> None:
        """Write the center. Local."""
        out[...] = self._center.local


class TurnADMMWorker(ADMMWorker):
    """A worker that makes its turns alone, with a shared center. With K > 1, a second shared vector is the next center.

    Each worker has a clock that counts its turns. Workers read each other's clocks to find out whose turn it is.
    """

    persistent: ClassVar[tuple[str, ...]] = (Located("_contribution"), "_clock", Common("_rows"))

    def __init__(self, method: ADMM, replica: Replica) -> None:
        super().__init__(method, replica)
        self._contribution = wide_copy(self.x.local)  # s_i = x_i - lam_i, as added to the mean
        self._group_slices: list[ParamGroupSlice] = []
        self._clock = self.comm.numbers(1)
        self._seen = [0.0] * self.comm.size
        self._awaited = self._predecessors()
        self.comm.broadcast(self._contribution)
        if method.arrivals == 1:
            self._rows = SharedRows(self.comm, {"center": self._contribution})
        else:
            start = {"center": self._contribution, "mean": self._contribution}
            self._rows = SharedRows(self.comm, start, tags="arrivals")
        self._n_rows = 1 if method.arrivals == 1 else 2
        self._center = self._rows.vector
        nothing = [self._contribution[:0].copy() for _ in range(self._n_rows)]
        self._turn(slice(0, 0), nothing, ParamGroupSlice(slice(0, 0), 0.0))  # compiled before the first step

    def before_update(self) -> None:
        """Wait until it is this worker's turn."""
        if self._awaited:
            self.comm.wait_until(self._may_begin)

    def update(self, group_slice: ParamGroupSlice) -> None:
        """Store the parameter group. The update follows in ``after_update``, by shards."""
        self._group_slices.append(group_slice)

    def after_update(self) -> None:
        """Update lam_i, x_i and the center together, shard by shard."""
        self._center.update(self._visit)
        self._group_slices.clear()
        self._clock.local[0] = self.t + 1

    def exchange_remaining(self) -> None:
        """Recompute the center, even if fewer than K contributions have arrived since the last time. Local."""
        if self._n_rows > 1:
            self._center.update(self._recompute)

    def _recompute(self, part: slice, shard: Any) -> int:
        """Compute c <- the mean of the contributions, in one shard"""
        kernels.copy(shard[0], shard[1])
        self._center.tags[ARRIVALS] = 0
        return 0

    def consensus(self, out: Any) -> None:
        """Write the center. Local."""
        self._center.read(out)

    def after_load(self) -> None:
        """Forget the peers' clocks, and recompute the center if a worker was dead when the run was saved. Collective.

        Such a worker starts with the contribution of another worker, which changes the mean of the contributions.
        """
        self._seen = [0.0] * self.comm.size
        self._clock.local[0] = self.t
        total = self._contribution.copy()
        self.comm.reduce(total)
        if self.comm.rank == 0:
            mean, found = kernels.to_host(total) / self.comm.size, np.empty(self._center.n, self._dtype)
            self._rows.read(found, self._n_rows - 1)
            tolerance = ROUNDING * float(np.abs(mean).max(initial=0.0))
            if not np.allclose(mean, found, rtol=0, atol=tolerance):
                self._rows.write(mean, self._n_rows - 1)

    def _visit(self, part: slice, shard: Any) -> int:
        """Make the turn in one shard, under its lock; the K-th arrival there replaces the center by the mean."""
        rows = [shard] if self._n_rows == 1 else list(shard)
        n_nonfinite = 0
        for group_slice in self._group_slices:
            start, stop = max(part.start, group_slice.part.start), min(part.stop, group_slice.part.stop)
            if start < stop:
                within = slice(start - part.start, stop - part.start)
                n_nonfinite += self._turn(slice(start, stop), [row[within] for row in rows], group_slice)
        if len(rows) > 1:
            self._center.tags[ARRIVALS] += 1
            if self._center.tags[ARRIVALS] == self._method.arrivals:
                kernels.copy(rows[0], rows[1])
                self._center.tags[ARRIVALS] = 0
        return n_nonfinite

    def _turn(self, part: slice, rows: Sequence[Any], group_slice: ParamGroupSlice) -> int:
        """Move lam_i, x_i and this worker's share of the mean, in one pass over a part of a shard."""
        kernel = kernels.admm_turn if len(rows) == 1 else kernels.admm_arrival
        own = (self.x.local[part], self._multiplier[part], self._contribution[part], self.g.local[part])
        eta, decay = group_slice.learning_rate, group_slice.weight_decay
        return kernel(*own, *rows, eta=eta, rho=self._method.rho, decay=decay, share=1.0 / self.comm.size)

    def _predecessors(self) -> list[tuple[int, int]]:
        """Return the peers to wait for, and by how many turns each must be ahead of this worker (behind if negative).

        The worker that is furthest behind waits for no other, so that at least one always proceeds.
        """
        rank, size = self.comm.rank, self.comm.size
        if self._method.mode == "round_robin":
            return [(rank - 1, 1) if rank else (size - 1, 0)]
        if self._method.max_delay is None:
            return []
        return [(peer, -self._method.max_delay) for peer in range(size) if peer != rank]

    def _may_begin(self) -> bool:
        return all(self._has_made(peer, self.t + ahead) for peer, ahead in self._awaited)

    def _has_made(self, peer: int, turns: int) -> bool:
        """Return whether a peer has made at least ``turns`` turns; read its clock only if that is not known yet."""

        def note(clock: Any) -> None:
            self._seen[peer] = float(clock[0])

        if self._seen[peer] < turns:
            self.comm.read(self._clock, peer, note)
        return self._seen[peer] >= turns
