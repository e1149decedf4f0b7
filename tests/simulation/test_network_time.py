"""Workers on a simulated cluster: what their steps and exchanges take."""

from collections import Counter

import numpy as np
import pytest
from support.quadratic import simulate

from mpitrain.algorithms import EASGD, AllReduceSGD, Downpour, GossipSGD
from mpitrain.collectives.rma.peer_memory import LARGEST_REMOTE_SHARD, SMALLEST_REMOTE_SHARD
from mpitrain.simulation.compute import ComputeTime, Cores
from mpitrain.simulation.network import REQUEST_BYTES, Fabric, Network
from mpitrain.simulation.network_time import NetworkTime
from mpitrain.simulation.world import SimulatedWorld


def clocks(method, p, steps, network, *, nodes=None, step_seconds=1.0, n=100, **options):
    """The clocks of p workers after some steps, each on a node of its own by default."""
    schedule = NetworkTime(ComputeTime([step_seconds] * p), network, nodes or range(p), **options)
    simulation = simulate(method, p, start=np.ones(n), eta=0.1, schedule=schedule)
    simulation.run(steps)
    return schedule.clocks


def test_without_costs_only_gradients_take_time():
    for method in (AllReduceSGD(), EASGD(period=1), GossipSGD(), Downpour()):
        np.testing.assert_allclose(clocks(method, 3, 5, Network()), 5.0)


@pytest.mark.parametrize("p", [2, 4])
def test_a_step_of_allreduce_takes_a_gradient_and_the_ring(p):
    network = Network(latency=0.25, bandwidth=400.0)  # 800 bytes a vector
    found = clocks(AllReduceSGD(), p, 3, network)
    np.testing.assert_allclose(found, 3 * (1 + network.allreduce(800, range(p))))


def test_a_remote_visit_is_a_request_the_vector_and_its_return():
    # One shard of 16 elements at one worker; the other asks, gets and returns it. The return needs no answer.
    network = Network(latency=0.25, bandwidth=64.0)
    found = clocks(EASGD(period=1), 2, 1, network, n=16)
    found = np.sort(found)
    assert found[0] == 1.0  # the home
    assert found[1] == 1 + (0.25 + REQUEST_BYTES / 64) + (0.25 + 128 / 64) + 128 / 64


@pytest.mark.parametrize("updated", [True, False], ids=["pushed", "read"])
def test_the_request_of_a_prefetched_block_is_prepared_during_the_visit_before(updated):
    overhead, network = 0.1, Network(latency=0.25, bandwidth=64.0, overhead=0.1)
    arrivals = []
    for following in (("vector", 1), None):
        schedule = NetworkTime(ComputeTime([1.0] * 3), network, range(3))
        schedule.asking(0, ("vector", 0), 1)
        schedule.visit_begun(0, ("vector", 0), 1, 128, following)
        schedule.visit_ended(0, ("vector", 0), 1, 128, updated=updated)
        schedule.asking(0, ("vector", 1), 2)
        arrivals.append(schedule.clocks[0])
    assert arrivals[0] == pytest.approx(arrivals[1] - overhead)


def test_workers_queue_for_a_lock():
    # In the memory of a node: each holds the lock for half a second, and all arrive at once.
    found = clocks(EASGD(period=1), 4, 1, Network(node_latency=0.25, node_bandwidth=128 / 0.25), n=16, nodes=[0] * 4)
    assert sorted(found) == [1.5, 2.0, 2.5, 3.0]


def test_a_busy_server_bounds_the_steps_of_all_workers():
    # The home of the only shard serves a visit in 2*0.5 s, so that p workers far from it make one step each in p s.
    found = clocks(Downpour(), 9, 20, Network(service=0.5), n=16, step_seconds=0.001)
    assert found[1:].max() == pytest.approx(20 * 8 * 1.0, rel=0.05)


def test_two_workers_on_a_core_take_twice_as_long():
    for method in (AllReduceSGD(), EASGD(period=1)):
        found = clocks(method, 4, 5, Network(), nodes=[0] * 4, cores=2, slice_seconds=3e-4, step_seconds=0.1)
        np.testing.assert_allclose(found.max(), 2 * 5 * 0.1, rtol=0.03)


@pytest.mark.parametrize(
    ("nodes", "n_cores", "turns"),
    [([0] * 4, 1, 4), ([0] * 4, 2, 2), ([0] * 4, 8, 1), ([0] * 3, 2, 2), ([0, 0, 0, 1], 1, 3), ([0] * 4, None, 1)],
)
def test_the_workers_of_a_node_take_turns_for_their_pass_in_a_collective(nodes, n_cores, turns):
    network = Network(node_latency=0.5, node_bandwidth=400.0)
    schedule = NetworkTime(ComputeTime([1.0] * len(nodes)), network, nodes, cores=n_cores, wake_up=0.25)
    schedule.all_met(range(len(nodes)), "allreduce", 800)
    np.testing.assert_allclose(schedule.clocks, 0.5 + turns * 800 / 400 + 0.25 * (turns > 1))
    schedule.all_met(range(len(nodes)), "set-up")
    np.testing.assert_allclose(schedule.clocks, 0.5 + turns * 800 / 400 + 0.25 * (turns > 1))


