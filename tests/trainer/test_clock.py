"""The clock of a run counts training only."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mpitrain.trainer import clock
from mpitrain.trainer.clock import Clock


@pytest.fixture
def now(monkeypatch):
    now = SimpleNamespace(value=100.0)
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: now.value))
    return now


def test_a_clock_counts_from_where_the_run_was_and_only_between_start_and_stop(now):
    clock = Clock(7.0)
    now.value += 5
    assert clock.seconds == 7
    clock.start()
    now.value += 2
    assert clock.seconds == 9
    clock.stop()
    now.value += 50
    assert clock.seconds == 9


def test_a_clock_stands_still_while_it_is_paused_also_after_errors(now):
    clock = Clock()
    clock.start()
    now.value += 1
    with clock.paused(), clock.paused():
        now.value += 10
        assert clock.seconds == 1
    now.value += 1

    def fail():
        with clock.paused():
            now.value += 10
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail()
    now.value += 1
    assert clock.seconds == 3


def test_a_pause_does_not_start_a_clock_that_was_stopped(now):
    clock = Clock(3.0)
    with clock.paused():
        now.value += 1
    now.value += 1
    assert clock.seconds == 3
