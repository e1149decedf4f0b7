"""The part of a world that checkpoints need, without MPI."""

from collections.abc import Callable, Iterable
from typing import Any


class LoneWorld:
    """A rank whose collectives involve no other, whatever the size of its world.

    Args:
        rank: This rank.
        size: The number of ranks.
        dead: Those that have died.
    """

    def __init__(self, rank: int = 0, size: int = 1, dead: Iterable[int] = ()) -> None:
        self.rank, self.size, self.dead = rank, size, frozenset(dead)

    def barrier(self) -> None:
        """Return at once."""

    def run_on_survivors(self, collective: Callable[[Any], Any], what: str = "") -> Any:
        """Return the result of ``collective``, with this object as the communicator."""
        return collective(self)

    def allgather(self, value: Any) -> list[Any]:
        """Return a list of the one value."""
        return [value]

    def bcast(self, value: Any) -> Any:
        """Return the value."""
        return value

    def Bcast(self, values: Any) -> None:
        """Do nothing: there is no other rank."""

    def Get_rank(self) -> int:
        """Return 0: this is the first one alive."""
        return 0

    def Get_size(self) -> int:
        """Return 1: all others have died."""
        return 1

    def Allgather(self, mine: Any, found: Any) -> None:
        """Store the one contribution."""
        found[...] = mine
