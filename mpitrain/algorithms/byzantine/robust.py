"""Robust rules without a memory: one gradient from those of all workers, some of which may be anything.

    mean                (1/m) sum_i g_i
    median              of each coordinate
    trimmed_mean        of each coordinate, without its f largest and f smallest values
    krum                the g_i with the least sum of squared distances to its m - f - 2 nearest
    geometric_median    argmin_y sum_i ||y - g_i||
    centered_clipping   v <- v + (1/m) sum_i (g_i - v) * min(1, r/||g_i - v||),  v = the aggregate of the step before

for m workers, f of them Byzantine. The local update is any torch optimizer's, with the aggregate as gradient; all
workers take the same one, so that their parameters stay equal to the last bit. A gradient that is not finite is left
out, whatever the rule.

Source: Yin, Chen, Ramchandran, Bartlett, Byzantine-Robust Distributed Learning, 2018, https://arxiv.org/abs/1803.01498
(median, trimmed mean); Blanchard, El Mhamdi, Guerraoui, Stainer, Machine Learning with Adversaries, 2017,
https://arxiv.org/abs/1703.02757 (Krum); Pillutla, Kakade, Harchaoui, Robust Aggregation for Federated Learning, 2019,
https://arxiv.org/abs/1912.13445 (geometric median by smoothed Weiszfeld steps); Karimireddy, He, Jaggi, Learning from
History for Byzantine Robust Optimization, 2021, https://arxiv.org/abs/2012.10333 (centered clipping).

Krum, the geometric median and centered clipping return a weighted mean of the gradients (and v), with weights that
follow from all pairwise distances: they are chosen among m numbers, whatever the size of the model.

Deviations: the workers of centered clipping send gradients and not momenta, so that all rules see the same; its radius
r, where it is not given, is the median of the distances from v, which is ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mpitrain.algorithms.base.method import Method, Replica, Worker, setting
from mpitrain.algorithms.byzantine.gradient_slices import COMMUNICATION, GradientSlices
from mpitrain.errors import UsageError

RULES = ("mean", "median", "trimmed_mean", "krum", "geometric_median", "centered_clipping")
WEISZFELD_STEPS = 50
"""At most, and until no weight changes by more than this:"""
WEISZFELD_TOLERANCE = 1e-6


@dataclass(frozen=True)
class RobustSGD(Method):
    """All-reduce SGD with a robust rule in place of the mean, for when some workers may send wrong gradients.

    Each step is judged by itself, so an error that is small beside the noise of a step is not seen, however steady it
    is; ``SafeguardSGD`` sees it.

    Args:
        rule: Which; see above.
        n_byzantine: f, the number of bad workers to reckon with (trimmed mean, Krum); the most Krum allows,
            2f + 2 < m, when it is not given.
        clip_radius: r of centered clipping; the median of the distances from v when it is not given.
    """

    rule: str = setting("median", "how one gradient is made of all", choices=RULES)
    n_byzantine: int | None = setting(None, "f, bad workers to reckon with; the most Krum allows when not given", low=0)
    clip_radius: float | None = setting(None, "r of centered clipping; the median distance when not given", above=0)

    name: ClassVar[str] = "robust"
    summary: ClassVar[str] = "synchronous SGD on a robust mean of all gradients: median, Krum, ..."
    source: ClassVar[str] = "Yin et al. 2018, arXiv 1803.01498; Blanchard et al. 2017, arXiv 1703.02757"
    communication: ClassVar[str] = COMMUNICATION
    on_host: ClassVar[bool] = True

    def tolerated(self, size: int) -> int:
        """f among ``size`` workers.

        Raises:
            UsageError: When the rule cannot work with as many as were given.
        """
        if self.n_byzantine is None:
            return max((size - 3) // 2, 0)
        most = {"krum": max((size - 3) // 2, 0), "trimmed_mean": (size - 1) // 2}.get(self.rule, size)
        if self.n_byzantine > most:
            raise UsageError(
                f"robust: {self.rule} among {size} workers works with n_byzantine <= {most}, not {self.n_byzantine}"
            )
        return self.n_byzantine

    def worker(self, replica: Replica) -> RobustWorker:
        """Collective."""
        return (ClippingWorker if self.rule == "centered_clipping" else RobustWorker)(self, replica)


class RobustWorker(Worker):
    """No state but the parameters."""

    n_extra = 0  # rows beside those of the gradients

    def __init__(self, method: RobustSGD, replica: Replica) -> None:
        super().__init__(replica)
        self._method = method
        self._n_byzantine = method.tolerated(self.comm.size)
        self._slices = GradientSlices(self.comm, self.g, self.n_extra)

    def before_update(self) -> None:
        """g <- rule(g_1, ..., g_m)"""
        slices, rule = self._slices, self._method.rule
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

    def consensus(self, out: Any) -> None:
        """Any worker's parameters: they are equal. Local."""
        out[...] = self.x.local

    def _middle(self, who: np.ndarray) -> None:
        """The rules that look at each coordinate by itself; 0 where nobody is left."""
        if not len(who):
            self._slices.mine[...] = 0
            return
        most = (len(who) - 1) // 2
        n_cut = {"mean": 0, "median": most, "trimmed_mean": min(self._n_byzantine, most)}[self._method.rule]
        self._slices.rows.trimmed_mean(who, n_cut, self._slices.mine)

    def _weights(self, squares: np.ndarray, who: np.ndarray) -> np.ndarray:
        """The rules that are a weighted mean: (rows,) weights, from (rows, rows) squared distances."""
        weights = np.zeros(len(squares))
        if len(who):
            among = squares[np.ix_(who, who)]
            weights[who] = krum(among, self._n_byzantine) if self._method.rule == "krum" else geometric_median(among)
        return weights


