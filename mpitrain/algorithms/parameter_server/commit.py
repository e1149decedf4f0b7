"""Commit rules: the exchange of a worker with a shard of the parameter server's center.

    c <- c + a*d     the commit
    x <- c           the pull, which sees that commit

A rule makes both in one pass, with a kernel, under the shard's lock.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from mpitrain import kernels
from mpitrain.algorithms.base.clipping import Clip
from mpitrain.algorithms.base.state import Located
from mpitrain.collectives.rma.shared_vector import SharedVector


class CommitRule(ABC):
    """The rule by which a worker commits to the center and pulls it.

    Attributes:
        persistent: The names of the attributes that a checkpoint contains, as in ``Worker``.
        rows: The names of the shared vectors in a checkpoint. The first is the center.
        evaluated_row: The index of the shared vector that is the consensus.
        tags: The checkpoint entry for the tags, which are numbers stored with each shard; None to store no tags.
    """

    persistent: ClassVar[tuple[str, ...]] = ()
    rows: ClassVar[tuple[str, ...]] = ("center",)
    evaluated_row: ClassVar[int] = 0
    tags: ClassVar[str | None] = None

    def start(self, name: str, x: Any) -> Any:
        """Return the first values (n,) of a shared vector, given the model's parameters ``x`` (n,)."""
        return x

    @abstractmethod
    def limit(self, part: slice, clip: Clip, radius: float) -> None:
        """Scale the next commit to a shard so that it moves the shard by at most ``radius``. Local."""

    @abstractmethod
    def __call__(self, part: slice, c: Any, shared: SharedVector, steps: int) -> int:
        """Commit to a shard and pull it. Local.

        Args:
            part: The position of the shard in the vector.
            c: (length,) the shard of the center, or (rows, length) with the other rows.
            shared: The shared vector, for the staleness and the tags of the shard.
            steps: Local steps since the last commit.

        Returns:
            The number of non-finite elements that were left out.
        """


Rate = Callable[[SharedVector, int], float]
"""``rate(shared, steps)``: a, from the staleness of the shard and the local steps since the last commit."""


class Displacement(CommitRule):
    """The rule that commits the displacement d = x - o since the last pull: c <- c + a*d; x, o <- c.

    Args:
        x: (n,) the model's parameters.
        rate: A function that returns the rate a for the visited shard; by default 1.

    Attributes:
        origin: (n,) the values o of the last pull.
    """

    persistent: ClassVar[tuple[str, ...]] = (Located("origin"),)

    def __init__(self, x: Any, rate: Rate = lambda shared, steps: 1.0) -> None:
        self.x, self.origin, self._rate = x, x.copy(), rate

    def __call__(self, part: slice, c: Any, shared: SharedVector, steps: int) -> int:
        """Compute c <- c + a*(x - o);  x, o <- c"""
        return kernels.commit_and_pull(self.x[part], self.origin[part], c, self._rate(shared, steps))

    def limit(self, part: slice, clip: Clip, radius: float) -> None:
        """Scale x - o so that ||x - o|| <= radius."""
        clip.limit(self.x[part], self.origin[part], radius)

    def push(self, part: slice, c: Any) -> int:
        """Push the displacement: c <- c + (x - o); o <- x."""
        return kernels.commit_only(self.x[part], self.origin[part], c)

    def pull(self, part: slice, c: Any) -> int:
        """Pull the center: x <- c; o <- c - d, which keeps the displacement d = x - o that is not committed yet."""
        return kernels.pull_only(self.x[part], self.origin[part], c)
