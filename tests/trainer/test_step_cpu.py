"""The CPU time of steps, with clocks that the tests set."""

import pytest

from mpitrain.trainer import step_cpu
from mpitrain.trainer.step_cpu import StepCPU


@pytest.fixture
def step(monkeypatch):
    """Make a step: the CPU seconds of its gradient, of its exchanges and of other threads, and how many exchanges."""
    cpu, now = StepCPU(), {"thread": 0.0, "process": 0.0, "exchange": 0.0, "n": 0}
    monkeypatch.setattr(step_cpu.time, "thread_time", lambda: now["thread"])
    monkeypatch.setattr(step_cpu.time, "process_time", lambda: now["process"])

    def make(gradient, exchange, others=0.0, n_exchanges=1):
        cpu.begin(now["exchange"], now["n"])
        now["thread"] += gradient + exchange
        now["process"] += gradient + exchange + others
        now["exchange"] += exchange
        now["n"] += n_exchanges
        cpu.end(now["exchange"], now["n"])
        now["thread"] += 100.0  # between two steps
        now["process"] += 200.0
        return cpu

    return make


def test_times_are_summed_over_the_steps(step):
    step(1.0, 0.5, 0.25)
    cpu = step(2.0, 0.5, 0.75)
    assert cpu.seconds == pytest.approx(5.0)


def test_the_lower_quartile_is_undisturbed(step):
    for gradient, exchange in ((1, 10), (2, 20), (3, 30), (4, 40), (50, 500)):
        cpu = step(float(gradient), float(exchange), n_exchanges=10)
    assert cpu.undisturbed() == pytest.approx((2.0, 2.0))


def test_steps_without_exchanges_count_for_the_gradient_only(step):
    step(1.0, 0.5, n_exchanges=0)
    cpu = step(1.5, 4.0)
    gradient, exchange = cpu.undisturbed()
    assert gradient == pytest.approx(1.5)
    assert exchange == 4.0


def test_without_steps_there_are_no_times():
    assert StepCPU().undisturbed() == (0.0, 0.0)
