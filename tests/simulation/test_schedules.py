"""Schedules: the order in which workers run, and their virtual time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpitrain.simulation.schedules import ClockQueue, RandomOrder, Ready, RoundRobin, Scripted, Until, VirtualTime
from mpitrain.simulation.world import SimulatedWorld


def order(schedule, size, steps):
    """The rank of each step that workers make, in order; ``steps`` is their number of steps, or a list of them."""
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


def test_round_robin_skips_finished_workers():
    assert order(RoundRobin(), 3, [1, 3, 2]) == [0, 1, 2, 1, 2, 1]


@given(st.lists(st.integers(0, 3), max_size=30))
def test_a_script_is_followed_to_its_end(script):
    assert order(Scripted(script), 4, 100) == script


def test_a_script_may_leave_programs_unfinished():
    world = SimulatedWorld(2, Scripted([1, 1, 0]))
    assert world.run(lambda comm: (comm.end_step(), comm.rank)[1]) == [None, 1]


def test_a_script_cannot_run_a_finished_worker():
    with pytest.raises(ValueError, match=r"worker 0 run, but only \[1\] can"):
        order(Scripted([0, 0, 0]), 2, 1)


def test_a_script_cannot_run_a_waiting_worker():
    with pytest.raises(ValueError, match=r"worker 1 run, but only \[0\] can"):
        SimulatedWorld(2, Scripted([1, 1])).run(lambda comm: comm.barrier())


def test_random_order_depends_on_its_seed_only():
    assert order(RandomOrder(1), 4, 20) == order(RandomOrder(1), 4, 20)
    assert order(RandomOrder(1), 4, 20) != order(RandomOrder(2), 4, 20)


@given(st.integers(1, 5), st.integers(0, 2**16))
def test_random_order_lets_every_worker_finish(size, seed):
    assert sorted(order(RandomOrder(seed), size, 4)) == sorted(list(range(size)) * 4)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_a_worker_k_times_slower_makes_k_times_fewer_steps(k):
    made = order(VirtualTime([1.0, k, 1.0]), 3, [40, 40, 40])
    while_all_run = made[: len(made) - made[::-1].index(0)]  # until worker 0 has made its last step
    assert while_all_run.count(1) == pytest.approx(40 / k, abs=1)


def test_a_clock_is_the_number_of_steps_times_their_duration():
    schedule = VirtualTime([1.0, 2.5])
    order(schedule, 2, [10, 4])
    assert schedule.clocks.tolist() == [10.0, 10.0]


def test_all_workers_wait_for_the_straggler_in_a_collective():
    schedule = VirtualTime([1.0, 4.0, 2.0])

    def program(comm):
        for _ in range(3):
            comm.end_step()
            comm.barrier()

    SimulatedWorld(3, schedule).run(program)
    assert schedule.clocks.tolist() == [12.0, 12.0, 12.0]


@pytest.mark.parametrize("seconds", [[1, 0], [1, -1], [np.nan, 1], [np.inf, 1]])
def test_step_durations_must_be_positive_and_finite(seconds):
    with pytest.raises(ValueError, match="positive number of seconds"):
        VirtualTime(seconds)


def test_exchanges_take_latency_and_the_time_of_their_bytes():
    schedule = VirtualTime([1.0, 1.0], latency_seconds=0.25, bytes_per_second=100.0)

    def program(comm):
        vector = comm.vector(25, np.float64)
        comm.allreduce(vector)  # 200 bytes: 2*(p - 1)/p of its own
        comm.end_step()
        comm.end_step()

    SimulatedWorld(2, schedule).run(program)
    assert schedule.clocks.tolist() == [1 + 0.25 + 2 + 1] * 2


def test_jitter_keeps_the_mean_and_depends_on_the_seed():
    clocks = []
    for seed in (1, 1, 2):
        schedule = VirtualTime([1.0], jitter=0.5, seed=seed)
        order(schedule, 1, 4000)
        clocks.append(schedule.clocks[0])
    assert clocks[0] == clocks[1] != clocks[2]
    assert abs(clocks[0] / 4000 - 1) < 4 * np.sqrt((np.exp(0.25) - 1) / 4000)


def test_a_run_ends_when_the_condition_holds():
    made = []

    def program(comm):
        while True:
            made.append(comm.rank)
            comm.end_step()

    SimulatedWorld(3, Until(RoundRobin(), lambda: len(made) >= 7)).run(program)
    assert made == [0, 1, 2, 0, 1, 2, 0]


def test_a_step_takes_the_seconds_of_the_formula():
    # clock += step_seconds*exp(s*z - s^2/2) + n_exchanges*latency + n_bytes/bandwidth, with z ~ N(0, 1) for each step
    step_seconds, latency, bandwidth, s = [1.0, 4.0, 0.5], 0.25, 100.0, 0.3  # worker 1 is the straggler
    schedule = VirtualTime(step_seconds, latency_seconds=latency, bytes_per_second=bandwidth, jitter=s, seed=7)
    steps = [(0, 1, 200), (2, 0, 0), (1, 2, 50), (0, 0, 0), (2, 3, 1)]
    expected = np.zeros(3)
    for z, (rank, n_exchanges, n_bytes) in zip(np.random.default_rng(7).standard_normal(len(steps)), steps):
        schedule.step_made(rank, n_exchanges, n_bytes)
        expected[rank] += step_seconds[rank] * np.exp(s * z - s**2 / 2) + n_exchanges * latency + n_bytes / bandwidth
    np.testing.assert_allclose(schedule.clocks, expected, rtol=1e-15)


def test_the_worker_furthest_behind_runs_next():
    schedule = VirtualTime([1.0, 4.0, 2.0])
    assert order(schedule, 3, 3) == [0, 1, 2, 0, 0, 2, 1, 2, 1]
    # clocks before each step: 000 100 140 142 242 342 344 384 386
    assert schedule.clocks.tolist() == [3, 12, 6]


def test_only_the_workers_of_a_collective_wait_for_each_other():
    schedule = VirtualTime([1.0, 5.0, 2.0, 3.0])
    for rank in range(4):
        schedule.step_made(rank)
    schedule.all_met((0, 2, 3))
    assert schedule.clocks.tolist() == [3, 5, 3, 3]


def test_a_released_worker_is_never_set_back():
    schedule = VirtualTime([1.0, 5.0])
    schedule.step_made(0)
    schedule.step_made(1)
    assert schedule.choose([0]) == 0  # worker 0 makes true what worker 1 waits for, at second 1
    schedule.released(1)
    assert schedule.clocks.tolist() == [1, 5]
    assert schedule.choose([1]) == 1
    schedule.released(0)
    assert schedule.clocks.tolist() == [5, 5]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), max_size=40), st.data())
def test_the_earliest_of_a_clock_queue_is_that_of_a_search(moves, data):
    clocks = np.zeros(5)
    queue = ClockQueue(clocks)
    for rank, seconds in moves:
        clocks[rank] += seconds
        queue.add((rank,))
        among = data.draw(st.sets(st.integers(0, 4), min_size=1))
        assert queue.earliest(among) == min(among, key=lambda other: (clocks[other], other))
        queue.add(range(5))  # those that were found waiting


@given(st.sets(st.integers(0, 9)), st.sets(st.integers(0, 9)), st.integers(-1, 9))
def test_the_ready_workers_are_an_ascending_set(added, removed, rank):
    ready = Ready(10)
    ready.add(added)
    ready.add(added)
    for other in removed:
        ready.discard(other)
    left = sorted(added - removed)
    assert (list(ready), len(ready), repr(ready)) == (left, len(left), repr(left))
    assert [other for other in range(10) if other in ready] == left
    if left:
        assert ready.after(rank) == next((other for other in left if other > rank), left[0])
