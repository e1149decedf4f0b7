"""SafeguardSGD: excludes workers whose gradients, summed over many steps, lie far from those of the majority.

Step t, for m workers of which less than half are Byzantine, all in the good set at the start:

    A_i <- 0 where T1 | t;   B_i <- 0 where T0 | t                          T0 <= T1: two windows, two guards
    A_i <- A_i + g_i/|good|;   B_i <- B_i + g_i/|good|                      i in good
    A_med = A_i of an i in good with more than m/2 good j for which ||A_j - A_i|| <= Th1;   B_med likewise with Th0
    good' = {i in good: ||A_i - A_med|| <= 2*Th1 and ||B_i - B_med|| <= 2*Th0}      permanently
    x <- x - eta*(xi + mean of g_i over good),   xi ~ N(0, nu^2 I)                  the set before the step

The noise of honest workers adds up like sqrt(T), a steady bias like T: a bias that is hidden in the noise of one step
is far outside it after enough steps. The short window soon detects a sudden change, the long one a small bias.

Source: Allen-Zhu, Ebrahimianghazani, Li, Alistarh, Byzantine-Resilient Non-Convex Stochastic Gradient Descent, 2021,
https://arxiv.org/abs/2012.14368, algorithm 1 (double guard) and its single guard, which has the window T1 only.

Deviations:

- There is no master. Each worker keeps its slice of all A_i and B_i (2m/p vectors), and the distances are summed over
  the slices, so that all workers make the same decision, to the bit (see ``gradient_slices``).
- The paper sets the thresholds by a run beforehand. By default ours follow from the present distances. With r_i the
  radius about worker i that contains more than m/2 workers, and r the median of the r_i (the one at place m/2 + 1),
  s steps into a window of T:
      Th = tolerance * max(r * sqrt(T/s), r at the end of the window before)
  r * sqrt(T/s) predicts r at the end of the window if it grows like sqrt(s); the second term keeps Th above 0 when
  nearly all gradients of one step are equal. With at most m/2 - 1 attackers r lies between the smallest and the largest
  distance of two honest workers, whatever the attackers do, and no honest worker is excluded while the largest is at
  most ``tolerance`` times r. The threshold follows the noise during training and needs no scale.
- Of several candidates for A_med the one with the most neighbours is used, the lowest rank among equals. If there is
  none (the threshold is too small) the guard excludes no worker in this step, and the step is counted in
  ``n_undecided``: using the one with the most neighbours would leave the decision to attackers that agree.
- A gradient with a non-finite element is not used at all: its worker is excluded at once. If that holds for all of the
  good set, the step is left out and the set stays as it is.
- The local update is any torch optimizer's, with the mean as its gradient. An excluded worker still takes part in all
  steps; its gradient is ignored.
- ``reset_good_every``, off by default, readmits all workers after so many long windows.

There is no guarantee if half of the workers or more are Byzantine, or with fewer than three workers. Workers with
different distributions (shards by class, say) are biased, honest or not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from mpitrain import kernels
from mpitrain.algorithms.base.method import Method
from mpitrain.algorithms.base.replica import Replica
from mpitrain.algorithms.base.settings import choice, integer, number
from mpitrain.algorithms.base.state import State
from mpitrain.algorithms.base.worker import Worker
from mpitrain.algorithms.byzantine.gradient_slices import COMMUNICATION, GradientSlices
from mpitrain.kernels.robust import BLOCK, Rows


@dataclass(frozen=True)
class SafeguardSGD(Method):
    """All-reduce SGD that detects workers with wrong gradients and continues without them, even if the error is small.

    Args:
        guards: ``double`` for a short and a long window, ``single`` for the long window only.
        short_window: The length T0 of the short window in steps; an epoch in the paper.
        long_window: The length T1 of the long window in steps; 6 epochs in the paper, or 3 with a single guard. With
            automatic thresholds, a bias of z standard deviations is detected only in windows of more than
            8*(tolerance/z)^2 steps.
        short_threshold: The threshold Th0; by default automatic.
        long_threshold: The threshold Th1; by default automatic.
        tolerance: The automatic threshold as a multiple of the distance between honest workers. Larger values exclude
            fewer honest workers, but also detect fewer Byzantine ones.
        noise: The standard deviation nu of the noise that is added to the gradient, to leave saddle points.
        reset_good_every: The number of long windows after which all workers count as good again; by default never.
    """

    guards: str = choice("double", "a short and a long window, or the long one only", ("double", "single"))
    short_window: int = integer(100, "T0, steps of the short window", low=1)
    long_window: int = integer(600, "T1, steps of the long window", low=1)
    short_threshold: float | None = number(None, "Th0; automatic when not given", low=0, optional=True)
    long_threshold: float | None = number(None, "Th1; automatic when not given", low=0, optional=True)
    tolerance: float = number(1.0, "automatic threshold over the distance between honest workers", low=1)
    noise: float = number(0.0, "nu, standard deviation of the noise added to the gradient", low=0)
    reset_good_every: int | None = integer(
        None, "long windows after which all are good again; or never", low=1, optional=True
    )

    name: ClassVar[str] = "safeguard"
    summary: ClassVar[str] = "synchronous SGD that throws out workers whose gradients are wrong"
    source: ClassVar[str] = "Allen-Zhu, Ebrahimianghazani, Li, Alistarh 2021, arXiv 2012.14368"
    can_join: ClassVar[bool] = False
    lost: ClassVar[str] = "the sums of the windows, which start at 0 again"
    communication: ClassVar[str] = COMMUNICATION
    goes_on: ClassVar[str] = "parameters and optimizer states"
    begins_anew: ClassVar[str] = "sums of the windows; the good set, which contains all workers again"
    combines_gradients: ClassVar[bool] = True
    on_host: ClassVar[bool] = True
    short_run: ClassVar[Mapping[str, Any]] = MappingProxyType({"short_window": 50, "long_window": 150})
    metrics: ClassVar[tuple[str, ...]] = ("n_good", "removed_at", "n_undecided")

    def warnings(self, size: int, learning_rate: float) -> Iterator[str]:
        """Yield a line for fewer than three workers, which have no majority, and for windows in the wrong order."""
        if size < 3:
            yield f"safeguard: among {size} workers none can be outvoted: use at least 3"
        if self.guards == "double" and self.short_window > self.long_window:
            yield (
                f"safeguard: short_window = {self.short_window} is longer than long_window = {self.long_window}: "
                "use short_window <= long_window"
            )

    def entries_after_death(self, state: State, worker: Any, survivors: Sequence[int]) -> State:
        """Return the entries of the survivors. The sums, of which the dead worker had a slice, begin anew. Local."""
        sums = {name: value for name, value in worker.state() if name.partition("_")[0] in ("long", "short")}
        numbers = list(survivors)
        return {**state, **sums, "good": state["good"][numbers], "removed_at": state["removed_at"][numbers]}

    def worker(self, replica: Replica) -> SafeguardWorker:
        """Make a worker. Collective."""
        return SafeguardWorker(self, replica)


class SafeguardWorker(Worker):
    """A worker with its slice of the running sums, and the set of good workers.

    Attributes:
        good: (m,) whether each worker is in the good set, which is the same on all workers.
        removed_at: (m,) the step in which each worker was removed from the good set; -1 if it is still good.
        n_undecided: The number of times that a guard found no majority.
    """

    persistent: ClassVar[tuple[str, ...]] = ("good", "removed_at", "n_undecided", "_windows", "_rng")

    def __init__(self, method: SafeguardSGD, replica: Replica) -> None:
        super().__init__(replica)
        self._method, m = method, self.comm.size
        self._slices = GradientSlices(self.comm, self.g)
        self.good = np.ones(m, bool)
        self.removed_at = np.full(m, -1)
        self.n_undecided = 0
        mine = self._slices.mine
        self._windows = {"long": Window(m, mine, method.long_window, method.long_threshold, method.tolerance)}
        if method.guards == "double":
            self._windows["short"] = Window(m, mine, method.short_window, method.short_threshold, method.tolerance)
        self._rng = np.random.default_rng([replica.seed, self.comm.rank])
        self._xi = np.empty(BLOCK)
        kernels.scaled_add(mine[:0], self._xi[:0], 0.0)  # compiled before the first step

    def combine_gradients(self) -> None:
        """Compute g <- xi + mean of g_i over the good workers, then remove bad workers from the good set. Collective.

        If no good worker has a finite gradient, the step is skipped, and the good set does not change.
        """
        self._begin_windows()
        self._slices.exclude_own(self.skips)
        m, good, slices = self.comm.size, np.flatnonzero(self.good), self._slices
        n_bad = slices.collect(good)
        found = [n_bad]
        for window in self._windows.values():
            n_bad += window.add(good, slices.rows.values)
            found.append(window.squared_distances(good).ravel())
        totals = slices.total(np.concatenate(found))
        finite = self.good & (totals[:m] == 0)
        remaining = finite.copy()
        for window, squares in zip(self._windows.values(), totals[m:].reshape(-1, m, m)):
            close = window.close(np.sqrt(squares), finite)
            self.n_undecided += close is None
            remaining &= True if close is None else close
        slices.rows.weighted_sum(finite / max(int(finite.sum()), 1), slices.mine)
        self._add_noise()
        slices.share()
        self.has_common_gradient, self.skips = True, not finite.any()
        if self.skips:
            return
        self.removed_at[self.good & ~remaining] = self.t
        self.good = remaining

    def consensus(self, out: Any) -> None:
        """Write this worker's parameters, which are equal on all workers. Local."""
        out[...] = self.x.local

    def metrics(self) -> dict[str, float]:
        """Return the size of the good set, the step of this worker's removal (or -1), and n_undecided. Local."""
        return {
            "n_good": float(self.good.sum()),
            "removed_at": float(self.removed_at[self.comm.rank]),
            "n_undecided": float(self.n_undecided),
        }

    def _begin_windows(self) -> None:
        """Reset the sums at the multiples of their windows and, if it is set, the good set."""
        every = self._method.reset_good_every
        readmits = every is not None and self.t > 0 and self.t % (every * self._method.long_window) == 0
        if readmits:
            self.good[...] = True
            self.removed_at[...] = -1
        for window in self._windows.values():
            if readmits or self.t % window.length == 0:
                window.begin()

    def _add_noise(self) -> None:
        """Draw xi for this worker's slice and add it."""
        if self._method.noise == 0:
            return
        mine = self._slices.mine
        for start in range(0, mine.size, BLOCK):
            part = mine[start : start + BLOCK]
            kernels.scaled_add(part, self._rng.standard_normal(out=self._xi[: part.size]), self._method.noise)


