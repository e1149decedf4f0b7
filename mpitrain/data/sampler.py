"""Which samples a worker draws at a step: integers in, indices out, a pure function of (seed, rank, epoch, step).

Two modes, because the papers disagree (Zhang et al. 2015: every worker samples the whole set; Parle, Jin et al., SGP:
shards).

  independent   Each worker shuffles the WHOLE training set with a seed of its own and goes through it again and again:
                its indices are one permutation of n after the other, cut into batches without leaving anything out.
  sharded       One permutation per epoch, common to all. Its slice k of p*b indices is the global batch k, of which
                worker r takes the sub-slice r*b:(r+1)*b. So p workers with batch b draw, together, exactly what one
                worker with batch p*b draws with the same seed; shards are disjoint within an epoch and differ between
                epochs. The n mod p*b samples at the end of the permutation are left out; they are others in each epoch.

      permutation of the epoch   |-- global batch 0 --|-- global batch 1 --|-- ... --|left out|
                                 | r=0 | r=1 | r=2    | r=0 | r=1 | r=2    |

In both modes an epoch is n // (p*b) steps of each worker: an epoch of all workers together computes the gradients of
about n samples, which is the x-axis on which methods are compared. An independent worker has therefore seen the whole
set after p epochs. Where p*b is more than n, an independent epoch is one step, and sharding is refused.

Shards that stay the same would let each rank keep its part of the data for ever, but would break the equality with one
big batch, the sharpest test a synchronous method has; `storage.py` says what is done instead for data that does not fit
into memory.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from mpitrain.errors import UsageError

MODES = ("independent", "sharded")


class Sampler:
    """The batches of one worker, and how far it has come.

    Args:
        n: Samples in the training set.
        batch_size: Samples in a worker's batch, b.
        rank: This worker, r.
        size: How many workers there are, p.
        seed: The run's seed, the same on every rank.
        mode: "independent" or "sharded".
    """

    def __init__(
        self, n: int, batch_size: int, *, rank: int = 0, size: int = 1, seed: int = 0, mode: str = "independent"
    ) -> None:
        if mode not in MODES:
            raise UsageError(f"no sampling '{mode}': use one of {', '.join(MODES)}")
        if batch_size < 1 or seed < 0:
            raise UsageError(f"batch size {batch_size}, seed {seed}: use a batch size above 0 and a seed of at least 0")
        if batch_size > n:
            raise UsageError(f"a batch of {batch_size} out of {n} training samples: use --batch-size {n} or less")
        if mode == "sharded" and size * batch_size > n:
            smaller = f"--batch-size {n // size} or less, " if n >= size else ""
            raise UsageError(
                f"{size} workers with batches of {batch_size} take {size * batch_size} samples a step, out of {n}: "
                f"use {smaller}fewer workers, or independent sampling"
            )
        assert 0 <= rank < size
        self.n, self.batch_size, self.rank, self.size, self.seed, self.mode = n, batch_size, rank, size, seed, mode
        self.steps_per_epoch = max(1, n // (size * batch_size))
        self.epoch = 0
        self.step = 0  # within the epoch
        self._permutations: dict[int, NDArray[np.int64]] = {}

    def indices(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Local: the batch of this worker at a step of an epoch, (batch_size,) int64; pure."""
        if not (epoch >= 0 and 0 <= step < self.steps_per_epoch):
            raise IndexError(f"no step {step} of epoch {epoch}: an epoch has {self.steps_per_epoch} steps")
        b, p, r = self.batch_size, self.size, self.rank
        if self.mode == "sharded":
            start = (step * p + r) * b
            return self._permutation(epoch)[start : start + b].copy()
        n_pass, start = divmod((epoch * self.steps_per_epoch + step) * b, self.n)
        head = self._permutation(n_pass)[start : start + b]
        if len(head) == b:
            return head.copy()
        return np.concatenate([head, self._permutation(n_pass + 1)[: b - len(head)]])

    def shard(self, epoch: int) -> NDArray[np.int64]:
        """Local: everything this worker draws in an epoch, step after step, (steps_per_epoch * batch_size,) int64."""
        return np.concatenate([self.indices(epoch, step) for step in range(self.steps_per_epoch)])

    def draw(self) -> NDArray[np.int64]:
        """Local: the next batch; moves on by one step."""
        indices = self.indices(self.epoch, self.step)
        self.step += 1
        if self.step == self.steps_per_epoch:
            self.epoch, self.step = self.epoch + 1, 0
        return indices

    def state(self) -> dict[str, int]:
        """Where the sampler stands, and what it was made for."""
        return {**self._identity(), "epoch": self.epoch, "step": self.step}

    def load(self, state: Mapping[str, int]) -> None:
        """Goes on where `state` stood; refuses a state under which the same position would mean other samples."""
        for name, value in self._identity().items():
            if int(state[name]) != value:
                raise UsageError(
                    f"the checkpoint has {name} {int(state[name])}, this run {value}: resume with the same"
                )
        self.epoch, self.step = int(state["epoch"]), int(state["step"])

    def _identity(self) -> dict[str, int]:
        return {
            "n": self.n,
            "batch_size": self.batch_size,
            "rank": self.rank,
            "size": self.size,
            "seed": self.seed,
            "mode": MODES.index(self.mode),
        }

    def _permutation(self, number: int) -> NDArray[np.int64]:
        """The permutation of an epoch (sharded) or of a pass of this worker (independent); the last two are kept."""
        if number not in self._permutations:
            while len(self._permutations) > 1:
                del self._permutations[next(iter(self._permutations))]
            who = 0 if self.mode == "sharded" else 1 + self.rank
            self._permutations[number] = np.random.default_rng([self.seed, who, number]).permutation(self.n)
        return self._permutations[number]
