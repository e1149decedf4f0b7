"""The trace: valid by the published format, by one clock, and with every event of every rank."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from support import trace_format

from mpitrain.collectives.world.clock_offset import ClockOffset
from mpitrain.collectives.world.phases import (
    BACKGROUND_WAITING,
    CHECKPOINT,
    COMPUTE,
    EVALUATION,
    EXCHANGE,
    UPDATE,
    WAITING,
)
from mpitrain.records import trace
from mpitrain.records.event_ring import Events

EVENTS = [
    *((COMPUTE, 1.0, 2.0), (WAITING, 2.25, 2.5), (EXCHANGE, 2.0, 3.0), (UPDATE, 3.0, 3.25), (EVALUATION, 3.25, 5.0)),
    *((CHECKPOINT, 5.0, 5.5), (BACKGROUND_WAITING, 1.5, 5.25)),
]


def ring(rank: int, events: list[tuple[int, float, float]], first: ClockOffset | None, last: ClockOffset | None = None):
    table = np.array(events).reshape(-1, 3)
    return Events(rank, table[:, 0].astype(int), table[:, 1], table[:, 2], 10 * rank, first, last)


def test_every_event_is_on_its_track_in_microseconds_since_the_first_one(tmp_path: Path) -> None:
    trace.write(tmp_path / "t.json", [ring(0, EVENTS, None)], ["a"])
    found = trace_format.load(tmp_path / "t.json").spans
    assert found == {
        ("rank 0 (a)", "compute"): [("compute", 0, 1e6), ("local update", 2e6, 0.25e6)],
        ("rank 0 (a)", "exchange"): [("exchange", 1e6, 1e6)],
        ("rank 0 (a)", "waiting"): [("wait", 1.25e6, 0.25e6)],
        ("rank 0 (a)", "waiting (background)"): [("wait", 0.5e6, 3.75e6)],
        ("rank 0 (a)", "evaluation"): [("evaluation", 2.25e6, 1.75e6)],
        ("rank 0 (a)", "checkpoint"): [("checkpoint", 4e6, 0.5e6)],
    }


def test_the_events_of_all_ranks_are_by_the_clock_of_rank_0(tmp_path: Path) -> None:
    """The clock of rank 1 is 100 s behind at its time 0 and 200 s at its time 1000; they began at the same moment."""
    late = ring(1, [(COMPUTE, 500.0, 510.0)], ClockOffset(0.0, 100.0, 0.5), ClockOffset(1000.0, 200.0, 0.25))
    zero = ClockOffset(0.0, 0.0, 0.0)
    trace.write(tmp_path / "t.json", [ring(0, [(COMPUTE, 650.0, 660.0)], zero, zero), late], ["a", "b"])
    found = trace_format.load(tmp_path / "t.json")
    assert found.spans == {
        ("rank 0 (a)", "compute"): [("compute", 0, 10e6)],
        ("rank 1 (b)", "compute"): [("compute", 0, 11e6)],
    }
    assert found.document["otherData"]["clocks"]["1"] == {"offset_seconds": 100.0, "drift": 0.1, "error_seconds": 0.5}
    assert found.document["otherData"]["dropped_events"] == {"0": 0, "1": 10}


def test_phases_that_follow_each_other_do_not_overlap_after_rounding(tmp_path: Path) -> None:
    times = np.cumsum(np.random.default_rng(0).exponential(1e-6, 25_001))  # more than one piece
    events = [(EXCHANGE, began, ended) for began, ended in itertools.pairwise(times)]
    trace.write(tmp_path / "t.json", [ring(0, events, None)], [])
    [spans] = trace_format.load(tmp_path / "t.json").spans.values()
    assert len(spans) == 25_000
    for (_, ts, duration), (_, following, _) in itertools.pairwise(spans):
        assert following == pytest.approx(ts + duration, abs=1e-4)


def test_waits_at_the_same_time_cover_the_same_time_without_an_overlap(tmp_path: Path) -> None:
    waits = [(1.0, 3.0), (4.0, 5.0), (2.0, 6.0), (4.5, 4.75), (7.0, 8.0)]
    events = [(phase, *wait) for phase in (WAITING, BACKGROUND_WAITING) for wait in waits]
    trace.write(tmp_path / "t.json", [ring(0, events, None)], [])
    found = trace_format.load(tmp_path / "t.json").spans
    for spans in (found["rank 0", "waiting"], found["rank 0", "waiting (background)"]):
        assert [(ts / 1e6 + 1, (ts + duration) / 1e6 + 1) for _, ts, duration in spans] == [(1, 3), (3, 6), (7, 8)]


def test_a_hostile_host_name_stays_text(tmp_path: Path) -> None:
    trace.write(tmp_path / "t.json", [ring(0, EVENTS, None)], ['\x1b[2J"}]'])
    assert {process for process, _ in trace_format.load(tmp_path / "t.json").spans} == {'rank 0 (\\x1b[2J"}])'}


def test_a_trace_without_events_is_valid(tmp_path: Path) -> None:
    trace.write(tmp_path / "t.json", [ring(0, [], None)], [])
    assert trace_format.load(tmp_path / "t.json").spans == {}


SOUND = {"name": "a", "cat": "a", "ph": "X", "ts": 1, "dur": 2, "pid": 1, "tid": 1}
NAMED = [
    {"name": "process_name", "ph": "M", "ts": 0, "pid": 1, "tid": 0, "args": {"name": "p"}},
    {"name": "thread_name", "ph": "M", "ts": 0, "pid": 1, "tid": 1, "args": {"name": "t"}},
]


@pytest.mark.parametrize(
    ("events", "rule"),
    [
        ([SOUND | {"ph": "Q"}], "ph of"),
        ([SOUND | {"ts": -1}], "ts of"),
        ([SOUND | {"ts": "1"}], "ts of"),
        ([SOUND | {"dur": -2}], "dur of"),
        ([SOUND | {"pid": "1"}], "pid of"),
        ([{k: v for k, v in SOUND.items() if k != "tid"}], "tid of"),
        ([SOUND | {"tid": 2}], "no name of"),
        ([SOUND, SOUND | {"ts": 0}], "not sorted"),
        ([SOUND, SOUND | {"ts": 2, "dur": 2}], "overlap"),
        ([NAMED[0]], "two names"),
        ([NAMED[0] | {"name": "process"}], "unknown metadata"),
        ([NAMED[0] | {"args": {"title": "p"}}], "args of"),
    ],
)
def test_the_validator_finds_what_breaks_the_format(events: list[dict[str, object]], rule: str) -> None:
    trace_format.check({"traceEvents": [*NAMED, SOUND]})
    with pytest.raises(ValueError, match=rule):
        trace_format.check({"traceEvents": [*NAMED, *events]})


def test_the_validator_refuses_what_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps({"traceEvents": [SOUND | {"ts": float("nan")}]}))
    with pytest.raises(ValueError, match="NaN is no JSON"):
        trace_format.load(tmp_path / "t.json")
