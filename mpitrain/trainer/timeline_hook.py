"""The hook of ``--timeline``."""

from __future__ import annotations

from mpitrain.records.timeline import Timeline
from mpitrain.trainer.run import Hook, Run


class TimelineHook(Hook):
    """The hook that records the phases of all ranks from the first step to the last exchange.

    Args:
        timeline: The timeline in the folder of the run.
    """

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline

    def on_start(self, run: Run) -> None:
        """Begin to record. Collective."""
        self._timeline.start()

    def on_end(self, run: Run) -> None:
        """Write the trace. Collective."""
        self._timeline.stop()

    def close(self) -> None:
        """Write the events that there are, after an error."""
        self._timeline.close()
