"""Robust aggregation rules without memory: one gradient from those of all workers, some of which may be arbitrary.

    mean                (1/m) sum_i g_i
    median              of each coordinate
    trimmed_mean        of each coordinate, without its f largest and f smallest values
    krum                the g_i with the least sum of squared distances to its m - f - 2 nearest gradients
    geometric_median    argmin_y sum_i ||y - g_i||
    centered_clipping   v <- v + (1/m) sum_i (g_i - v) * min(1, r/||g_i - v||),  v = the aggregate of the step before

for m workers, f of them Byzantine. The local update is any torch optimizer's, with the aggregate as its gradient; all
workers use the same optimizer, so that their parameters stay equal to the last bit. Every rule leaves out gradients
that are not finite. If no gradient is finite, all workers skip the step.

Source: Yin, Chen, Ramchandran, Bartlett, Byzantine-Robust Distributed Learning, 2018, https://arxiv.org/abs/1803.01498
(median, trimmed mean); Blanchard, El Mhamdi, Guerraoui, Stainer, Machine Learning with Adversaries, 2017,
https://arxiv.org/abs/1703.02757 (Krum); Pillutla, Kakade, Harchaoui, Robust Aggregation for Federated Learning, 2019,
https://arxiv.org/abs/1912.13445 (geometric median by smoothed Weiszfeld steps); Karimireddy, He, Jaggi, Learning from
History for Byzantine Robust Optimization, 2021, https://arxiv.org/abs/2012.10333 (centered clipping).

Krum, the geometric median and centered clipping return a weighted mean of the gradients (and v). The weights follow
from all pairwise distances, which are m^2 numbers, whatever the size of the model.

Deviations: in centered clipping workers send gradients and not momenta, so that all rules aggregate the same vectors;
the default of its radius r, the median of the distances from v, is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mpitrain.algorithms.base.method import Method
from mpitrain.algorithms.base.replica import Replica
from mpitrain.algorithms.base.settings import choice, integer, number
from mpitrain.algorithms.base.state import Common, State
from mpitrain.algorithms.base.worker import Worker
from mpitrain.algorithms.byzantine.gradient_slices import COMMUNICATION, GradientSlices, SliceState
from mpitrain.errors import UsageError

RULES = ("mean", "median", "trimmed_mean", "krum", "geometric_median", "centered_clipping")
WEISZFELD_STEPS = 50
"""The largest number of steps; they end earlier when no weight changes by more than the tolerance."""
WEISZFELD_TOLERANCE = 1e-6


@dataclass(frozen=True)
class RobustSGD(Method):
    """All-reduce SGD with a robust rule in place of the mean, for workers that may send wrong gradients.

    The rule considers each step separately. It therefore cannot detect a steady error that is small compared with the
    noise of a step. ``SafeguardSGD`` can.

    Args:
        rule: The name of the rule; see the description of the module.
        n_byzantine: The expected number f of bad workers, for the trimmed mean and Krum. The default is the largest
            number that Krum allows among m workers: 2f + 2 < m.
        clip_radius: The radius r of centered clipping. The default is the median of the gradients' distances from v,
            the aggregate of the previous step.
    """

    rule: str = choice("median", "how one gradient is made of all", RULES)
    n_byzantine: int | None = integer(
        None, "f, bad workers to reckon with; the most Krum allows when not given", low=0, optional=True
    )
    clip_radius: float | None = number(
        None, "r of centered clipping; the median distance when not given", above=0, optional=True
    )

    name: ClassVar[str] = "robust"
    summary: ClassVar[str] = "synchronous SGD on a robust mean of all gradients: median, Krum, ..."
    source: ClassVar[str] = "Yin et al. 2018, arXiv 1803.01498; Blanchard et al. 2017, arXiv 1703.02757"
    can_join: ClassVar[bool] = False
    lost: ClassVar[str] = "the vector v of centered clipping, which starts at 0 again"
    communication: ClassVar[str] = COMMUNICATION
    goes_on: ClassVar[str] = "everything"
    begins_anew: ClassVar[str] = "nothing"
    combines_gradients: ClassVar[bool] = True
    on_host: ClassVar[bool] = True

    def tolerated(self, size: int) -> int:
        """Return the number f of bad workers among ``size`` workers that the rule is set to tolerate.

        Raises:
            UsageError: The rule cannot tolerate so many bad workers.
        """
        if self.n_byzantine is None:
            return max((size - 3) // 2, 0)
        most = {"krum": max((size - 3) // 2, 0), "trimmed_mean": (size - 1) // 2}.get(self.rule, size)
        if self.n_byzantine > most:
            raise UsageError(
                f"robust: {self.rule} among {size} workers works with n_byzantine <= {most}, not {self.n_byzantine}"
            )
        return self.n_byzantine

    def check_size(self, size: int) -> None:
        """Check that the rule tolerates ``n_byzantine`` among ``size`` workers. Local."""
        self.tolerated(size)

    def entries_after_death(self, state: State, worker: Any, survivors: Sequence[int]) -> State:
        """Return the entries; v of centered clipping, whose slice the dead worker had, begins at 0 again. Local."""
        return dict(worker.state()) | {name: state[name] for name in state if name != "aggregate"}

    def worker(self, replica: Replica) -> RobustWorker:
        """Make a worker. Collective."""
        return (ClippingWorker if self.rule == "centered_clipping" else RobustWorker)(self, replica)


class RobustWorker(Worker):
    """A worker that computes the aggregate in its slice of the vector."""

    n_extra = 0  # rows after those of the gradients

    def __init__(self, method: RobustSGD, replica: Replica) -> None:
        super().__init__(replica)
        self._method = method
        self._n_byzantine = method.tolerated(self.comm.size)
        self._slices = GradientSlices(self.comm, self.g, self.n_extra)

    def combine_gradients(self) -> None:
        """Compute g <- rule(g_1, ..., g_m); skip the step if no gradient is finite. Collective."""
        slices, rule = self._slices, self._method.rule
        slices.exclude_own(self.skips)
        n_bad = slices.collect(range(self.comm.size))
        if rule in ("mean", "median", "trimmed_mean"):
            finite = np.flatnonzero(slices.total(n_bad) == 0)
            self._middle(finite)
        else:
            k = len(slices.rows.values)
            squares = slices.rows.squared_distances(np.arange(k))
            found = slices.total(np.concatenate([n_bad, squares.ravel()]))
            finite = np.flatnonzero(found[: self.comm.size] == 0)
            squares = found[self.comm.size :].reshape(k, k)
            slices.rows.weighted_sum(self._weights(squares, finite), slices.mine)
        slices.share()
        self.has_common_gradient, self.skips = True, not len(finite)

    def consensus(self, out: Any) -> None:
        """Write this worker's parameters, which are equal on all workers. Local."""
        out[...] = self.x.local

    def _middle(self, chosen: np.ndarray) -> None:
        """Apply a rule to each coordinate by itself; the aggregate is 0 if no worker is left."""
        if not len(chosen):
            self._slices.mine[...] = 0
            return
        most = (len(chosen) - 1) // 2
        n_cut = {"mean": 0, "median": most, "trimmed_mean": min(self._n_byzantine, most)}[self._method.rule]
        self._slices.rows.trimmed_mean(chosen, n_cut, self._slices.mine)

    def _weights(self, squares: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """Return the weights (rows,) of a rule that is a weighted mean, from squared distances (rows, rows)."""
        weights = np.zeros(len(squares))
        if len(chosen):
            among = squares[np.ix_(chosen, chosen)]
            weights[chosen] = krum(among, self._n_byzantine) if self._method.rule == "krum" else geometric_median(among)
        return weights


class ClippingWorker(RobustWorker):
    """A worker with centered clipping. It keeps its slice of v as one more row beside those of the gradients."""

    persistent: ClassVar[tuple[str, ...]] = (Common("_saved"),)
    n_extra = 1

    def __init__(self, method: RobustSGD, replica: Replica) -> None:
        super().__init__(method, replica)
        self._aggregate = self._slices.rows.values[-1]  # v
        self._saved = SliceState("aggregate", self._slices.part, self._aggregate)

    def combine_gradients(self) -> None:
        """Compute v <- v + mean of the clipped differences from v. Collective."""
        super().combine_gradients()
        self._aggregate[...] = self._slices.mine

    def _weights(self, squares: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """Return (1/m)*c_i for each gradient and 1 - mean(c) for v, with c_i = min(1, r/||g_i - v||)."""
        weights = np.zeros(len(squares))
        weights[-1] = 1.0
        if len(chosen):
            weights[chosen] = clipping(np.sqrt(squares[-1, chosen]), self._method.clip_radius) / len(chosen)
            weights[-1] -= weights[chosen].sum()
        return weights


def krum(squares: np.ndarray, n_byzantine: int) -> np.ndarray:
    """Return weights (m,), given squared distances (m, m): 1 for the vector that Krum selects, 0 for the others."""
    m = len(squares)
    n_nearest = max(m - n_byzantine - 2, 1)
    nearest = np.sort(squares, axis=1)[:, 1 : 1 + n_nearest]  # without itself
    return np.eye(m)[int(np.argmin(nearest.sum(axis=1)))]


def geometric_median(squares: np.ndarray) -> np.ndarray:
    """Return the weights (m,) of the geometric median of m vectors, from their squared distances (m, m).

    The function iterates Weiszfeld's step y <- sum_i (g_i/||y - g_i||) / sum_i 1/||y - g_i||. The iterate y is a
    weighted mean of the vectors, so the step needs only the weights w and the squared distances D:

        y = sum_i w_i g_i,   sum_i w_i = 1,   ||y - g_j||^2 = sum_i w_i D_ij - (1/2) sum_ik w_i w_k D_ik

    A vector at an infinite distance has weight 0.
    """
    m = len(squares)
    near = np.isfinite(squares).sum(axis=1) * 2 > m
    w = near / max(near.sum(), 1)
    squares = np.where(np.isfinite(squares), squares, 0.0)
    scale = float(np.sqrt(squares.max(initial=0.0)))
    if scale == 0:
        return w
    for _ in range(WEISZFELD_STEPS):
        away = squares @ w
        distances = np.sqrt(np.maximum(away - 0.5 * (w @ away), 0.0))
        new = near / np.maximum(distances, 1e-9 * scale)
        new /= new.sum()
        done = np.abs(new - w).max() < WEISZFELD_TOLERANCE
        w = new
        if done:
            break
    return w


def clipping(distances: np.ndarray, radius: float | None) -> np.ndarray:
    """Return the factors c_i = min(1, r/distance_i), (m,). If r is None, it is the median of the distances."""
    r = float(np.median(distances)) if radius is None else radius
    return np.minimum(1.0, np.divide(r, distances, out=np.ones_like(distances), where=distances > 0))
