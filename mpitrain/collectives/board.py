"""A board on which every rank writes a few numbers and everybody reads all of them, one-sided.

This is how rank 0 shows the progress of all ranks without asking any of them for anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mpitrain.collectives.memory import Window

if TYPE_CHECKING:
    from mpitrain.collectives.world import World


class Board:
    """Numbers of all ranks, by name. Collective to create and to free.

    Args:
        world: The ranks.
        names: Of the numbers each rank writes.
    """

    def __init__(self, world: World, names: Sequence[str]) -> None:
        self._world, self._names = world, tuple(names)
        self._window = Window(world, len(self._names), np.float64)
        self._rows = np.zeros((world.size, len(self._names)))

    def write(self, **values: float) -> None:
        """Set some of this rank's numbers. Local."""
        for name, value in values.items():
            self._window.local[self._names.index(name)] = value

    def read(self) -> dict[str, np.ndarray]:
        """(p,) of each number, as it stands now at every rank. Local."""
        for rank in range(self._world.size):
            self._fetch(rank)
        return {name: self._rows[:, k].copy() for k, name in enumerate(self._names)}

    def read_rank(self, rank: int) -> dict[str, float]:
        """The numbers of one rank as they stand now. Local."""
        return dict(zip(self._names, self._fetch(rank).tolist(), strict=True))

    def _fetch(self, rank: int) -> np.ndarray:
        self._window.sync()
        row = self._window.of(rank)
        if row is not None:
            self._rows[rank] = row
        else:
            self._window.get(rank, self._rows[rank])
            self._window.flush(rank)
        fetched: np.ndarray = self._rows[rank]
        return fetched

    def free(self) -> None:
        """Give the memory back. Collective."""
        self._window.free()
