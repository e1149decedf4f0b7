"""The trace of a run: the phases of all ranks in one file, in the Trace Event Format.

Perfetto (https://ui.perfetto.dev) and Chrome (chrome://tracing) show it. Every rank is a process, and every kind of
phase a track.

Source: Google, "Trace Event Format", the JSON object format with complete events (ph "X") and metadata (ph "M").
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpitrain.collectives.world.clock_offset import aligned
from mpitrain.collectives.world.phases import (
    BACKGROUND_WAITING,
    CHECKPOINT,
    COMPUTE,
    EVALUATION,
    EXCHANGE,
    UPDATE,
    WAITING,
)
from mpitrain.errors import printable
from mpitrain.records.durable import replace_file
from mpitrain.records.event_ring import Events

TRACKS = ("compute", "exchange", "waiting", "waiting (background)", "checkpoint", "evaluation")

NAMES = {
    COMPUTE: ("compute", "compute"),
    UPDATE: ("local update", "compute"),
    EXCHANGE: ("exchange", "exchange"),
    CHECKPOINT: ("checkpoint", "checkpoint"),
    EVALUATION: ("evaluation", "evaluation"),
    WAITING: ("wait", "waiting"),
    BACKGROUND_WAITING: ("wait", "waiting (background)"),
}
"""The name and the track of each phase."""

EVENTS_PER_PIECE = 10_000
MICROSECONDS = 1e6


def write(path: Path, rings: Sequence[Events], hosts: Sequence[str]) -> None:
    """Write a trace. Local.

    Args:
        path: The file, which appears complete or not at all.
        rings: The events of the ranks.
        hosts: The host name of each rank.

    Raises:
        OSError: The file cannot be written.
    """
    pieces = [
        b'{"displayTimeUnit":"ms",\n"otherData":',
        json.dumps(_circumstances(rings)).encode(),
        b',\n"traceEvents":[\n',
        ",\n".join(map(json.dumps, _metadata(rings, hosts))).encode(),
    ]
    for lines in _lines(rings):
        pieces.append(b",\n" + ",\n".join(lines).encode())
    replace_file(path, [*pieces, b"\n]}\n"])


def _metadata(rings: Sequence[Events], hosts: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the events that name processes and tracks."""
    for ring in rings:
        pid = _process(ring.rank)
        host = f" ({printable(hosts[ring.rank])})" if ring.rank < len(hosts) else ""
        yield _metadatum("process_name", pid, name=f"rank {ring.rank}{host}")
        yield _metadatum("process_sort_index", pid, sort_index=ring.rank)
        for k, name in enumerate(TRACKS):
            yield _metadatum("thread_name", pid, k + 1, name=name)
            yield _metadatum("thread_sort_index", pid, k + 1, sort_index=k)


def _metadatum(kind: str, pid: int, tid: int = 0, **arguments: Any) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "ts": 0, "pid": pid, "tid": tid, "args": arguments}


def _process(rank: int) -> int:
    return rank + 1  # Perfetto takes process 0 for the idle task of the system


def _lines(rings: Sequence[Events]) -> Iterator[list[str]]:
    """Yield the lines of complete events in the order of their beginnings, in pieces."""
    known = [_without_overlaps(ring) for ring in rings if ring.phases.size]
    if not known:
        return
    began = np.concatenate([_by_reference(ring, ring.began) for ring in known])
    ended = np.concatenate([_by_reference(ring, ring.ended) for ring in known])
    phases = np.concatenate([ring.phases for ring in known])
    processes = np.concatenate([np.full(ring.phases.size, _process(ring.rank)) for ring in known])
    start = began.min()
    # Rounded ends, not rounded durations: phases that follow each other must not overlap.
    first, last = (np.rint((times - start) * 1e9).astype(np.int64) for times in (began, ended))
    order = np.lexsort((last, first))
    heads = {
        phase: f'{{"name":"{name}","cat":"{track}","ph":"X","tid":{TRACKS.index(track) + 1},"pid":'
        for phase, (name, track) in NAMES.items()
    }
    for at in range(0, order.size, EVENTS_PER_PIECE):
        piece = order[at : at + EVENTS_PER_PIECE]
        columns = (phases[piece], processes[piece], first[piece], last[piece] - first[piece])
        yield [
            f'{heads[phase]}{pid},"ts":{ts / 1000:.3f},"dur":{max(duration, 0) / 1000:.3f}}}'
            for phase, pid, ts, duration in zip(*(column.tolist() for column in columns), strict=True)
        ]


def _without_overlaps(ring: Events) -> Events:
    """Return the events in which the waits of each track follow each other.

    Several threads may wait in the background at the same time, and the format does not allow spans of a track to
    overlap. The part of a wait that lies in an earlier one is cut off.
    """
    began, ended, keeps = ring.began.copy(), ring.ended, np.ones(ring.phases.size, bool)
    for phase in (WAITING, BACKGROUND_WAITING):
        [at] = np.nonzero(ring.phases == phase)
        at = at[np.argsort(began[at], kind="stable")]
        if at.size:
            until = np.maximum.accumulate(ended[at])
            began[at[1:]] = np.maximum(began[at[1:]], until[:-1])
            keeps[at] = ended[at] > began[at]
    return dataclasses.replace(ring, phases=ring.phases[keeps], began=began[keeps], ended=ended[keeps])


def _by_reference(ring: Events, times: np.ndarray) -> np.ndarray:
    return times if ring.first is None else aligned(times, ring.first, ring.last)


def _circumstances(rings: Sequence[Events]) -> dict[str, Any]:
    """Return how the clocks were aligned, and how many events are missing."""
    clocks = {}
    for ring in rings:
        if ring.first is not None:
            known = [one for one in (ring.first, ring.last) if one is not None]
            drift = 0.0
            if ring.last is not None and ring.last.at > ring.first.at:
                drift = (ring.last.seconds - ring.first.seconds) / (ring.last.at - ring.first.at)
            clocks[str(ring.rank)] = {
                "offset_seconds": ring.first.seconds,
                "drift": drift,
                "error_seconds": max(one.error_seconds for one in known),
            }
    return {
        "clock_alignment": "to rank 0; Cristian 1989, at the beginning and at the end, linear between",
        "clocks": clocks,
        "dropped_events": {str(ring.rank): ring.n_dropped for ring in rings},
    }