class Window:
    """A guard: the running sums A_i of all workers' gradients in one slice, and the threshold.

    Args:
        m: The number of workers.
        like: (length of the slice,) a vector of the gradients' type. The sums are at least float32.
        length: The length T of the window in steps.
        threshold: The threshold Th; automatic if None.
        tolerance: The tolerance of the automatic threshold.

    Attributes:
        sums: (m, length of the slice) the running sums A_i.
        n_steps: The number s of gradients in each sum.
        radius: The radius r of the last step.
        last_radius: The radius r at the end of the previous window.
    """

    persistent: ClassVar[tuple[str, ...]] = ("sums", "n_steps", "radius", "last_radius")

    def __init__(self, m: int, like: Any, length: int, threshold: float | None, tolerance: float) -> None:
        self.length, self.n_steps = length, 0
        self.radius = self.last_radius = 0.0
        self._threshold, self._tolerance = threshold, tolerance
        self._rows = Rows(m, like.size, kernels.accumulator(like.dtype))
        self.sums = self._rows.values
        kernels.accumulate(self.sums[0, :0], like[:0], 0.0)  # compiled before the first step

    def begin(self) -> None:
        """Begin a window: set all sums A_i to 0."""
        self.sums[...] = 0
        self.n_steps, self.last_radius = 0, self.radius

    def add(self, good: np.ndarray, gradients: np.ndarray) -> np.ndarray:
        """Compute A_i <- A_i + g_i/|good|.

        Returns:
            (m,) the number of non-finite elements in each sum.
        """
        n_bad = np.zeros(len(gradients))
        self.n_steps += 1
        for i in good:
            n_bad[i] = kernels.accumulate(self.sums[i], gradients[i], 1.0 / len(good))
        return n_bad

    def squared_distances(self, good: np.ndarray) -> np.ndarray:
        """Return the squared distances (m, m) between the sums of the good workers in this slice."""
        return self._rows.squared_distances(good)

    def close(self, distances: np.ndarray, good: np.ndarray) -> np.ndarray | None:
        """Return which good workers are within 2*Th of the median A_med, (m,) bool; None if there is no median."""
        threshold = self._threshold
        if threshold is None:
            self.radius = majority_radius(distances, good)
            threshold = self._tolerance * max(self.radius * math.sqrt(self.length / self.n_steps), self.last_radius)
        median = median_worker(distances, good, threshold)
        return None if median is None else good & (distances[median] <= 2 * threshold)


def median_worker(distances: np.ndarray, good: np.ndarray, threshold: float) -> int | None:
    """Return the worker with the most good workers within ``threshold``, or None without a majority.

    There is a majority if this worker and those within the threshold are more than m/2 workers together.

    Args:
        distances: (m, m) the distances between the sums.
        good: (m,) whether each worker is in the good set.
        threshold: The threshold Th.
    """
    n_near = np.where(good, ((distances <= threshold) & good).sum(axis=1), 0)
    first = int(np.argmax(n_near))
    return first if 2 * n_near[first] > len(good) else None


def majority_radius(distances: np.ndarray, good: np.ndarray) -> float:
    """Return the median radius r of the good workers.

    The radius of a worker is that of the smallest ball around it that contains more than m/2 good workers, including
    itself. With at most m/2 - 1 attackers, r lies between the smallest and the largest distance of two honest workers.
    The reason is that more than m/2 workers are honest, and that the ball of an honest worker contains another one.
    """
    n_others = len(good) // 2
    if good.sum() <= n_others:
        return math.inf
    radii = np.sort(distances[np.ix_(good, good)], axis=1)[:, n_others]
    return float(np.sort(radii)[n_others])
