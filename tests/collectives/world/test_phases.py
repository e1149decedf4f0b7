"""The recorder: phases without gaps, waits of each thread, and bounded memory."""

from __future__ import annotations

import itertools
import threading
from array import array
from types import SimpleNamespace

import pytest

from mpitrain.collectives.world import phases
from mpitrain.collectives.world.phases import (
    BACKGROUND_WAITING,
    COMPUTE,
    EVENTS_PER_WRITE,
    EXCHANGE,
    UPDATE,
    WAITING,
    Recorder,
)
from mpitrain.collectives.world.statistics import Statistics


@pytest.fixture
def recorded(monkeypatch):
    """A recorder whose clock shows 0 at the start and 10 at the stop, and its events."""
    ticks = itertools.count(0, 10)
    monkeypatch.setattr(phases, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    recorder, events, pieces = Recorder(), [], []

    def write(numbers: array) -> None:
        pieces.append(len(numbers) // 3)
        events.extend(tuple(numbers[k : k + 3]) for k in range(0, len(numbers), 3))

    recorder.start(write)
    return SimpleNamespace(recorder=recorder, events=events, pieces=pieces)


def test_phases_follow_each_other_without_gaps(recorded):
    recorder = recorded.recorder
    outer = recorder.enter(EXCHANGE, 1.0)
    inner = recorder.enter(UPDATE, 2.0)
    recorder.enter(inner, 3.0)
    recorder.enter(outer, 4.0)
    recorder.stop()
    expected = [(COMPUTE, 0, 1), (EXCHANGE, 1, 2), (UPDATE, 2, 3), (EXCHANGE, 3, 4), (COMPUTE, 4, 10)]
    assert recorded.events == expected


def test_a_wait_belongs_to_its_thread(recorded):
    recorded.recorder.add_wait(5.0, 6.0)
    thread = threading.Thread(target=recorded.recorder.add_wait, args=(7.0, 8.0))
    thread.start()
    thread.join()
    recorded.recorder.flush()
    assert recorded.events == [(WAITING, 5.0, 6.0), (BACKGROUND_WAITING, 7.0, 8.0)]


def test_events_are_stored_in_pieces_of_a_fixed_size(recorded):
    for _ in range(2 * EVENTS_PER_WRITE + 5):
        recorded.recorder.enter(EXCHANGE, 1.0)
    assert recorded.pieces == [EVENTS_PER_WRITE, EVENTS_PER_WRITE]
    recorded.recorder.stop()
    recorded.recorder.stop()
    assert sum(recorded.pieces) == len(recorded.events) == 2 * EVENTS_PER_WRITE + 6


@pytest.mark.parametrize("is_on", [True, False])
def test_waits_are_recorded_where_the_statistics_count_them(monkeypatch, recorded, is_on):
    recorded.recorder.is_on = is_on
    monkeypatch.setattr("mpitrain.collectives.world.statistics.recorder", recorded.recorder)
    ticks = itertools.count(10)
    clock = SimpleNamespace(perf_counter=lambda: float(next(ticks)))
    monkeypatch.setattr("mpitrain.collectives.world.statistics.time", clock)
    counters = Statistics()
    counters.add_wait(8.0)
    counters.add_lock_wait(0.5)
    counters.add_lock_wait(0.0)
    assert (counters.wait_seconds, counters.lock_wait_seconds) == (2.5, 0.5)
    recorded.recorder.flush()
    assert recorded.events == ([(WAITING, 8.0, 10.0), (WAITING, 10.5, 11.0)] if is_on else [])
