"""Simulations: workers of a method, a schedule, and gradients from a function."""

import numpy as np
import pytest
from support.quadratic import same_bits, simulate, slope

from mpitrain.algorithms import EASGD, AllReduceSGD, GossipSGD
from mpitrain.algorithms.base.iterate_average import Average
from mpitrain.simulation.engine import Simulation
from mpitrain.simulation.schedules import RandomOrder, Scripted, VirtualTime
from mpitrain.simulation.world import SimulatedWorld

LONELY = EASGD(moving_rate=0.0, period=1)


def test_local_update_is_sgd_with_weight_decay():
    # x <- x - eta (g + decay x)
    start = np.random.default_rng(0).normal(size=(2, 5))
    end = simulate(LONELY, 2, start=start, eta=0.1, decay=0.3, gradient=slope(2.0, 1.0)).run(4).x()
    x = start
    for _ in range(4):
        x = x - 0.1 * (2.0 * (x - 1.0) + 0.3 * x)
    np.testing.assert_allclose(end, x, rtol=1e-13)


def test_a_start_is_common_to_all_workers_or_has_a_row_for_each():
    same, own = np.arange(3.0), np.arange(6.0).reshape(2, 3)
    assert simulate(LONELY, 2, start=same, eta=0.1).x().tolist() == [[0, 1, 2]] * 2
    assert simulate(LONELY, 2, start=own, eta=0.1).x().tolist() == own.tolist()
    assert same.tolist() == [0, 1, 2]


def test_start_is_not_changed():
    start = np.ones((2, 3))
    simulate(AllReduceSGD(), 2, start=start, eta=0.1).run(5)
    assert (start == 1).all()


