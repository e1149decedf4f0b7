"""ADMM: consensus by multipliers, the method that EASGD is compared with.

    lam_i <- lam_i - (x_i - c)
    x_i   <- (x_i - eta*g_i(x_i) + eta*rho*(lam_i + c)) / (1 + eta*rho)
    c     <- (1/p) sum_j (x_j - lam_j)              the latest contribution x_j - lam_j of every worker

in this order, with the multipliers lam_i scaled by rho and the minimisation over x_i linearised. EASGD's springs let
the workers differ; here each worker's multiplier grows until it does not. At rest x_i = c, sum_i lam_i = 0 and sum_i
g_i(c) = 0: all workers agree on the minimum of the sum of their functions, however different these are.

    sync          all workers make their turn from the same center, which is then the mean of all contributions
    round_robin   one after the other, in the order of their ranks; each turn is seen by the next
    async         whenever they come. The center is recomputed after every K contributions (``arrivals``). With
                  ``max_delay`` a worker waits before its turn while a contribution of another one is more than T_max
                  turns older than its own.

A worker's parameters change in its own turn only, so that in ``round_robin`` all compute their gradients at once and
wait for the one before them only then: a step of every worker is a sweep, and no gradient is thrown away.

The center is kept up to date as c <- c + (new contribution - old one)/p, shard by shard under the shard's lock, so that
it takes the memory of one model and a turn the bytes of two, whatever p. Each worker keeps the contribution that it
has added. What remains is the rounding of the additions: after N turns c is at most N half-units in the last place from
the mean, typically sqrt(N). Nothing damps that error e: it looks like a multiplier, and the gradients at rest sum to
p*rho*e instead of 0. In float32 a million turns make it some 3e-5 of c. Models in 16 bits have their multipliers,
contributions and center in float32. ``sync`` adds up anew in every step.

Served in turn, three or more workers are unstable where eta times the curvature is small, unless eta*rho is large
enough (from 0.009 for 3 workers to 0.027 for very many), though each turn alone is stable: figure 1 of the paper.

Source: Zhang, Choromanska, LeCun, Deep learning with Elastic Averaging SGD, 2015, https://arxiv.org/abs/1412.6651,
section 4 (round robin). Boyd, Parikh, Chu, Peleato, Eckstein, Distributed optimization and statistical learning via
the alternating direction method of multipliers, 2011, section 7.1 (sync). Zhang, Kwok, Asynchronous distributed ADMM
for consensus optimization, 2014 (partial barrier, bounded delay).

Deviations: the exact form of the round-robin equations is our reading. K and T_max are settings of the workers, as
there is no server: T_max counts a worker's own turns. Shards of the center count their arrivals each for itself. The
last contribution of a worker that dies stays in the mean: at rest it is a spring of the others to that place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mpitrain import kernels, theory
from mpitrain.algorithms.base.method import Method, ParamGroupSlice, Replica, Worker, setting, wide_copy
from mpitrain.algorithms.base.peers import saves_shared_state
from mpitrain.errors import UsageError

ARRIVALS = 0
"""The tag of a shard that counts the contributions since the center was recomputed."""

ROUNDING = 1e-3
"""Of a center beside the mean of the contributions, as a part of the largest element: of many millions of turns."""

MOST_MODELLED = 32
"""Workers in the matrix that a warning asks: with more its radius hardly changes."""


@dataclass(frozen=True)
class ADMM(Method):
    """Workers are made to agree exactly, by multipliers that remember how far each was from the center.

    For workers whose data differ it has no bias, where EASGD has one; its noise is larger, and it is less stable.

    Args:
        mode: ``async``: workers make their turn whenever they come; ``round_robin``: one after the other; ``sync``: all
            at once.
        rho: The penalty on what a worker differs from the center.
        arrivals: K, for ``async``: contributions after which the center is recomputed.
        max_delay: T_max, for ``async``: turns by which a worker may be ahead of any other. The workers then wait for
            each other. Not bounded when it is not given.
    """

    mode: str = setting("async", "who makes its turn when", choices=("async", "round_robin", "sync"))
    rho: float = setting(1.0, "penalty on the distance from the center", above=0)
    arrivals: int = setting(1, "K, contributions between two centers (async)", low=1)
    max_delay: int | None = setting(None, "T_max, turns by which a worker may be ahead (async); any if none", low=1)

    name: ClassVar[str] = "admm"
    summary: ClassVar[str] = "consensus by multipliers: exact agreement, also of workers with different data"
    source: ClassVar[str] = "Zhang, Choromanska, LeCun 2015, arXiv 1412.6651, section 4"
    communication: ClassVar[str] = "2 (center pulled, contribution pushed), 4 if K > 1; sync 2(p-1)/p"
    owns_update: ClassVar[bool] = True
    learning_rate_factor: ClassVar[float] = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode != "async" and (self.arrivals, self.max_delay) != (1, None):
            raise UsageError(f"{self.name}: arrivals and max_delay are for mode async, not for {self.mode}")

    @property
    def is_synchronous(self) -> bool:
        """Whether workers wait for each other; only asynchronous ones without a bound on the delay do not."""
        return self.mode != "async" or self.max_delay is not None

    def elastic_coefficient(self, size: int, learning_rate: float) -> float:
        """rho."""
        return self.rho

    def warnings(self, size: int, learning_rate: float) -> Iterator[str]:
        """A penalty with which workers in turn drift apart in the flat directions of a loss."""
        p = min(size, MOST_MODELLED)
        if self.mode == "sync" or _is_stable_in_turn(p, learning_rate * self.rho):
            return
        least = 1e-3
        while not _is_stable_in_turn(p, least):
            least *= 1.05
        inside = 1.05 * least / learning_rate  # two digits of it are inside too
        yield (
            f"rho {self.rho:g} at learning rate {learning_rate:g} lets {size} workers in turn oscillate with growing "
            f"amplitude where the loss is flat (arXiv 1412.6651, figure 1): rho {inside:.2g} is inside"
        )

    def worker(self, replica: Replica) -> ADMMWorker:
        """Collective."""
        return SynchronousADMMWorker(self, replica) if self.mode == "sync" else TurnADMMWorker(self, replica)


def _is_stable_in_turn(p: int, eta_rho: float) -> bool:
    """Whether a round-robin sweep of p workers enlarges nothing in a direction without curvature."""
    return theory.spectral_radius(theory.round_robin_admm_matrix(1.0, eta_rho, p, h=0.0)) < 1 + 1e-9


class ADMMWorker(Worker):
    """What all modes share: x_i is what the model holds, lam_i is this worker's."""

    def __init__(self, method: ADMM, replica: Replica) -> None:
        super().__init__(replica)
        self._method = method
        self._dtype = kernels.accumulator(self.x.local.dtype)
        self._lam = np.zeros_like(self.x.local, dtype=self._dtype)
        self.velocities = (self._lam,)

    def state(self) -> Iterator[tuple[str, Any]]:
        """The clock and the multiplier."""
        yield from super().state()
        yield "multiplier", self._lam

    def load(self, state: dict[str, Any]) -> None:
        """Collective."""
        super().load(state)
        kernels.assign(self._lam, state["multiplier"])