def test_workers_on_cores_of_their_own_are_not_delayed():
    found = clocks(EASGD(period=1), 4, 50, Network(), nodes=[0] * 4, cores=4, step_seconds=0.1)
    np.testing.assert_allclose(found, 5.0, rtol=1e-6)


@pytest.mark.parametrize(("p", "n_cores"), [(3, 2), (5, 2), (7, 3)])
def test_workers_move_to_idle_cores(p, n_cores):
    """The cores of a node are busy as long as any worker has something to compute, so p workers take p/cores times."""
    found = clocks(AllReduceSGD(), p, 5, Network(), nodes=[0] * p, cores=n_cores, slice_seconds=3e-4, step_seconds=0.1)
    np.testing.assert_allclose(found.max(), 5 * 0.1 * p / n_cores, rtol=0.04)


def test_a_worker_that_waits_gets_the_first_core_that_is_free():
    cores = Cores(2, 2.0)
    assert cores.run(0, 0.0, 1.5) == (1.5, 0.0)
    assert cores.run(1, 0.0, 1.0) == (1.0, 0.0)
    assert cores.run(2, 0.25, 4.0) == (pytest.approx(1.0), 4.0)  # waits for worker 1
    assert cores.run(1, 1.0, 3.0) == (pytest.approx(2.0), 2.0)  # to the end of its slice
    assert cores.run(2, 1.0 + 1e-9, 4.0) == (pytest.approx(1.5), 4.0)  # now the core of worker 0 is free first
    assert cores.run(2, 1.5 + 1e-9, 4.0) == (pytest.approx(3.5), pytest.approx(2.0))
    cores.keep(1, 3.0)
    assert cores.run(0, 1.6, 1.0) == (pytest.approx(3.0), 1.0)


def share_of_fresh_visits(slice_seconds):
    schedule = NetworkTime(ComputeTime([1.0] * 4, jitter=0.1), Network(), [0] * 4, cores=2, slice_seconds=slice_seconds)
    simulation = simulate(Downpour(), 4, start=np.ones(4), eta=0.01, schedule=schedule).run(400)
    histogram = np.sum([worker.comm.statistics.staleness for worker in simulation.workers], axis=0)
    return histogram[0] / histogram.sum()


def test_long_slices_make_the_visits_of_a_worker_follow_each_other():
    # Slices of one gradient: all workers alternate. Long ones: of two running workers, each sees the other's last step.
    assert share_of_fresh_visits(1.0) < 0.1
    assert share_of_fresh_visits(50.0) == pytest.approx(share_of_fresh_visits(100.0), abs=0.15)
    assert share_of_fresh_visits(50.0) > share_of_fresh_visits(1.0)


def test_gradients_take_longer_where_workers_share_cores():
    """By a quarter for each further worker of a core."""
    for n_cores, seconds in ((1, 4 * 5 * 0.175), (2, 2 * 5 * 0.125), (4, 5 * 0.1), (None, 5 * 0.1)):
        options = {"cores": n_cores, "slice_seconds": 3e-4, "step_seconds": 0.1, "sharing": 0.25}
        found = clocks(EASGD(period=1), 4, 5, Network(), nodes=[0] * 4, **options)
        np.testing.assert_allclose(found.max(), seconds, rtol=0.03)


@pytest.mark.parametrize(("n_cores", "taken"), [(1, 1.0), (2, 0.0), (None, 0.0)])
def test_a_service_takes_the_time_of_both_ranks_unless_a_core_is_idle(n_cores, taken):
    """A visit has two requests, whose service takes half a second each; the next gradients take as much longer."""
    schedule = NetworkTime(ComputeTime([1.0] * 2), Network(service=0.5), range(2), cores=n_cores)
    schedule.asking(0, ("vector", 0), 1)
    schedule.visit_begun(0, ("vector", 0), 1, 128, None)
    schedule.visit_ended(0, ("vector", 0), 1, 128, updated=True)
    for rank in (0, 1):
        for seconds in (1 + taken, 1.0):  # the gradient after the visit, and the next one
            before = schedule.clocks[rank]
            while schedule.computing(rank):
                pass
            assert schedule.clocks[rank] - before == pytest.approx(seconds)


