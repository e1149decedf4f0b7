"""SafeguardSGD: throws workers out whose gradients, summed over many steps, lie far from those of the majority.

Step t, for m workers of which less than half are Byzantine, all in the good set when it begins:

    A_i <- 0 where T1 | t;   B_i <- 0 where T0 | t                          T0 <= T1: two windows, two guards
    A_i <- A_i + g_i/|good|;   B_i <- B_i + g_i/|good|                      i in good
    A_med = A_i of an i in good with more than m/2 good j for which ||A_j - A_i|| <= Th1;   B_med likewise with Th0
    good' = {i in good: ||A_i - A_med|| <= 2*Th1 and ||B_i - B_med|| <= 2*Th0}      for good: nobody comes back
    x <- x - eta*(xi + mean of g_i over good),   xi ~ N(0, nu^2 I)                  the set before the step

The noise of honest workers adds up like sqrt(T), a steady bias like T: what hides in the noise of one step is far
outside it after enough of them. The short window sees a sudden change soon, the long one a small bias.

Source: Allen-Zhu, Ebrahimianghazani, Li, Alistarh, Byzantine-Resilient Non-Convex Stochastic Gradient Descent, 2021,
https://arxiv.org/abs/2012.14368, algorithm 1 (double guard) and its single guard, which has the window T1 only.

Deviations:

- There is no master. Each worker keeps its slice of all A_i and B_i (2m/p vectors) and the distances are summed over
  the slices, so that all come to the same decision, to the bit (see ``slices``).
- The paper sets the thresholds by a run beforehand. Where none is given, ours is made from the present distances. With
  r_i the radius about worker i that holds more than m/2 workers, and r the median of the r_i (the one at place
  m/2 + 1), s steps into a window of T:
      Th = tolerance * max(r * sqrt(T/s), r at the end of the window before)
  r * sqrt(T/s) is what r will be at the end of the window if it grows like sqrt(s); the other keeps Th from being 0
  where nearly all gradients of one step are. With at most m/2 - 1 attackers r lies between the smallest and the largest
  distance of two honest workers, whatever the attackers do, and no honest worker is thrown out while the largest is at
  most ``tolerance`` times r. It follows the noise as training goes on, and asks for no scale.
- Of several candidates for A_med the one with the most neighbours is taken, the lowest rank among equals. Where there
  is none (a threshold that is too small) the guard throws nobody out in this step and the step is counted in
  ``n_undecided``: taking the one with the most neighbours would hand the decision to attackers that agree.
- A gradient with an element that is not finite is not used at all: its worker leaves at once.
- The local update is any torch optimizer's, with the mean as gradient. A worker that was thrown out still takes part in
  all steps; nobody looks at its gradient.
- ``reset_good_every``, off by default, lets all come back every so many long windows.

Nothing is promised if half of the workers or more are Byzantine, nor with fewer than three workers. Workers that see
different distributions (shards by class, say) are biased, honest or not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from mpitrain import kernels
from mpitrain.algorithms.base.method import Method, Replica, Worker, setting
from mpitrain.algorithms.byzantine.gradient_slices import COMMUNICATION, GradientSlices
from mpitrain.kernels.robust import BLOCK, Rows


@dataclass(frozen=True)
class SafeguardSGD(Method):
    """All-reduce SGD that finds out workers whose gradients are wrong, even by little, and goes on without them.

    Args:
        guards: ``double``: a short and a long window; ``single``: the long one only.
        short_window: T0, steps; an epoch in the paper.
        long_window: T1, steps; 6 epochs in the paper, 3 for the single guard. A bias of z standard deviations is seen
            with automatic thresholds in windows of more than 8*(tolerance/z)^2 steps only.
        short_threshold: Th0; automatic when not given.
        long_threshold: Th1; automatic when not given.
        tolerance: The automatic threshold as a multiple of the distance between honest workers; larger ones throw
            fewer honest workers out, and find fewer others.
        noise: nu, the standard deviation of what is added to the gradient (to leave saddle points).
        reset_good_every: Long windows after which all are good again; never when not given.
    """

    guards: str = setting("double", "a short and a long window, or the long one only", choices=("double", "single"))
    short_window: int = setting(100, "T0, steps of the short window", low=1)
    long_window: int = setting(600, "T1, steps of the long window", low=1)
    short_threshold: float | None = setting(None, "Th0; automatic when not given", low=0)
    long_threshold: float | None = setting(None, "Th1; automatic when not given", low=0)
    tolerance: float = setting(1.0, "automatic threshold over the distance between honest workers", low=1)
    noise: float = setting(0.0, "nu, standard deviation of the noise added to the gradient", low=0)
    reset_good_every: int | None = setting(None, "long windows after which all are good again; or never", low=1)

    name: ClassVar[str] = "safeguard"
    summary: ClassVar[str] = "synchronous SGD that throws out workers whose gradients are wrong"
    source: ClassVar[str] = "Allen-Zhu, Ebrahimianghazani, Li, Alistarh 2021, arXiv 2012.14368"
    communication: ClassVar[str] = COMMUNICATION
    on_host: ClassVar[bool] = True
    short_run: ClassVar[Mapping[str, Any]] = MappingProxyType({"short_window": 50, "long_window": 150})
    metrics: ClassVar[tuple[str, ...]] = ("n_good", "removed_at", "n_undecided")

    def warnings(self, size: int, learning_rate: float) -> Iterator[str]:
        """A majority needs three; the windows their order."""
        if size < 3:
            yield f"safeguard: among {size} workers nobody can be outvoted: use at least 3"
        if self.guards == "double" and self.short_window > self.long_window:
            yield (
                f"safeguard: short_window = {self.short_window} is longer than long_window = {self.long_window}: "
                "use short_window <= long_window"
            )

    def worker(self, replica: Replica) -> SafeguardWorker:
        """Collective."""
        return SafeguardWorker(self, replica)


class SafeguardWorker(Worker):
    """This worker's slice of the running sums, and the good set, which is the same on all.

    Attributes:
        good: (m,) who is in the good set.
        removed_at: (m,) the step in which each left it; -1 for those who have not.
        n_undecided: How often a guard found no majority.
    """

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

    def before_update(self) -> None:
        """g <- xi + mean of g_i over good; then good shrinks. Collective."""
        self._begin_windows()
        m, who, slices = self.comm.size, np.flatnonzero(self.good), self._slices
        n_bad = slices.collect(who)
        found = [n_bad]
        for window in self._windows.values():
            n_bad += window.add(who, slices.rows.values)
            found.append(window.sums.squared_distances(who).ravel())
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
        self.removed_at[self.good & ~remaining] = self.t
        self.good = remaining

    def consensus(self, out: Any) -> None:
        """Any worker's parameters: they are equal. Local."""
        out[...] = self.x.local

    def metrics(self) -> dict[str, float]:
        """How many are good, when this worker was thrown out (-1: it was not), steps without a majority. Local."""
        return {
            "n_good": float(self.good.sum()),
            "removed_at": float(self.removed_at[self.comm.rank]),
            "n_undecided": float(self.n_undecided),
        }

    def state(self) -> Iterator[tuple[str, Any]]:
        """The clock, the good set, this worker's slice of all running sums, the random state."""
        yield from super().state()
        yield "good", self.good
        yield "removed_at", self.removed_at
        yield "n_undecided", self.n_undecided
        for name, window in self._windows.items():
            yield f"{name}_sums", window.sums.values
            yield f"{name}_window", np.array([window.n_steps, window.radius, window.last_radius])
        yield "rng", json.dumps(self._rng.bit_generator.state)

    def load(self, state: dict[str, Any]) -> None:
        """Local."""
        super().load(state)
        self.good[...] = state["good"]
        self.removed_at[...] = state["removed_at"]
        self.n_undecided = int(state["n_undecided"])
        for name, window in self._windows.items():
            window.sums.values[...] = state[f"{name}_sums"]
            n_steps, window.radius, window.last_radius = (float(value) for value in state[f"{name}_window"])
            window.n_steps = int(n_steps)
        self._rng.bit_generator.state = json.loads(state["rng"])

    def _begin_windows(self) -> None:
        """Sums begin anew at the multiples of their windows; and, if asked for, the good set."""
        every = self._method.reset_good_every
        all_anew = every is not None and self.t > 0 and self.t % (every * self._method.long_window) == 0
        if all_anew:
            self.good[...] = True
            self.removed_at[...] = -1
        for window in self._windows.values():
            if all_anew or self.t % window.length == 0:
                window.begin()

    def _add_noise(self) -> None:
        """Each worker draws xi for its slice."""
        if self._method.noise == 0:
            return
        mine = self._slices.mine
        for start in range(0, mine.size, BLOCK):
            part = mine[start : start + BLOCK]
            kernels.scaled_add(part, self._rng.standard_normal(out=self._xi[: part.size]), self._method.noise)


