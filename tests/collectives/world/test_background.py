"""Waiting threads: their polls, their pauses, and the errors of background functions."""

import sys
import time
from types import SimpleNamespace

import pytest

from mpitrain.collectives.world import background
from mpitrain.collectives.world.wakeup import request_short_slices

WAIT_SECONDS = 0.2


def polls_until(seconds):
    """Return the number of polls in a wait of so many seconds."""
    end, polls = time.perf_counter() + seconds, []

    def is_done():
        polls.append(None)
        return time.perf_counter() >= end

    background.wait_with_backoff(is_done)
    assert time.perf_counter() >= end
    return len(polls)


def test_a_background_thread_polls_rarely():
    thread = background.Background(threads=True)
    counts = []
    thread.start(lambda: counts.append(polls_until(WAIT_SECONDS))).wait()
    thread.stop()
    # Pauses as long as the wait so far, from 0.2 to 4 ms: half a dozen polls in the first 4 ms, at most 49 in the rest.
    assert 1 < counts[0] < 1.3 * WAIT_SECONDS / background.LONGEST_BACKOFF_SECONDS
    assert polls_until(WAIT_SECONDS) > 1


def test_pauses_grow_with_the_wait_from_the_shortest_to_the_longest(monkeypatch):
    now, slept = [100.0], []

    def sleep(seconds):
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(background, "time", SimpleNamespace(perf_counter=lambda: now[0], sleep=sleep))
    backoff = background.Backoff(1.0, 10.0)
    now[0] += 50  # time before the first pause does not count
    for _ in range(7):
        backoff.rest()
    assert slept == [1.0, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0]


def test_a_finished_operation_is_polled_once():
    assert polls_until(0.0) == 1


def fail():
    raise KeyError("shard")


@pytest.mark.parametrize("n_before", [0, 2])
def test_stop_raises_the_last_exception_unless_wait_did(n_before):
    thread = background.Background(threads=True)
    for _ in range(n_before):
        thread.start(lambda: None)
    thread.start(fail)
    with pytest.raises(KeyError, match="shard"):
        thread.stop()
    thread.stop()  # raised once

    started = thread.start(fail)
    with pytest.raises(KeyError, match="shard"):
        started.wait()
    thread.stop()


@pytest.mark.parametrize("machine", ["x86_64", "unknown"])
def test_short_slices_are_requested_where_the_system_call_is_known(monkeypatch, machine):
    calls = []

    class Library:
        def syscall(self, *arguments):
            calls.append(arguments)

    monkeypatch.setattr("ctypes.CDLL", lambda name: Library())
    monkeypatch.setattr("platform.machine", lambda: machine)
    request_short_slices()
    assert len(calls) == (machine == "x86_64" and sys.platform == "linux")
