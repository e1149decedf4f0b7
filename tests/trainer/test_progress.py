"""The progress of rank 0: a bar in a terminal, a line now and then in a log."""

from __future__ import annotations

import io
import sys

import pytest

from mpitrain.trainer import progress
from mpitrain.trainer.progress import Progress

SHARES = {"compute": 0.5, "exchange": 0.25, "waiting": 0.25}


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""

    class Clock:
        now = 1000.0

        def monotonic(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def update(bar: Progress, gradients: int, seconds: float = 1.0) -> None:
    bar.update(gradients=gradients, seconds=seconds, loss=0.5, samples_per_second=12345.6, shares=SHARES)


def test_a_log_gets_a_line_every_quarter_of_a_minute(clock, capsys):
    bar = Progress("easgd", gradients=200, seconds=None, done=0, show=True)
    for second in range(31):
        clock.now = 1000.0 + second
        update(bar, gradients=4 * second, seconds=second)
    bar.close()
    out, err = capsys.readouterr()
    assert not out
    assert err.splitlines() == [
        "easgd:  30%     15.0 s  loss 0.500, 12,346 samples/s, compute 50%, exchange 25%, waiting 25%",
        "easgd:  60%     30.0 s  loss 0.500, 12,346 samples/s, compute 50%, exchange 25%, waiting 25%",
    ]


def test_a_budget_in_seconds_is_counted_in_seconds(clock, capsys):
    bar = Progress("easgd", gradients=None, seconds=60.0, done=0, show=True)
    clock.now += 20
    update(bar, gradients=10**6, seconds=20.0)
    clock.now += 20
    update(bar, gradients=10**7, seconds=90.0)  # the last step may take longer than there is time
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["33%", "100%"]


def test_lines_too_soon_after_another_are_dropped_except_the_last(clock, capsys):
    bar = Progress("easgd", gradients=200, seconds=None, done=0, show=True)
    for epoch in range(100):
        clock.now += 0.01
        bar.note(f"epoch {epoch}")
    bar.note("the end", last=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "epoch 0"
    assert lines[-1] == "the end"
    assert 4 <= len(lines) <= 6


def test_other_ranks_are_silent(clock, capsys):
    bar = Progress("easgd", gradients=200, seconds=None, done=0, show=False)
    clock.now += 100
    update(bar, gradients=100)
    bar.note("epoch 1", last=True)
    bar.close()
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    bar = Progress("easgd", gradients=200, seconds=None, done=50, show=True)
    update(bar, gradients=100)
    bar.note("epoch 1")
    update(bar, gradients=400)  # asynchronous ranks overshoot
    bar.close()
    err = capsys.readouterr().err
    assert "easgd:  25%" in err
    assert "easgd: 100%" in err
    assert "loss 0.500, 12,346 samples/s, compute 50%" in err
    assert "\nepoch 1\n" in err.replace("\r", "\n")


@pytest.mark.parametrize("stream", ["none", "closed", "full"])
def test_progress_never_fails_a_run(stream, monkeypatch):
    monkeypatch.setattr(sys, "stderr", {"none": None, "closed": closed(), "full": open("/dev/full", "w")}[stream])  # noqa: SIM115
    monkeypatch.setattr(progress, "ends_in_terminal", lambda: stream == "full")
    bar = Progress("easgd", gradients=200, seconds=None, done=0, show=True)
    for gradients in range(200):
        update(bar, gradients)
    bar.note("epoch 1", last=True)
    bar.close()


def closed():
    stream = io.StringIO()
    stream.close()
    return stream