class Window:
    """One guard: the running sums A_i of all workers, in one slice, and its threshold.

    Args:
        m: The number of workers.
        like: (length of the slice,) a vector of the gradients' type; sums are kept in float32 at least.
        length: T, steps.
        threshold: Th; automatic when None.
        tolerance: Of the automatic threshold.

    Attributes:
        sums: (m, length of the slice)
        n_steps: s, how many gradients are in them.
        radius: r, of the last step that was judged.
        last_radius: r at the end of the window before.
    """

    def __init__(self, m: int, like: Any, length: int, threshold: float | None, tolerance: float) -> None:
        self.length, self.n_steps = length, 0
        self.radius = self.last_radius = 0.0
        self._threshold, self._tolerance = threshold, tolerance
        self.sums = Rows(m, like.size, kernels.accumulator(like.dtype))
        kernels.accumulate(self.sums.values[0, :0], like[:0], 0.0)  # compiled before the first step

    def begin(self) -> None:
        """A_i <- 0"""
        self.sums.values[...] = 0
        self.n_steps, self.last_radius = 0, self.radius

    def add(self, who: np.ndarray, gradients: np.ndarray) -> np.ndarray:
        """A_i <- A_i + g_i/|good|

        Returns:
            (m,) how many elements of each sum have become infinite.
        """
        n_bad = np.zeros(len(gradients))
        self.n_steps += 1
        for i in who:
            n_bad[i] = kernels.accumulate(self.sums.values[i], gradients[i], 1.0 / len(who))
        return n_bad

    def close(self, distances: np.ndarray, good: np.ndarray) -> np.ndarray | None:
        """(m,) who of the good ones is within 2*Th of A_med; None where there is no A_med."""
        threshold = self._threshold
        if threshold is None:
            self.radius = majority_radius(distances, good)
            threshold = self._tolerance * max(self.radius * math.sqrt(self.length / self.n_steps), self.last_radius)
        median = median_worker(distances, good, threshold)
        return None if median is None else good & (distances[median] <= 2 * threshold)


def median_worker(distances: np.ndarray, good: np.ndarray, threshold: float) -> int | None:
    """Who has the most good ones within ``threshold``, if these are more than m/2, itself among them.

    Args:
        distances: (m, m)
        good: (m,) who counts.
        threshold: Th.
    """
    n_near = np.where(good, ((distances <= threshold) & good).sum(axis=1), 0)
    first = int(np.argmax(n_near))
    return first if 2 * n_near[first] > len(good) else None


def majority_radius(distances: np.ndarray, good: np.ndarray) -> float:
    """r, the median over good workers of the radius within which there are more than m/2 good ones, itself among them.

    With at most m/2 - 1 attackers it is at least the smallest distance of two honest workers and at most the largest:
    the ball about an honest worker holds a second one, and more than m/2 workers are honest, whose radii are no larger.
    """
    n_others = len(good) // 2
    if good.sum() <= n_others:
        return math.inf
    radii = np.sort(distances[np.ix_(good, good)], axis=1)[:, n_others]
    return float(np.sort(radii)[n_others])
