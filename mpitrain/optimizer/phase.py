"""Phases of a rank's time: in the timeline, and as named ranges in the trace of an active torch profiler."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch.autograd import profiler

from mpitrain.collectives.world.phases import CHECKPOINT, EVALUATION, EXCHANGE, UPDATE, recorder

RANGES = {
    EXCHANGE: "mpitrain.exchange",
    UPDATE: "mpitrain.update",
    CHECKPOINT: "mpitrain.checkpoint",
    EVALUATION: "mpitrain.evaluation",
}
"""The names of the ranges of ``torch.profiler``."""


def begin_range(phase: int) -> Any:
    """Begin the range of a phase in the trace of the active profiler; its ``__exit__`` ends it. Local."""
    opened = profiler.record_function(RANGES[phase])
    opened.__enter__()
    return opened


@contextmanager
def phase_of(phase: int) -> Iterator[None]:
    """Record a block as a phase, if a timeline or a profiler is active. Local."""
    previous = recorder.enter(phase, time.perf_counter()) if recorder.is_on else None
    try:
        with profiler.record_function(RANGES[phase]) if profiler._is_profiler_enabled else nullcontext():
            yield
    finally:
        if previous is not None:
            recorder.enter(previous, time.perf_counter())
