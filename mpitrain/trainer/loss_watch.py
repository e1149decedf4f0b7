"""The end of a run that has diverged: its losses stay NaN or infinite."""

from __future__ import annotations

import math

from mpitrain.errors import Diverged

MOST_IN_A_ROW = 20
"""The number of losses in a row that are not finite after which a run has diverged. A single bad mini-batch, or a
method that replaces a rank's non-finite values, ends such a row."""


class LossWatch:
    """A count of the consecutive non-finite losses of a rank.

    Args:
        stops: Whether to end the run when the count reaches ``MOST_IN_A_ROW``.
    """

    def __init__(self, stops: bool) -> None:
        self._stops, self._in_a_row = stops, 0

    def add(self, loss: float) -> None:
        """Add the loss of a mini-batch. Local.

        Raises:
            Diverged: The losses stay NaN or infinite.
        """
        self._in_a_row = 0 if math.isfinite(loss) else self._in_a_row + 1
        if self._stops and self._in_a_row >= MOST_IN_A_ROW:
            raise Diverged(
                f"the loss has not been finite for {MOST_IN_A_ROW} steps: use a smaller --lr, or --clip-norm; or "
                "--on-nonfinite skip to go on"
            )
