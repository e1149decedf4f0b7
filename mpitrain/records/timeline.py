"""``Timeline``: records the phases of all ranks and writes them as one trace."""

from __future__ import annotations

import contextlib
from array import array
from pathlib import Path
from types import TracebackType
from typing import Self

from mpitrain.collectives.world import clock_offset
from mpitrain.collectives.world.clock_offset import ClockOffset
from mpitrain.collectives.world.launch import init
from mpitrain.collectives.world.phases import recorder
from mpitrain.collectives.world.world import World
from mpitrain.errors import UsageError, reason
from mpitrain.log import ANY_RANK, decoration, logger
from mpitrain.records import event_ring, trace
from mpitrain.records.event_ring import EventRing, Events

NAME = "timeline.json"
PARTS = ".timeline"
MOST_EVENTS_OF_RANK = 1 << 16
MOST_EVENTS = 1_000_000


class Timeline:
    """A trace of all ranks: their computation, exchanges, waits, checkpoints and evaluations. Collective to enter.

    Inside the block, every rank records its phases. At the end of the block, the lead writes ``timeline.json`` in the
    Trace Event Format, which https://ui.perfetto.dev shows. Each rank keeps its newest 65,536 events (fewer in a job of
    more than 15 ranks) in a file of 1.5 MB. The trace also has the events of ranks that have died. Clocks are aligned
    to that of rank 0.

    Args:
        folder: The folder of the trace, on a file system that all ranks share.
        world: The ranks; by default those of ``mpitrain.init()``.

    Raises:
        UsageError: A timeline is being recorded already.

    Example:
        >>> with mpitrain.Timeline("runs/mine"):  # doctest: +SKIP
        ...     train()
    """

    def __init__(self, folder: str | Path, *, world: World | None = None) -> None:
        self._folder = Path(folder)
        self._world = world or init()
        self._ring: EventRing | None = None
        self._is_recording = False

    @property
    def path(self) -> Path:
        """The file of the trace."""
        return self._folder / NAME

    @property
    def _parts(self) -> Path:
        return self._folder / PARTS

    def start(self) -> None:
        """Begin to record. Collective."""
        if recorder.is_on:
            raise UsageError("a timeline is being recorded already: end it before you begin another one")
        room = max(1024, min(MOST_EVENTS_OF_RANK, MOST_EVENTS // self._world.size))
        rank = self._world.rank
        try:
            self._parts.mkdir(parents=True, exist_ok=True)
            self._ring = EventRing(self._parts / f"rank-{rank:05}.events", rank, room)
        except OSError as error:
            self._warn(error)
        self._is_recording = True
        self._store_offset(0, clock_offset.measure(self._world))
        if self._ring is not None:
            recorder.start(self._write)

    def _store_offset(self, which: int, offset: ClockOffset | None) -> None:
        if self._ring is not None:
            try:
                self._ring.set_offset(which, offset)
            except OSError as error:
                self._drop(error)

    def _write(self, events: array[float]) -> None:
        if self._ring is not None:
            try:
                self._ring.append(events)
            except OSError as error:
                self._drop(error)

    def _drop(self, error: OSError) -> None:
        """Record no more on this rank."""
        recorder.is_on = False
        if self._ring is not None:
            self._ring.close()
            self._ring = None
        self._warn(error)

    def _warn(self, error: OSError) -> None:
        logger.warning("the timeline lacks events of this rank (%s)", reason(error), extra=ANY_RANK)

    def stop(self) -> None:
        """End the recording and write the trace; a second call does nothing. Collective."""
        if not self._is_recording:
            return
        recorder.stop()
        self._store_offset(1, clock_offset.measure(self._world))
        self._world.barrier()  # all events are in the files
        self.close()
        self._world.barrier()  # the lead has written the trace

    def close(self) -> None:
        """End the recording, on the lead with a trace of all events that are stored so far. Local."""
        if not self._is_recording:
            return
        self._is_recording = False
        recorder.stop()
        if self._ring is not None:
            self._ring.close()
            self._ring = None
        if self._world.rank == self._world.leader:
            with decoration("the timeline"):
                trace.write(self.path, self._rings(), self._world.hosts)
                for path in self._parts.iterdir():
                    path.unlink(missing_ok=True)
                self._parts.rmdir()

    def _rings(self) -> list[Events]:
        """Return the events of all ranks that have stored some."""
        rings = []
        for rank in range(self._world.size):
            with contextlib.suppress(OSError, ValueError):
                rings.append(event_ring.read(self._parts / f"rank-{rank:05}.events"))
        return rings

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.stop()
        else:
            self.close()
