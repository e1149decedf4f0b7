"""The progress bar of rank 0: loss, samples a second over all ranks, and where their time goes."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

LAUNCHERS = ("mpirun", "mpiexec", "prterun", "orterun", "mpiexec.hydra", "srun")
SECONDS_BETWEEN_LOG_LINES = 15.0
SECONDS_BETWEEN_SAYINGS = 0.25
"""A tiny model makes hundreds of epochs in a second, and nobody reads a line for each."""


LAUNCHED_COLUMNS = 110
"""Under a launcher the width of the terminal is not known."""


def ends_in_terminal() -> bool:
    """Whether somebody reads standard error in a terminal: this process's, or that of the launcher it is piped to."""
    if sys.stderr.isatty():
        return True
    process = os.getppid()
    while process > 1:
        try:
            launcher = Path(f"/proc/{process}/comm").read_text().strip() in LAUNCHERS
            if launcher and os.readlink(f"/proc/{process}/fd/2").startswith("/dev/pts/"):
                return True
            process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])  # its parent
        except (OSError, ValueError, IndexError):
            return False
    return False


class Progress:
    """A bar over gradients, or over seconds when the budget is a time. Silent where ``show`` is false.

    In a terminal it is drawn over and over; in a batch system's log it is a line every quarter of a minute.

    Args:
        name: Of the run, before the bar.
        gradients: The budget over all ranks, if that is the budget.
        seconds: The budget in seconds, otherwise.
        done: How much of it a resumed run has behind it.
        show: Whether this rank draws it.
    """

    def __init__(self, name: str, *, gradients: int | None, seconds: float | None, done: float, show: bool) -> None:
        self._name, self._show = name, show
        self._counts_gradients = gradients is not None
        self._total = gradients if gradients is not None else round(seconds or 0.0, 1)
        self._said, self._spoke = time.monotonic(), -math.inf
        self._bar: Any = None
        if show and ends_in_terminal():
            self._bar = tqdm(
                total=self._total,
                initial=done,
                desc=name,
                dynamic_ncols=sys.stderr.isatty(),
                ncols=None if sys.stderr.isatty() else LAUNCHED_COLUMNS,
                bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
            )

    def update(
        self, *, gradients: int, seconds: float, loss: float, samples_per_second: float, shares: Mapping[str, float]
    ) -> None:
        """Move the bar on."""
        if not self._show:
            return
        done = min(gradients if self._counts_gradients else seconds, self._total)
        spent = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        status = f"loss {loss:.3f}, {samples_per_second:,.0f} samples/s, {spent}"
        if self._bar is not None:
            self._bar.set_postfix_str(status, refresh=False)
            self._bar.update(done - self._bar.n)
        elif time.monotonic() - self._said >= SECONDS_BETWEEN_LOG_LINES:
            self._said = time.monotonic()
            self._print(f"{self._name}: {done / max(self._total, 1e-9):4.0%}  {seconds:7.1f} s  {status}")

    def say(self, text: str, *, last: bool = False) -> None:
        """Print a line, above the bar if there is one, unless there has just been another and this is not the last."""
        now = time.monotonic()
        if self._show and (last or now - self._spoke >= SECONDS_BETWEEN_SAYINGS):
            self._spoke = now
            self._print(text)

    def _print(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()