class SynchronousADMMWorker(ADMMWorker):
    """Every worker keeps the center; one all-reduce a step makes it the mean of the contributions.

    A contribution is what it would be or, where that is not finite, the old center.
    """

    def __init__(self, method: ADMM, replica: Replica) -> None:
        super().__init__(method, replica)
        self._c = self.comm.vector(self.x.local.size, self._dtype)
        self._c.local[...] = self.x.local
        self.comm.broadcast(self._c.local)
        self.update(ParamGroupSlice(slice(0, 0), 0.0))  # compiled before the first step

    def update(self, group_slice: ParamGroupSlice) -> None:
        """The multiplier and x_i, and in place of the center this worker's contribution to the next one."""
        part, eta, decay = group_slice.part, group_slice.learning_rate, group_slice.weight_decay
        self.comm.statistics.n_nonfinite += kernels.admm_local(
            self.x.local[part], self._lam[part], self._c.local[part], self.g.local[part], eta, self._method.rho, decay
        )

    def after_update(self) -> None:
        """c <- (1/p) sum_j (x_j - lam_j)"""
        self.comm.allreduce(self._c, mean=True)

    def consensus(self, out: Any) -> None:
        """The center. Local."""
        out[...] = self._c.local

    def state(self) -> Iterator[tuple[str, Any]]:
        """The clock, the multiplier and this worker's copy of the center: all are equal."""
        yield from super().state()
        yield "center", self._c.local

    def load(self, state: dict[str, Any]) -> None:
        """Local."""
        super().load(state)
        kernels.assign(self._c.local, state["center"])