class ClippingWorker(RobustWorker):
    """Centered clipping: the row after the gradients is v, of which each worker has its slice."""

    n_extra = 1

    def before_update(self) -> None:
        """v <- v + mean of the clipped differences from v"""
        super().before_update()
        self._v[...] = self._slices.mine

    def state(self) -> Iterator[tuple[str, Any]]:
        """The clock and this worker's slice of v."""
        yield from super().state()
        yield "aggregate", self._v

    def load(self, state: dict[str, Any]) -> None:
        """Local."""
        super().load(state)
        self._v[...] = state["aggregate"]

    @property
    def _v(self) -> Any:
        return self._slices.rows.values[-1]

    def _weights(self, squares: np.ndarray, who: np.ndarray) -> np.ndarray:
        """(1/m)*c_i for each gradient, 1 - mean(c) for v, with c_i = min(1, r/||g_i - v||)"""
        weights = np.zeros(len(squares))
        weights[-1] = 1.0
        if len(who):
            weights[who] = clipping(np.sqrt(squares[-1, who]), self._method.clip_radius) / len(who)
            weights[-1] -= weights[who].sum()
        return weights


def krum(squares: np.ndarray, n_byzantine: int) -> np.ndarray:
    """(m,) weights: 1 for the vector that Krum selects, from (m, m) squared distances; the first of equals."""
    m = len(squares)
    n_nearest = max(m - n_byzantine - 2, 1)
    nearest = np.sort(squares, axis=1)[:, 1 : 1 + n_nearest]  # without itself
    return np.eye(m)[int(np.argmin(nearest.sum(axis=1)))]


def geometric_median(squares: np.ndarray) -> np.ndarray:
    """(m,) weights of the geometric median of m vectors, from their (m, m) squared distances.

    Weiszfeld's step y <- sum_i (g_i/||y - g_i||) / sum_i 1/||y - g_i|| on the weights of y alone:
    for y = sum_i w_i g_i with sum_i w_i = 1, ||y - g_j||^2 = sum_i w_i D_ij - (1/2) sum_ik w_i w_k D_ik.
    A vector that is infinitely far has no weight.
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
    """(m,) c_i = min(1, r/distance_i); r is the median of the distances when it is None."""
    r = float(np.median(distances)) if radius is None else radius
    return np.minimum(1.0, np.divide(r, distances, out=np.ones_like(distances), where=distances > 0))
