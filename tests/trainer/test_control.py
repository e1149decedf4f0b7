"""Orders of rank 0 reach every rank once; ranks in lockstep follow them at the same step."""

from __future__ import annotations

import signal
import time

import pytest

from mpitrain.trainer.control import MAX_STEPS_BETWEEN_AGREEMENTS, Control

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


@pytest.mark.ranks(2, 3)
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


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("control", ["synchronous"], indirect=True)
def test_synchronous_ranks_receive_an_order_at_the_same_step(world, control):
    n_steps = 3 * MAX_STEPS_BETWEEN_AGREEMENTS
    if world.rank == 0:
        control.order(save=True, stop=True)
        control.order(save=True, stop=True)
    saves = [control.listen(step).save for step in range(1, n_steps)]
    assert sum(saves[: MAX_STEPS_BETWEEN_AGREEMENTS + 1]) == sum(saves) == 1
    assert world.comm.allgather(saves) == [saves] * world.size
    assert control.is_stopping
    assert control.rest().over


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("control", ["synchronous"], indirect=True)
@pytest.mark.parametrize("step_seconds", [0.0, 0.12], ids=["short", "long"])
def test_synchronous_ranks_hear_of_a_signal_to_any_of_them_at_the_same_step(world, control, step_seconds):
    """At once where a step takes a tenth of a second, and after ten shorter steps at most."""
    for step in range(1, 14):
        time.sleep(step_seconds)
        control.listen(step)
    if world.rank == world.size - 1:
        control.report_signal(signal.SIGTERM)
    heard = []
    for step in range(14, 14 + MAX_STEPS_BETWEEN_AGREEMENTS):
        time.sleep(step_seconds)
        heard.append(control.listen(step).signal)
    assert max(heard) == signal.SIGTERM
    assert world.comm.allgather(heard) == [heard] * world.size
    if step_seconds:
        assert heard[0] == signal.SIGTERM


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("control", ["asynchronous"], indirect=True)
def test_the_lead_of_asynchronous_ranks_hears_of_a_signal_to_any_of_them(world, control):
    world.barrier()
    if world.rank == world.size - 1:
        control.report_signal(signal.SIGINT)
    world.barrier()
    if world.rank == 0:
        assert control.signal == signal.SIGINT


@pytest.mark.ranks(2, 3)
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