@pytest.mark.parametrize(("p_of_home", "turn"), [(1, 0.25), (2, 2.0)])
def test_a_request_waits_for_a_time_slice_where_workers_share_cores(p_of_home, turn):
    nodes = [0, 1, 1][: 1 + p_of_home]
    schedule = NetworkTime(ComputeTime([8.0] * len(nodes)), Network(), nodes, cores=1, slice_seconds=2.0)
    schedule.computing(1)  # its slice takes 1 to 3 seconds
    end_of_slice = schedule.clocks[1] if p_of_home == 2 else turn
    schedule.clocks[0] = 0.25
    while schedule.asking(0, ("vector", 0), 1):
        pass
    assert schedule.clocks[0] == end_of_slice
    assert schedule.clocks[0] == pytest.approx(turn, abs=1.0 * (p_of_home == 2))


def test_a_request_is_served_at_once_by_an_idle_core():
    schedule = NetworkTime(ComputeTime([8.0] * 4), Network(), [0, 1, 1, 1], cores=2, slice_seconds=2.0)
    schedule.computing(1)
    schedule.clocks[0] = 0.25
    while schedule.asking(0, ("vector", 0), 1):
        pass
    assert schedule.clocks[0] == 0.25


def test_a_core_goes_round_its_workers():
    core = Cores(1, 2.0)
    assert core.run(0, 0.0, 1.0) == (1.0, 0.0)
    assert core.run(1, 0.5, 3.0) == (pytest.approx(1.0), 3.0)  # waits
    assert core.run(0, 1.0, 5.0) == (2.0, 4.0)  # to the end of its slice
    assert core.run(0, 2.0, 4.0) == (pytest.approx(2.0), 4.0)  # behind worker 1
    assert core.run(1, 2.0 + 1e-9, 3.0) == (pytest.approx(4.0), pytest.approx(1.0))


def test_workers_that_join_late_begin_late():
    found = clocks(GossipSGD(), 3, 4, Network(), starts=[0.0, 2.5, 0.0])
    assert found.tolist() == [4.0, 6.5, 4.0]


def test_the_durations_of_gradients_have_their_distribution():
    def mean(**distribution):
        draws = ComputeTime([2.0], seed=1, **distribution)
        return np.mean([draws.draw(0) for _ in range(4000)])

    assert mean() == 2.0
    assert mean(jitter=0.5) == pytest.approx(2.0, rel=0.05)
    assert mean(measured=[1, 1, 4]) == pytest.approx(2.0, rel=0.05)
    assert mean(pauses_per_second=0.25, pause_seconds=3.0) == pytest.approx(2 + 2 * 0.25 * 3, rel=0.05)


def test_the_same_seed_gives_the_same_run_and_workers_draw_apart():
    one, again, other = (ComputeTime([1.0, 1.0], jitter=0.3, seed=seed) for seed in (4, 4, 5))
    a = [one.draw(0), one.draw(1)]
    b = again.draw(1), again.draw(0)
    assert a == [b[1], b[0]] != [other.draw(0), other.draw(1)]
    assert a[0] != a[1]


def test_an_evaluation_takes_no_time():
    schedule = NetworkTime(ComputeTime([1.0] * 3), Network(latency=1.0, bandwidth=1.0), range(3))
    world = SimulatedWorld(3, schedule)

    def program(comm):
        vector = comm.shared_vector(100, np.float64)
        with schedule.paused():
            vector.read(np.zeros(100))

    world.run(program)
    assert schedule.clocks.tolist() == [0, 0, 0]


@pytest.mark.parametrize("p", [2, 16, 1024])
def test_an_exchange_makes_two_requests_of_one_node_on_any_number_of_nodes(p, monkeypatch):
    """26,122 parameters are a single shard: one message asks for it, one returns it, however many nodes there are."""
    sent, original = Counter(), Fabric.send

    def send(fabric, source, target, *rest):
        sent[source, target] += 1
        return original(fabric, source, target, *rest)

    monkeypatch.setattr(Fabric, "send", send)
    schedule = NetworkTime(ComputeTime([1.0] * p), Network(latency=1e-4, bandwidth=1e9), range(p))
    limits = {"smallest_shard": SMALLEST_REMOTE_SHARD, "largest_shard": LARGEST_REMOTE_SHARD}
    world = SimulatedWorld(p, schedule, nodes=range(p), **limits)

    def program(comm):
        center = comm.shared_vector(26_122, np.float32)
        center.update(lambda part, values: 0)
        return center.homes

    homes = world.run(program)
    assert set(homes) == {(homes[0][0],)}
    home = homes[0][0]
    requests = {rank: sum(n for (source, target), n in sent.items() if source == rank != home) for rank in range(p)}
    assert requests == {rank: 2 * (rank != home) for rank in range(p)}
    assert sum(sent.values()) == 3 * (p - 1)  # and the shard comes
