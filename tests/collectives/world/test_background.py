"""What a thread that waits costs the one that computes."""

import sys
import time
from types import SimpleNamespace

import pytest

from mpitrain.collectives.world import background
from mpitrain.collectives.world.wakeup import request_short_slices

WAIT_SECONDS = 0.2


def looks_until(seconds):
    """How often a wait of so many seconds looks."""
    end, polls = time.perf_counter() + seconds, []

    def is_done():
        polls.append(None)
        return time.perf_counter() >= end

    background.wait_with_backoff(is_done)
    assert time.perf_counter() >= end
    return len(polls)


def test_a_background_thread_looks_seldom_and_the_foreground_often():
    thread = background.Background(threads=True)
    counts = []
    thread.start(lambda: counts.append(looks_until(WAIT_SECONDS))).wait()
    thread.stop()
    # Naps as long as the wait so far, from 0.2 to 4 ms: the first 4 ms are half a dozen of looks, the rest 49 at most.
    assert 1 < counts[0] < 1.3 * WAIT_SECONDS / background.LONGEST_BACKOFF_SECONDS
    assert looks_until(WAIT_SECONDS) > 1


def test_naps_are_as_long_as_the_time_since_the_first_one_between_the_shortest_and_the_longest(monkeypatch):
    now, slept = [100.0], []

    def sleep(seconds):
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(background, "time", SimpleNamespace(perf_counter=lambda: now[0], sleep=sleep))
    backoff = background.Backoff(1.0, 10.0)
    now[0] += 50  # whatever went before
    for _ in range(7):
        backoff.rest()
    assert slept == [1.0, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0]


def test_what_is_done_is_looked_at_once():
    assert looks_until(0.0) == 1


def fail():
    raise KeyError("shard")


@pytest.mark.parametrize("n_before", [0, 2])
def test_what_fails_last_is_told_at_the_stop_if_nobody_has_heard_of_it(n_before):
    thread = background.Background(threads=True)
    for _ in range(n_before):
        thread.start(lambda: None)
    thread.start(fail)
    with pytest.raises(KeyError, match="shard"):
        thread.stop()
    thread.stop()  # once is enough

    started = thread.start(fail)
    with pytest.raises(KeyError, match="shard"):
        started.wait()
    thread.stop()


@pytest.mark.parametrize("machine", ["x86_64", "an unknown one"])
def test_short_slices_are_asked_for_where_it_is_known_how(monkeypatch, machine):
    calls = []

    class Library:
        def syscall(self, *arguments):
            calls.append(arguments)

    monkeypatch.setattr("ctypes.CDLL", lambda name: Library())
    monkeypatch.setattr("platform.machine", lambda: machine)
    request_short_slices()
    assert len(calls) == (machine == "x86_64" and sys.platform == "linux")
