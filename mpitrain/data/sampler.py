"""The samples that a worker draws at a step, a pure function of (seed, rank, epoch, step).

In the following, p workers draw batches of b samples. There are several modes because papers differ (Zhang et al. 2015:
every worker samples the whole set; Parle, Jin et al., SGP: shards; Hsu et al. 2019: unequal classes).

  independent   Each worker shuffles the WHOLE training set with a seed of its own, again and again: its indices are a
                sequence of permutations of n, cut into batches without a remainder.
  sharded       All workers share one permutation per epoch. Its slice k of p*b indices is the global batch k, of which
                worker r draws the sub-slice r*b:(r+1)*b. Together, p workers with batch b therefore draw exactly the
                batches of one worker with batch p*b and the same seed. Shards are disjoint within an epoch and differ
                between epochs. The n mod p*b samples at the end of the permutation are left out of the epoch.

      permutation of the epoch   |-- global batch 0 --|-- global batch 1 --|-- ... --|left out|
                                 | r=0 | r=1 | r=2    | r=0 | r=1 | r=2    |

  dirichlet:A   The training set is divided once, so that the shares of the classes differ between workers
                (`partition`). Each worker shuffles its part with a seed of its own, again and again, as an independent
                worker does with the whole set.

Workers with batches of different sizes b_r take slices of their own size from a global batch of B = sum b_r samples,
and p*b stands for B. The parts of a Dirichlet partition are as large in proportion.

In all modes, an epoch is n // (p*b) steps of each worker. In an epoch, all workers together compute the gradients of
about n samples. Methods are compared in this unit. An independent worker has seen the whole set after p epochs. If p*b
is more than n, an independent epoch is one step, and sharding is refused.

With fixed shards, each rank could keep its part of the data in memory. But p workers would then not draw the batches of
one worker, and this equality is the sharpest test of a synchronous method. For data that do not fit into memory, see
`storage.py`.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mpitrain.data.partition import dirichlet_partition
from mpitrain.errors import UsageError, unknown

MODES = ("independent", "sharded")
DIRICHLET = "dirichlet"

TORCH_SEEDS = 2**63
"""torch takes seeds below this number. NumPy takes any."""


def torch_seed(number: int) -> int:
    """Return a seed in torch's range for any whole number; a number in this range is returned unchanged."""
    return number % TORCH_SEEDS


def parse_sampling(text: str) -> tuple[str, float]:
    """Return the mode of a text such as ``dirichlet:0.5``, and its alpha; 0 for modes without one.

    Raises:
        UsageError: There is no such mode, or alpha is not a number above 0.
    """
    mode, colon, number = text.partition(":")
    if mode == DIRICHLET:
        try:
            alpha = float(number)
        except ValueError:
            alpha = math.nan
        if not 0 < alpha < math.inf:
            raise UsageError(f"--sampling dirichlet:ALPHA needs a number above 0, such as dirichlet:0.5, not {text!r}")
        return mode, alpha
    if colon or mode not in MODES:
        raise UsageError(unknown("sampling", text, (*MODES, "dirichlet:ALPHA")))
    return mode, 0.0