class TurnADMMWorker(ADMMWorker):
    """The center is shared: row 0 of the shared memory, and if K > 1 row 1 is the mean that it will be.

    Who has to wait for whom it sees on the others' clocks, the turns that each has made, one-sided.
    """

    def __init__(self, method: ADMM, replica: Replica) -> None:
        super().__init__(method, replica)
        x, size = self.x.local, self.comm.size
        self._rows = ("center",) if method.arrivals == 1 else ("center", "mean")
        self._center = self.comm.shared_vector(x.size, self._dtype, rows=len(self._rows))
        self._s = wide_copy(x)
        self._group_slices: list[ParamGroupSlice] = []
        self._clock = self.comm.numbers(1)
        self._seen = [0.0] * size
        self._awaited = self._who_comes_before()
        nothing = [self._s[:0].copy() for _ in self._rows]
        self._turn(slice(0, 0), nothing, ParamGroupSlice(slice(0, 0), 0.0))  # compiled before the first step
        self.comm.broadcast(self._s)
        self._seed(dict.fromkeys(self._rows, self._s))

    def before_update(self) -> None:
        """Wait for those who come before this turn."""
        if self._awaited:
            self.comm.wait_until(self._may_begin)

    def update(self, group_slice: ParamGroupSlice) -> None:
        """Note it: the shards of the center do not end where parameter groups do."""
        self._group_slices.append(group_slice)

    def after_update(self) -> None:
        """All three assignments at once, shard by shard."""
        self._center.update(self._visit)
        self._group_slices.clear()
        self._clock.local[0] = self.t + 1

    def consensus(self, out: Any) -> None:
        """The center. Local."""
        self._center.read(out)

    def state(self) -> Iterator[tuple[str, Any]]:
        """The clock, multiplier and contribution and, with one worker, the shared memory."""
        yield from super().state()
        yield "contribution", self._s
        if saves_shared_state(self.comm):
            if len(self._rows) > 1:
                yield "arrivals", self._center.read_tags()
            for row, name in enumerate(self._rows):
                values = np.empty(self._center.n, self._dtype)
                self._center.read(values, row)
                yield name, values

    def load(self, state: dict[str, Any]) -> None:
        """Collective."""
        super().load(state)
        kernels.assign(self._s, state["contribution"])
        self._clock.local[0] = self.t
        self._seen = [0.0] * self.comm.size
        self._seed(self._mended(state))

    def _mended(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state with the mean of the contributions as they are now, where that is another one. Collective.

        It is where a worker had died: the contribution that it begins with is that of another one.
        """
        mean = self._s.copy()
        self.comm.reduce(mean)
        if self.comm.rank != 0:
            return state
        mean = kernels.to_host(mean) / self.comm.size
        name = self._rows[-1]
        near = np.allclose(mean, state[name], rtol=0, atol=ROUNDING * float(np.abs(mean).max(initial=0.0)))
        return state if near else {**state, name: mean}

    def _visit(self, part: slice, shard: Any) -> int:
        """The turn in one shard, under its lock; with the K-th arrival in it the center becomes the mean."""
        rows = [shard] if len(self._rows) == 1 else list(shard)
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
        """lam_i, x_i and this worker's share of the mean, in one pass over a part of a shard."""
        kernel = kernels.admm_turn if len(rows) == 1 else kernels.admm_arrival
        own = (self.x.local[part], self._lam[part], self._s[part], self.g.local[part])
        eta, decay = group_slice.learning_rate, group_slice.weight_decay
        return kernel(*own, *rows, eta=eta, rho=self._method.rho, decay=decay, share=1.0 / self.comm.size)

    def _who_comes_before(self) -> list[tuple[int, int]]:
        """Peers, and by how many turns each must be ahead of this worker (behind it if negative) before it may begin.

        The worker that is furthest behind waits for nobody, so that somebody always goes on.
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
        """Whether a peer has made so many turns; its clock is looked at only when that is not known."""

        def note(clock: Any) -> None:
            self._seen[peer] = float(clock[0])

        if self._seen[peer] < turns:
            self.comm.read(self._clock, peer, note)
        return self._seen[peer] >= turns

    def _seed(self, values: dict[str, Any]) -> None:
        """Exactly one worker seeds the shared memory. Collective."""
        if self.comm.rank == 0:
            for row, name in enumerate(self._rows):
                self._center.write(values[name], row)
            if "arrivals" in values:
                self._center.write_tags(values["arrivals"])
        self.comm.barrier()
