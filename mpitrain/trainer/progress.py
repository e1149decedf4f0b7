"""The progress bar of rank 0: loss, samples per second over all ranks, and the shares of their time."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mpitrain.log import decoration, is_terminal
from mpitrain.trainer.counters import Totals
from mpitrain.trainer.epoch_line import details, epoch_line, remaining_seconds, start_line
from mpitrain.trainer.run import Hook, Point, Run

LAUNCHERS = ("mpirun", "mpiexec", "prterun", "orterun", "mpiexec.hydra", "srun")
SECONDS_BETWEEN_LOG_LINES = 15.0
SECONDS_BETWEEN_NOTES = 0.25
"""A tiny model trains for hundreds of epochs per second, so not every epoch is printed."""

COLUMNS_UNDER_LAUNCHER = 110
"""Under a launcher the width of the terminal is unknown."""


def ends_in_terminal() -> bool:
    """Return whether standard error is a terminal, directly or through a pipe to the launcher."""
    if is_terminal(sys.stderr):
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
    """A progress bar over gradients, or over seconds if the budget is a time. It prints nothing if ``show`` is false.

    On a terminal, the bar is redrawn. In the log of a batch system, a line appears every 15 seconds.

    Args:
        name: The name of the run, before the bar.
        gradients: The budget in gradients of all ranks; None if the budget is a time.
        seconds: The budget in seconds, if it is a time.
        done: The part of the budget that a resumed run has used already.
        show: Whether this rank draws the bar.
    """

    def __init__(self, name: str, *, gradients: int | None, seconds: float | None, done: float, show: bool) -> None:
        self._name, self._show = name, show
        self._counts_gradients = gradients is not None
        self._total = gradients if gradients is not None else round(seconds or 0.0, 1)
        self._last_line, self._last_note = time.monotonic(), -math.inf
        self._bar: Any = None
        if not show:
            return
        with self._guarded():
            self._bar = self._open_bar(done) if ends_in_terminal() else None

    def _open_bar(self, done: float) -> Any:
        return tqdm(
            total=self._total,
            initial=done,
            desc=self._name,
            dynamic_ncols=is_terminal(sys.stderr),
            ncols=None if is_terminal(sys.stderr) else COLUMNS_UNDER_LAUNCHER,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        )

    def update(
        self, *, gradients: int, seconds: float, loss: float, samples_per_second: float, shares: Mapping[str, float]
    ) -> None:
        """Advance the bar."""
        if not self._show:
            return
        with self._guarded():
            self._update(gradients, seconds, loss, samples_per_second, shares)

    def _update(
        self, gradients: int, seconds: float, loss: float, samples_per_second: float, shares: Mapping[str, float]
    ) -> None:
        done = min(gradients if self._counts_gradients else seconds, self._total)
        spent = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        status = f"loss {loss:.3f}, {samples_per_second:,.0f} samples/s, {spent}"
        if self._bar is not None:
            self._bar.set_postfix_str(status, refresh=False)
            self._bar.update(done - self._bar.n)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LOG_LINES:
            self._last_line = time.monotonic()
            self._print(f"{self._name}: {done / max(self._total, 1e-9):4.0%}  {seconds:7.1f} s  {status}")

    def note(self, text: str, *, last: bool = False) -> None:
        """Print a line above the bar.

        Without a bar, a line that follows another one too soon is dropped, unless it is the ``last`` one.
        """
        now = time.monotonic()
        if self._show and (last or now - self._last_note >= SECONDS_BETWEEN_NOTES):
            self._last_note = now
            with self._guarded():
                self._print(text)

    def _print(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Stop redrawing the bar, and end its line."""
        if self._bar is not None:
            with self._guarded():
                self._bar.refresh()
                self._bar.close()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Show no more progress after an error of the terminal."""
        worked = False
        with decoration("the progress bar"):
            yield
            worked = True
        if not worked:
            self._show, self._bar = False, None


class ProgressHook(Hook):
    """The hook that shows the progress of a run on rank 0."""

    def __init__(self, progress: Progress, *, verbose: bool = False) -> None:
        self._progress, self._verbose = progress, verbose
        self._train_loss = math.nan
        self._began = 0.0, 0.0  # the part of the budget and the seconds that a resumed run has behind it
        self._details = ""

    def on_start(self, run: Run) -> None:
        """Print a line about the run. With ``verbose``, also print its settings."""
        self._began = self._done(run, run.counters.totals().gradients), run.clock.seconds
        for line in (start_line(run), *(details(run) if self._verbose else ())):
            self._progress.note(line, last=True)

    def _done(self, run: Run, gradients: int) -> float:
        """Return the part of the budget that is used up, in its unit."""
        return run.clock.seconds if run.budget.gradients is None else gradients

    def on_totals(self, run: Run, totals: Totals, *, in_full: bool) -> None:
        """Advance the bar."""
        seconds = run.clock.seconds
        pace = run.plan.n_samples(totals.steps_of_ranks) / max(seconds, 1e-9)
        self._train_loss = totals.loss
        if self._verbose:
            spent = ", ".join(f"{name} {share:.0%}" for name, share in totals.shares.items())
            self._details = f"  {pace:,.0f} samples/s  {spent}"
        self._progress.update(
            gradients=totals.gradients,
            seconds=seconds,
            loss=totals.loss,
            samples_per_second=pace,
            shares=totals.shares,
        )

    def on_evaluation(self, run: Run, point: Point) -> None:
        """Print a line for the evaluation, except for the one at the start."""
        if run.step:
            total = run.budget.seconds if run.budget.gradients is None else run.budget.gradients
            done, seconds = self._done(run, point.gradients) - self._began[0], point.seconds - self._began[1]
            remaining = None if total is None else remaining_seconds(done, total - self._began[0], seconds)
            is_last = run.is_complete and point is run.points[-1]
            line = epoch_line(run, point, self._train_loss, None if is_last else remaining)
            self._progress.note(line + self._details, last=is_last or self._verbose)

    def close(self) -> None:
        """End the bar."""
        self._progress.close()