def test_wrong_number_of_starts_is_refused():
    with pytest.raises(ValueError, match="broadcast"):
        simulate(LONELY, 3, start=np.zeros((2, 4)), eta=0.1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_workers_compute_in_the_dtype_of_the_start(dtype):
    end = simulate(EASGD(period=1), 3, start=np.ones(4, dtype), eta=0.1).run(2)
    assert end.x().dtype == end.consensus().dtype == dtype


def test_set_up_does_not_advance_the_schedule():
    # Three steps of a script are three steps of workers, however many times they gave way to be set up.
    made = []
    simulation = simulate(EASGD(period=1), 3, start=np.ones(4), eta=0.1, schedule=Scripted([2, 0, 2]))
    simulation.run(9, lambda _, rank: made.append(rank))
    assert made == [2, 0, 2]
    assert [worker.t for worker in simulation.workers] == [1, 0, 2]


def test_two_runs_equal_one_of_their_total_length():
    whole = simulate(EASGD(period=2), 3, start=np.ones(4), eta=0.1).run(9).x()
    parts = simulate(EASGD(period=2), 3, start=np.ones(4), eta=0.1).run(4).run(5).x()
    assert same_bits(parts, whole)


def test_after_step_sees_every_step_once():
    counts = np.zeros(3, int)

    def count(simulation, rank):
        counts[rank] += 1
        assert simulation.workers[rank].t == counts[rank]

    simulate(GossipSGD(), 3, start=np.ones(4), eta=0.1, schedule=RandomOrder(1)).run(6, count)
    assert counts.tolist() == [6, 6, 6]


def test_a_straggler_slows_synchronous_workers_only():
    def steps_of_the_fast_worker(method):
        schedule = VirtualTime([1.0, 10.0])
        simulation = simulate(method, 2, start=np.ones(4), eta=0.1, schedule=schedule)
        made = []
        simulation.run(30, lambda _, rank: made.append((rank, schedule.clocks.max())))
        return sum(rank == 0 and clock <= 30 for rank, clock in made)

    assert steps_of_the_fast_worker(AllReduceSGD()) <= 4
    assert steps_of_the_fast_worker(EASGD(period=1)) >= 29


def test_an_exception_in_a_gradient_reaches_the_caller():
    def gradient(rank, x):
        if rank == 1:
            raise FloatingPointError("worker 1")
        return x

    world = SimulatedWorld(2)
    with pytest.raises(FloatingPointError, match="worker 1"):
        Simulation(AllReduceSGD(), world, gradient, np.ones(3), 0.1).run(3)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_local_update_with_momentum_is_that_of_torch(momentum):
    # v <- mu*v + g + decay*x,  x <- x - eta*v
    start = np.random.default_rng(1).normal(size=(2, 5))
    world = SimulatedWorld(2)
    simulation = Simulation(LONELY, world, slope(2.0, 1.0), start, 0.1, 0.3, momentum=momentum).run(4)
    x, v = start, 0.0
    for _ in range(4):
        v = momentum * v + 2.0 * (x - 1.0) + 0.3 * x
        x = x - 0.1 * v
    np.testing.assert_allclose(simulation.x(), x, rtol=1e-13)


@pytest.mark.parametrize("seed", [0, 1, 5])
def test_a_gossiping_worker_averages_with_the_peer_that_it_draws(seed):
    # Worker 2 alone makes steps: x_2 <- (x_2 + x_j)/2, with x_i = 4^i so that x_2 names j.
    p, rank = 5, 2
    start = 4.0 ** np.arange(p)[:, None]
    simulation = simulate(GossipSGD(), p, start=start, eta=0.0, schedule=Scripted([rank] * 3), seed=seed)
    drawn, expected = np.random.default_rng([seed, rank]), start[rank]
    for _ in range(3):
        peer = [j for j in range(p) if j != rank][drawn.integers(p - 1)]
        expected = (expected + start[peer]) / 2
    simulation.run(9)
    assert simulation.x()[rank].tolist() == expected.tolist()
    others = [0, 1, 3, 4]
    assert simulation.x()[others].tolist() == start[others].tolist()


def test_virtual_time_of_an_asynchronous_run_is_that_of_its_exchanges():
    # EASGD with period 2: two of four steps read and write the center, 4 numbers of 8 bytes.
    schedule = VirtualTime([1.0, 3.0], latency_seconds=0.25, bytes_per_second=64.0)
    simulation = simulate(EASGD(period=2), 2, start=np.ones(4), eta=0.1, schedule=schedule).run(4)
    for rank, worker in enumerate(simulation.workers):
        sent = worker.comm.statistics
        assert sent.n_exchanges == 2
        assert sent.bytes_sent == 2 * 2 * 4 * 8
        assert schedule.clocks[rank] == 4 * [1.0, 3.0][rank] + 2 * 0.25 + sent.bytes_sent / 64


def test_a_polyak_average_of_a_lone_worker_is_the_mean_of_its_iterates():
    # x_t = 0.9^t x_0 with eta*h = 0.1
    start = np.ones((1, 3))
    average = Average.parse("polyak")
    simulation = Simulation(LONELY, SimulatedWorld(1), slope(1.0), start, 0.1, average=average).run(4)
    np.testing.assert_allclose(simulation.consensus(), np.full(3, np.mean(0.9 ** np.arange(1, 5))), rtol=1e-12)
    np.testing.assert_allclose(simulation.x(), np.full((1, 3), 0.9**4), rtol=1e-12)


def test_the_velocity_of_a_nonfinite_element_starts_again_at_zero():
    # The gradient of element 0 is infinite once. The exchange of step 2 replaces the element, that of step 3 again, for
    # the velocity was still infinite; from then on it moves as in a run of its own.
    def end_after(steps, *, spoil):
        n_calls = []

        def gradient(rank, x):
            n_calls.append(rank)
            return np.full(1, np.inf if spoil and len(n_calls) == 1 else -1.0)

        method = EASGD(moving_rate=0.5, period=1)
        return Simulation(method, SimulatedWorld(1), gradient, np.zeros(1), 0.1, momentum=0.9).run(steps).x()

    assert end_after(6, spoil=True) == end_after(4, spoil=False)
    assert end_after(4, spoil=False) > 0.3
