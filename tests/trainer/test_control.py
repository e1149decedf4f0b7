"""Orders of rank 0 reach every rank once; ranks in lockstep follow them at the same step."""

from __future__ import annotations

import os
import signal
import time

import pytest

from mpitrain.trainer.control import STEPS_BETWEEN_BROADCASTS, Control, StopSignal

DETECTION_SECONDS = 30.0


@pytest.fixture
def control(world, request):
    """Collective."""
    control = Control(world, synchronous=request.param == "synchronous")
    yield control
    world.barrier()
    control.free()


def listen_until(control: Control, wanted: str) -> int:
    """Return the number of steps made until the order is received."""
    ends = time.perf_counter() + DETECTION_SECONDS
    step = 0
    while time.perf_counter() < ends:
        step += 1
        if getattr(control.listen(step), wanted):
            return step
    raise AssertionError(f"no order to {wanted} was heard")


@pytest.mark.ranks(1, 2, 3, 5)
@pytest.mark.parametrize("control", ["asynchronous"], indirect=True)
def test_an_asynchronous_rank_receives_an_order_once_without_waiting(world, control):
    assert not control.listen(1).save
    world.barrier()
    if world.rank == 0:
        control.order(save=True)
    listen_until(control, "save")
    world.barrier()
    time.sleep(0.05)
    assert not any(control.listen(step).save for step in range(100))
    world.barrier()
    if world.rank == 0:
        control.order(save=True, stop=True)
        assert control.is_stopping
    heard = control.listen(1)
    while not heard.stop:
        heard = control.listen(1)
    assert heard.save
    assert control.is_stopping


@pytest.mark.ranks(1, 2, 3, 5)
@pytest.mark.parametrize("control", ["synchronous"], indirect=True)
def test_synchronous_ranks_receive_an_order_at_the_same_step(world, control):
    if world.rank == 0:
        control.order(save=True, stop=True)
        control.order(save=True, stop=True)
    steps = [step for step in range(1, 3 * STEPS_BETWEEN_BROADCASTS) if control.listen(step).save]
    assert steps == [STEPS_BETWEEN_BROADCASTS]
    assert control.listen(3 * STEPS_BETWEEN_BROADCASTS).stop
    assert control.rest().over


@pytest.mark.ranks(1, 2, 3, 5)
@pytest.mark.parametrize("control", ["asynchronous"], indirect=True)
def test_a_rank_that_is_done_follows_orders_until_all_are_done(world, control):
    last = world.size - 1
    if world.rank == last > 0:  # the slow one
        listen_until(control, "stop")
        time.sleep(0.2)
    control.report_done()
    saves, began = 0, time.perf_counter()
    if world.rank == 0:
        control.order(save=True, stop=True)
    while not (orders := control.rest()).over:
        saves += orders.save
        assert time.perf_counter() - began < DETECTION_SECONDS
    # The slow rank took the order to save together with the one to stop, while it was still at work.
    assert saves == (world.rank != last or last == 0)


def test_a_signal_is_recorded_and_its_handler_restored():
    before = signal.getsignal(signal.SIGUSR1)
    stop = StopSignal()
    try:
        assert not stop.received
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.received
    finally:
        stop.restore()
    assert signal.getsignal(signal.SIGUSR1) is before
