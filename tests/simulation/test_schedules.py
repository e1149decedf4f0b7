"""Who goes on, and when nobody can."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpitrain.simulation.schedules import RandomOrder, RoundRobin, Scripted, Until, VirtualTime
from mpitrain.simulation.world import SimulatedWorld


def order(schedule, size, steps):
    """The ranks, step after step, of workers that each make so many; ``steps`` is a number or one each."""
    made = []

    def program(comm):
        for _ in range(steps if np.ndim(steps) == 0 else steps[comm.rank]):
            made.append(comm.rank)
            comm.end_step()

    SimulatedWorld(size, schedule).run(program)
    return made


@given(st.integers(1, 6), st.integers(0, 5))
def test_round_robin_goes_round(size, steps):
    assert order(RoundRobin(), size, steps) == list(range(size)) * steps


def test_round_robin_passes_over_those_that_have_finished():
    assert order(RoundRobin(), 3, [1, 3, 2]) == [0, 1, 2, 1, 2, 1]


@given(st.lists(st.integers(0, 3), max_size=30))
def test_script_is_followed_to_its_end(script):
    assert order(Scripted(script), 4, 100) == script


def test_script_leaves_programs_unfinished():
    world = SimulatedWorld(2, Scripted([1, 1, 0]))
    assert world.run(lambda comm: (comm.end_step(), comm.rank)[1]) == [None, 1]


def test_script_cannot_run_a_worker_that_has_finished():
    with pytest.raises(ValueError, match=r"worker 0 run, but only \[1\] can"):
        order(Scripted([0, 0, 0]), 2, 1)


def test_script_cannot_run_a_worker_that_waits():
    with pytest.raises(ValueError, match=r"worker 1 run, but only \[0\] can"):
        SimulatedWorld(2, Scripted([1, 1])).run(lambda comm: comm.barrier())


def test_random_order_is_that_of_its_seed():
    assert order(RandomOrder(1), 4, 20) == order(RandomOrder(1), 4, 20)
    assert order(RandomOrder(1), 4, 20) != order(RandomOrder(2), 4, 20)


@given(st.integers(1, 5), st.integers(0, 2**16))
def test_random_order_lets_everybody_finish(size, seed):
    assert sorted(order(RandomOrder(seed), size, 4)) == sorted(list(range(size)) * 4)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_worker_k_times_slower_makes_k_times_fewer_steps(k):
    made = order(VirtualTime([1.0, k, 1.0]), 3, [40, 40, 40])
    while_all_run = made[: len(made) - made[::-1].index(0)]  # until worker 0 has made its last step
    assert while_all_run.count(1) == pytest.approx(40 / k, abs=1)


def test_clocks_are_the_steps_times_their_cost():
    schedule = VirtualTime([1.0, 2.5])
    order(schedule, 2, [10, 4])
    assert schedule.clocks.tolist() == [10.0, 10.0]


def test_everybody_waits_for_the_straggler_in_a_collective():
    schedule = VirtualTime([1.0, 4.0, 2.0])

    def program(comm):
        for _ in range(3):
            comm.end_step()
            comm.barrier()

    SimulatedWorld(3, schedule).run(program)
    assert schedule.clocks.tolist() == [12.0, 12.0, 12.0]


@pytest.mark.parametrize("seconds", [[1, 0], [1, -1], [np.nan, 1], [np.inf, 1]])
def test_virtual_time_wants_positive_numbers(seconds):
    with pytest.raises(ValueError, match="positive number of seconds"):
        VirtualTime(seconds)


def test_exchanges_cost_latency_and_bytes():
    schedule = VirtualTime([1.0, 1.0], latency_seconds=0.25, bytes_per_second=100.0)

    def program(comm):
        vector = comm.vector(25, np.float64)
        comm.allreduce(vector)  # 200 bytes: 2*(p - 1)/p of its own
        comm.end_step()
        comm.end_step()

    SimulatedWorld(2, schedule).run(program)
    assert schedule.clocks.tolist() == [1 + 0.25 + 2 + 1] * 2


def test_jitter_leaves_the_mean_and_comes_from_the_seed():
    clocks = []
    for seed in (1, 1, 2):
        schedule = VirtualTime([1.0], jitter=0.5, seed=seed)
        order(schedule, 1, 4000)
        clocks.append(schedule.clocks[0])
    assert clocks[0] == clocks[1] != clocks[2]
    assert abs(clocks[0] / 4000 - 1) < 4 * np.sqrt((np.exp(0.25) - 1) / 4000)


def test_a_run_ends_when_something_holds():
    made = []

    def program(comm):
        while True:
            made.append(comm.rank)
            comm.end_step()

    SimulatedWorld(3, Until(RoundRobin(), lambda: len(made) >= 7)).run(program)
    assert made == [0, 1, 2, 0, 1, 2, 0]