class Sampler:
    """The sequence of batches of one worker, and the present position in it.

    Args:
        n: The number of training samples.
        batch_size: The number of samples in a worker's batch, b.
        rank: The rank of this worker, r.
        size: The number of workers, p.
        seed: The run's seed, the same on every rank.
        mode: "independent", "sharded" or "dirichlet:ALPHA".
        all_sizes: The batch size of each worker, where they differ.
        labels: The class of each training sample, (n,), for "dirichlet".

    Raises:
        UsageError: The data have no classes, or are too few.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        *,
        rank: int = 0,
        size: int = 1,
        seed: int = 0,
        mode: str = "independent",
        all_sizes: Sequence[int] | None = None,
        labels: NDArray[np.int64] | None = None,
    ) -> None:
        mode, alpha = parse_sampling(mode)
        if batch_size < 1 or seed < 0:
            raise UsageError(f"batch size {batch_size}, seed {seed}: use a batch size above 0 and a seed of at least 0")
        if batch_size > n:
            raise UsageError(f"a batch of {batch_size} out of {n} training samples: use --batch-size {n} or less")
        sizes = [batch_size] * size if all_sizes is None else list(all_sizes)
        total = sum(sizes)
        if mode != "independent" and total > n:
            smaller = f"--batch-size {n // size} or less, " if n >= size else ""
            raise UsageError(
                f"{size} workers with batches of {batch_size} need {total} samples per step, "
                f"but there are only {n}: "
                f"use {smaller}fewer workers, or independent sampling"
            )
        assert 0 <= rank < size
        self.n, self.batch_size, self.rank, self.size, self.seed, self.mode = n, batch_size, rank, size, seed, mode
        assert len(sizes) == size
        assert sizes[rank] == batch_size
        self.steps_per_epoch = max(1, n // total)
        self._total, self._offset = total, sum(sizes[:rank])
        self._part, self._alpha = None, alpha
        if mode == DIRICHLET:
            if labels is None:
                raise UsageError(
                    "--sampling dirichlet needs data with one class per sample: use independent or sharded sampling"
                )
            self._part = dirichlet_partition(labels, sizes, alpha, seed)[rank]
        self.epoch = 0
        self.step = 0  # within the epoch
        self._permutations: dict[int, NDArray[np.int64]] = {}

    def indices(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Return this worker's batch at a step of an epoch, (batch_size,) int64. Local and pure."""
        if not (epoch >= 0 and 0 <= step < self.steps_per_epoch):
            raise IndexError(f"no step {step} of epoch {epoch}: an epoch has {self.steps_per_epoch} steps")
        b = self.batch_size
        if self.mode == "sharded":
            start = step * self._total + self._offset
            return self._permutation(epoch)[start : start + b].copy()
        n = self.n if self._part is None else len(self._part)
        n_pass, start = divmod((epoch * self.steps_per_epoch + step) * b, n)
        head = self._permutation(n_pass)[start : start + b]
        if len(head) == b:
            return head.copy()
        return np.concatenate([head, self._permutation(n_pass + 1)[: b - len(head)]])

    def shard(self, epoch: int) -> NDArray[np.int64]:
        """Return the samples that this worker may draw in an epoch, (k,) int64. Local.

        They are its batches in order, or its whole part of a Dirichlet partition.
        """
        if self._part is not None:
            return self._part
        return np.concatenate([self.indices(epoch, step) for step in range(self.steps_per_epoch)])

    def draw(self) -> NDArray[np.int64]:
        """Return the next batch and advance by one step. Local."""
        indices = self.indices(self.epoch, self.step)
        self.step += 1
        if self.step == self.steps_per_epoch:
            self.epoch, self.step = self.epoch + 1, 0
        return indices

    def state(self) -> dict[str, float]:
        """Return the position and the parameters of the sampler."""
        return {**self._identity(), "epoch": self.epoch, "step": self.step}

    def load(self, state: Mapping[str, float]) -> None:
        """Continue from a saved state. The saved sampler must have the same parameters."""
        for name, value in self._identity().items():
            if state.get(name, 0) != value:
                raise UsageError(
                    f"the checkpoint has {name} {state.get(name, 0):g}, this run {value:g}: resume with the same value"
                )
        self.epoch, self.step = int(state["epoch"]), int(state["step"])

    def _identity(self) -> dict[str, float]:
        alpha = {"alpha": self._alpha} if self.mode == DIRICHLET else {}
        return {
            "n": self.n,
            "batch_size": self.batch_size,
            "rank": self.rank,
            "size": self.size,
            "seed": self.seed,
            "mode": (*MODES, DIRICHLET).index(self.mode),
            **alpha,
        }

    def _permutation(self, number: int) -> NDArray[np.int64]:
        """Return the permutation of an epoch (sharded) or of this worker's pass (independent); cache the last two."""
        if number not in self._permutations:
            while len(self._permutations) > 1:
                del self._permutations[next(iter(self._permutations))]
            stream = 0 if self.mode == "sharded" else 1 + self.rank
            drawn_from = self.n if self._part is None else self._part
            self._permutations[number] = np.random.default_rng([self.seed, stream, number]).permutation(drawn_from)
        return self._permutations[number]
