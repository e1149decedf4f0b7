"""The network of a simulated cluster against closed forms."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpitrain.simulation.network import Fabric, Network, Resource

LOGGP = Network(latency=5.0, overhead=0.5, gap=0.25, bandwidth=100.0)


@pytest.mark.parametrize(("n_bytes", "wire"), [(0, 0.25), (10, 0.25), (1000, 10.0)])
def test_a_message_takes_two_overheads_the_latency_and_its_gap_or_bytes(n_bytes, wire):
    sent, arrived = Fabric(LOGGP, [0, 1]).send(0, 1, n_bytes, at=3.0)
    assert sent == 3 + 0.5 + wire
    assert arrived == 3 + 0.5 + wire + 5 + 0.5 == 3 + LOGGP.message(n_bytes)


def test_ranks_of_a_node_share_its_memory():
    fabric = Fabric(Network(latency=9.0, bandwidth=1.0, node_latency=0.5, node_bandwidth=100.0), [0, 0])
    assert fabric.send(0, 1, 200, at=1.0) == (3.5, 3.5)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_messages_share_the_adapter_of_their_sender_and_of_their_receiver(k):
    network = Network(latency=1.0, bandwidth=10.0)
    out = Fabric(network, range(k + 1))
    assert max(out.send(0, 1 + i, 100, at=0)[1] for i in range(k)) == 1 + k * 10
    into = Fabric(network, range(k + 1))
    assert max(into.send(1 + i, 0, 100, at=0)[1] for i in range(k)) == 1 + k * 10
    apart = Fabric(network, range(2 * k))
    assert max(apart.send(i, k + i, 100, at=0)[1] for i in range(k)) == 1 + 10


def test_both_directions_of_an_adapter_are_free_at_once():
    fabric = Fabric(Network(bandwidth=10.0), [0, 1])
    assert fabric.send(0, 1, 100, at=0)[1] == fabric.send(1, 0, 100, at=0)[1] == 10


def test_a_shared_uplink_halves_the_bandwidth_of_two_messages():
    network = Network(latency=1.0, bandwidth=10.0, rack_nodes=2, uplink=10.0)
    crossing, inside = Fabric(network, range(4)), Fabric(network, range(4))
    assert max(crossing.send(0, 2, 100, at=0)[1], crossing.send(1, 3, 100, at=0)[1]) == 1 + 100 / (10 / 2)
    assert max(inside.send(0, 1, 100, at=0)[1], inside.send(2, 3, 100, at=0)[1]) == 1 + 100 / 10


@pytest.mark.parametrize("p", [2, 3, 8, 1000])
def test_an_allreduce_of_a_long_vector_takes_two_rounds_of_parts(p):
    network = Network(latency=2e-6, bandwidth=1e9)
    m = 4e8
    ring = 2 * (p - 1) * (2e-6 + m / p / 1e9)
    halving = 2 * math.log2(p) * 2e-6 + 2 * (p - 1) / p * m / 1e9
    doubling = math.log2(p) * (2e-6 + m / 1e9)
    expected = {2: doubling, 3: ring, 8: halving, 1000: ring}[p]
    assert network.allreduce(m, range(p)) == pytest.approx(expected)
    assert expected <= min((ring, doubling, halving) if p in (2, 8) else (ring,))


@pytest.mark.parametrize(("p", "rounds", "folded"), [(2, 1, 1), (3, 2, 3), (8, 3, 3), (1024, 10, 10), (1025, 11, 12)])
def test_short_collectives_take_the_logarithm_of_the_nodes(p, rounds, folded):
    network = Network(latency=1.0, overhead=0.25, bandwidth=1e12)
    assert network.allreduce(8, range(p)) == pytest.approx(folded * 1.5)  # no power of two: two more messages
    assert network.barrier(range(p)) == rounds * 1.5
    assert network.tree(8, range(p)) == pytest.approx(rounds * 1.5)
    assert network.gather(8, range(p)) == pytest.approx(rounds * 1.5, rel=1e-6)


def test_an_allgather_moves_the_parts_of_all_others():
    # Recursive doubling: (1 + 2 + 4)*m bytes among 8 nodes.
    assert Network(bandwidth=10.0).gather(100, range(8)) == 700 / 10


def test_recursive_doubling_shares_an_uplink_where_it_leaves_the_rack():
    # Two racks of two: one step inside, one in which both nodes of a rack cross.
    network = Network(latency=1.0, bandwidth=10.0, rack_nodes=2, uplink=10.0)
    assert network.doubling(100, range(4)) == (1 + 10) + (1 + 20)


def test_ranks_of_one_node_reduce_in_its_memory():
    network = Network(latency=9.0, bandwidth=1.0, node_latency=0.5, node_bandwidth=100.0)
    assert network.allreduce(200, [0, 0, 0]) == 0.5 + 2
    assert network.allreduce(200, [0, 0, 1, 1]) == 0.5 + 2 + min(2 * (9 + 100), 9 + 200)


def test_a_lone_rank_waits_for_nobody():
    assert all(LOGGP.collective(kind, 800, [0]) == 0 for kind in ("allreduce", "tree", "gather", "barrier"))


def test_a_server_with_random_requests_has_the_queue_of_md1():
    # Mean wait of M/D/1: rho*D / (2*(1 - rho)), Pollaczek and Khinchine.
    rho, service, n = 0.6, 1.0, 40_000
    fabric = Fabric(Network(service=service), [0])
    arrivals = np.cumsum(np.random.default_rng(0).exponential(service / rho, n))
    waits = [fabric.serve(0, 0, at) - at - service for at in arrivals]
    assert np.mean(waits) == pytest.approx(rho * service / (2 * (1 - rho)), rel=0.05)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 5)), max_size=30))
def test_reservations_never_overlap_and_take_the_first_gap(wanted):
    resource, busy = Resource(), set()
    for earliest, seconds in wanted:
        start = next(t for t in range(earliest, 1000) if not busy & set(range(t, t + seconds)))
        assert resource.reserve(earliest, seconds) == start
        busy |= set(range(start, start + seconds))
