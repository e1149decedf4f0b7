"""The offset between clocks: Cristian's bound, linear drift, and measurements between real ranks."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpitrain.collectives.world.clock_offset import ClockOffset, aligned, estimate, exchange, measure

DELAYS = st.floats(0.0, 1.0)


@given(st.floats(-100.0, 100.0), st.lists(st.tuples(DELAYS, DELAYS), min_size=1, max_size=20))
@settings(deadline=None)
def test_the_truth_lies_within_the_error_whatever_the_delays(offset, delays):
    """A message that takes ``there``, an answer that takes ``back``; the reference is ahead by ``offset``."""
    rounds, now = [], 50.0
    for there, back in delays:
        rounds.append((now, now + there + offset, now + there + back))
        now += there + back + 1.0
    found = estimate(rounds)
    assert abs(found.seconds - offset) <= found.error_seconds + 1e-9
    assert found.error_seconds == pytest.approx(min(there + back for there, back in delays) / 2, abs=1e-9)


def test_equal_delays_give_the_offset_itself():
    found = estimate([(10.0, 17.0, 11.0), (20.0, 25.0 + 0.25, 20.5)])
    assert (found.at, found.seconds, found.error_seconds) == (20.25, 5.0, 0.25)


def test_a_clock_that_drifts_is_aligned_at_every_time_between_the_measurements():
    """A clock that begins 7 s late and gains a second in 1000 s: c = 1.001*t - 7."""
    true = np.linspace(100.0, 300.0, 9)
    clock = 1.001 * true - 7
    first, last = (ClockOffset(clock[k], true[k] - clock[k], 0.0) for k in (0, -1))
    np.testing.assert_allclose(aligned(clock, first, last), true, rtol=0, atol=1e-9)
    np.testing.assert_allclose(aligned(clock, first, None), clock + first.seconds, rtol=0, atol=1e-12)


@pytest.mark.ranks(2, 3)
def test_ranks_of_one_machine_find_an_offset_of_0_within_their_error(world):
    found = exchange(world.comm, time.perf_counter)  # the clock of the machine, which all of them read
    assert abs(found.seconds) <= found.error_seconds
    shared = measure(world)
    assert (shared.seconds, shared.error_seconds) == (0.0, 0.0)


@pytest.mark.ranks(2, 3)
def test_a_rank_whose_clock_is_ahead_finds_by_how_much(world):
    ahead = 1000.0 * world.rank
    found = measure(world, lambda: time.perf_counter() + ahead)
    assert abs(found.seconds + ahead) <= found.error_seconds + 1e-9
