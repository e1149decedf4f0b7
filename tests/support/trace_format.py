"""A validator of traces: the rules of the Trace Event Format (Google) that apply to complete events and metadata."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

METADATA = {
    "process_name": ("name", str),
    "process_labels": ("labels", str),
    "process_sort_index": ("sort_index", int),
    "thread_name": ("name", str),
    "thread_sort_index": ("sort_index", int),
}
"""The metadata events of the format, with the argument of each and its type."""

DISPLAY_UNITS = ("ms", "ns")
HALF_A_NANOSECOND = 0.0005


@dataclass
class Trace:
    """A valid trace.

    Attributes:
        document: The whole document.
        spans: The complete events by the names of their process and their track: (name, ts, dur), in microseconds.
    """

    document: dict[str, Any]
    spans: dict[tuple[str, str], list[tuple[str, float, float]]] = field(default_factory=dict)


def load(path: Path) -> Trace:
    """Return the trace in a file, after a check of every event.

    Raises:
        ValueError: The file breaks a rule of the format; the message names it.
    """

    def refuse(text: str) -> None:
        raise ValueError(f"{text} is no JSON")

    return check(json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse))


def check(document: Any) -> Trace:
    """Return a document as a trace; see ``load``."""
    _require(isinstance(document, dict) and isinstance(document.get("traceEvents"), list), "no list traceEvents")
    _require(document.get("displayTimeUnit", "ms") in DISPLAY_UNITS, "displayTimeUnit")
    names: dict[str, dict[tuple[int, int], str]] = {"process_name": {}, "thread_name": {}}
    complete = []
    for event in document["traceEvents"]:
        _check_event(event)
        if event["ph"] == "X":
            complete.append(event)
        elif event["name"] in names:
            key = (event["pid"], event["tid"] if event["name"] == "thread_name" else 0)
            _require(key not in names[event["name"]], f"two names of {key}")
            names[event["name"]][key] = event["args"]["name"]
    times = [event["ts"] for event in complete]
    _require(times == sorted(times), "the events are not sorted by ts")
    found = defaultdict(list)
    for event in complete:
        process = names["process_name"].get((event["pid"], 0))
        track = names["thread_name"].get((event["pid"], event["tid"]))
        _require(process is not None and track is not None, f"no name of {event['pid']}, {event['tid']}")
        found[str(process), str(track)].append((event["name"], event["ts"], event["dur"]))
    for key, spans in found.items():
        _check_nesting(key, spans)
    return Trace(document, dict(found))


def _check_event(event: Any) -> None:
    _require(isinstance(event, dict), "an event is no object")
    _require(event.get("ph") in ("X", "M"), f"ph of {event}")
    _require(isinstance(event.get("name"), str), f"name of {event}")
    for key in ("pid", "tid"):
        _require(type(event.get(key)) is int and event[key] >= 0, f"{key} of {event}")
    _require(type(event.get("ts")) in (int, float) and event["ts"] >= 0, f"ts of {event}")
    if event["ph"] == "X":
        _require(type(event.get("dur")) in (int, float) and event["dur"] >= 0, f"dur of {event}")
        _require(isinstance(event.get("cat"), str), f"cat of {event}")
        _require(event["pid"] > 0, "process 0 is the idle task")
    else:
        _require(event["name"] in METADATA, f"unknown metadata {event}")
        argument, kind = METADATA[event["name"]]
        _require(type(event.get("args", {}).get(argument)) is kind, f"args of {event}")


def _check_nesting(key: tuple[str, str], spans: list[tuple[str, float, float]]) -> None:
    """Check that the spans of a track contain each other or are disjoint."""
    ends: list[float] = []
    for _, ts, duration in spans:
        while ends and ends[-1] <= ts + HALF_A_NANOSECOND:
            ends.pop()
        _require(not ends or ts + duration <= ends[-1] + HALF_A_NANOSECOND, f"spans of {key} overlap at {ts}")
        ends.append(ts + duration)


def _require(holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(rule)
