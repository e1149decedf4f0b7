"""A signal asks a run to save and stop; a second SIGTERM or SIGINT ends it at once."""

from __future__ import annotations

import os
import signal
import time

import pytest

from mpitrain.trainer.stop_signal import ENDINGS, REQUESTS, StopSignal

IN_TIME_SECONDS = 150.0


@pytest.fixture
def ended():
    """The exit codes with which the run was ended."""
    return []


@pytest.fixture
def stop(ended):
    before = {each: signal.getsignal(each) for each in REQUESTS}
    with StopSignal(ended.append) as stop:
        yield stop
    assert {each: signal.getsignal(each) for each in REQUESTS} == before
    assert signal.set_wakeup_fd(-1) == -1


def wait_for(ended, n):
    until = time.monotonic() + IN_TIME_SECONDS
    while len(ended) < n and time.monotonic() < until:
        time.sleep(0.01)
    return ended


@pytest.mark.parametrize("number", REQUESTS)
def test_a_signal_is_recorded_and_does_not_end_the_run(stop, ended, number):
    assert stop.number == 0
    os.kill(os.getpid(), number)
    assert stop.number == number
    assert ended == []


@pytest.mark.parametrize("second", ENDINGS)
@pytest.mark.parametrize("first", ENDINGS)
def test_a_second_one_ends_the_run_at_once(stop, ended, first, second):
    os.kill(os.getpid(), first)
    os.kill(os.getpid(), second)
    assert wait_for(ended, 1) == [128 + second]


def test_the_warning_of_a_batch_system_is_not_the_first_of_two(stop, ended):
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.number == signal.SIGTERM
    os.kill(os.getpid(), signal.SIGTERM)
    assert wait_for(ended, 1) == [128 + signal.SIGTERM]
