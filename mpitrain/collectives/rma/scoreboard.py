"""A scoreboard: every rank writes a few numbers, and every rank reads those of all ranks, one-sided.

Rank 0 uses it to show the progress of all ranks without their participation.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from mpitrain.collectives.rma.window import Window
from mpitrain.errors import RankFailed

if TYPE_CHECKING:
    from mpitrain.collectives.world.world import World


Field = str | tuple[str, int]
"""A name, or a name and the number of values under it."""


class Scoreboard:
    """Values that each rank writes and all ranks can read, by name. Collective to create and to free.

    If all ranks of a node are dead, each other rank keeps the values of that node that it has read last.

    Args:
        world: The ranks.
        fields: The names and lengths of the values.
    """

    def __init__(self, world: World, fields: Iterable[Field]) -> None:
        self._world = world
        self._places: dict[str, int | slice] = {}
        width = 0
        for field in fields:
            name, n = (field, 1) if isinstance(field, str) else field
            self._places[name] = width if isinstance(field, str) else slice(width, width + n)
            width += n
        self._window = Window(world, width, np.float64)
        self._rows = np.zeros((world.size, width))

    def write(self, **values: Any) -> None:
        """Set some of this rank's values. Local."""
        for name, value in values.items():
            self._window.local[self._places[name]] = value

    def write_to(self, rank: int, **values: float) -> None:
        """Set some values of another rank, each of length 1. Local."""
        row = self._window.of(rank)
        for name, value in values.items():
            place = self._places[name]
            assert isinstance(place, int)
            if row is not None:
                row[place] = value
            else:
                with suppress(RankFailed):
                    self._window.put(rank, np.array([value], np.float64), place)
                    self._window.flush(rank)

    def read(self) -> dict[str, np.ndarray]:
        """Return the present values of all ranks by name: (p,) for a single value, (p, n) for n values. Local."""
        self._window.sync()
        for rank in [rank for rank in range(self._world.size) if not self._fetch(rank)]:
            self._flush(rank)
        return {name: self._rows[:, place].copy() for name, place in self._places.items()}

    def read_rank(self, rank: int) -> dict[str, Any]:
        """Return the present values of one rank by name. Local."""
        self._window.sync()
        if not self._fetch(rank):
            self._flush(rank)
        row = self._rows[rank]
        return {name: row[place].tolist() for name, place in self._places.items()}

    def _fetch(self, rank: int) -> bool:
        """Start to copy the values of a rank; return whether they have arrived, as they have from this node."""
        row = self._window.of(rank)
        if row is None:
            with suppress(RankFailed):
                self._window.get(rank, self._rows[rank])
        else:
            self._rows[rank] = row
        return row is not None

    def _flush(self, rank: int) -> None:
        with suppress(RankFailed):
            self._window.flush(rank)

    def free(self) -> None:
        """Free the memory. Collective."""
        self._window.free()
