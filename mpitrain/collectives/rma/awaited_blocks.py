"""The blocks that a visit has not requested yet."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class AwaitedBlocks:
    """The blocks that a visit has not requested yet. Their homes take turns, so that each of them has work.

    Args:
        order: The blocks of the visit; those of one home are requested in this order.
        homes: The home of each block.
    """

    def __init__(self, order: Sequence[int], homes: Sequence[int]) -> None:
        self._homes = homes
        self._of_home: dict[int, deque[int]] = {}  # the home whose turn it is first
        for index in order:
            self._of_home.setdefault(homes[index], deque()).append(index)

    def first(self, home: int | None = None) -> int | None:
        """Return the next block of a home, or of the home whose turn it is; None if there is none. Local."""
        if home is None:
            home = next(iter(self._of_home), None)
        blocks = None if home is None else self._of_home.get(home)
        return blocks[0] if blocks else None

    def remove(self, index: int) -> None:
        """Remove a block that ``first`` has returned; then it is another home's turn. Local."""
        home = self._homes[index]
        blocks = self._of_home.pop(home)
        blocks.popleft()
        if blocks:
            self._of_home[home] = blocks
